"""Runs of the reference model, kept in the bundle so that every later stage can check itself without torch.

The sampler here follows the official code step by step, in torch, and shares nothing with
``elf_rt.sampling.schedule``: the table is checked against it. The file format is that of the official golden runs:

    fwd_z, fwd_x_prev (B, L, C), fwd_t, fwd_sc (B) -> fwd_x (B, L, C)     one denoising call
    dec_ids (B, L)                                                        the decoding call at z = fwd_z
    run{i}_spec                                                           YAML: method, steps, schedule, gamma, cfg, sc
    run{i}_t (N+1), run{i}_z0 (B, L, C)                                   grid, start
    run{i}_eps (n, B, L, C)                                               noise: N - 1 for sde, N for refine, 0 for ode
    run{i}_cond (B, L, C), run{i}_cond_mask (B, L)                        source latents, where there are any
    run{i}_latent (B, L, C), run{i}_ids (B, L)                            z at t = 1, token ids
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from elf_rt.export.reference import ELF
from elf_rt.params import ModelConfig, SamplingParams

Call = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # z, x_prev, t, s, mode
RECORDED = ("ode", "sde", "refine")  # samplers of the official code, which ``sample`` follows
FLOP_BUDGET = 1e13  # a run of a large model shrinks to so much: about a minute on two cores


@dataclass(frozen=True)
class Run:
    """Everything one sampling run is made from. t: (N+1,) z0: (B, L, C) eps: (n, B, L, C) mask: (B, L)."""

    params: SamplingParams
    t: Tensor
    z0: Tensor
    eps: Tensor
    cond: Tensor | None = None
    mask: Tensor | None = None


@torch.no_grad()
def sample(model: ELF, run: Run, on_call: Callable[[Call], None] | None = None) -> tuple[Tensor, Tensor]:
    """The official sampler: z (B, L, C) at t = 1 and token ids (B, L). ``on_call`` sees every network call."""
    config, params = model.config, run.params
    batch = len(run.z0)

    def net(z: Tensor, x_prev: Tensor, t: float, mode: float = 0.0) -> tuple[Tensor, Tensor]:
        call = (z, x_prev, torch.full((batch,), t), torch.full((batch,), params.sc_cfg), torch.full((batch,), mode))
        if on_call is not None:
            on_call(call)
        out: tuple[Tensor, Tensor] = model(*call)
        return out

    def self_conditioned(z: Tensor, x_prev: Tensor, t: float) -> Tensor:
        s = params.sc_cfg
        if not config.self_cond or config.num_self_cond_cfg_tokens or s == 1:
            return net(z, x_prev, t)[0]
        plain = net(z, torch.zeros_like(z), t)[0]
        return plain if s == 0 else plain + s * (net(z, x_prev, t)[0] - plain)

    def guided(z: Tensor, x_prev: Tensor, t: float) -> Tensor:
        x = self_conditioned(z, x_prev, t)
        if run.mask is None or params.guidance_scale == 1:
            return x
        free = ~run.mask[..., None]
        unconditional = self_conditioned(z * free, x_prev * free, t)
        return unconditional + params.guidance_scale * (x - unconditional)

    def restore(x: Tensor) -> Tensor:
        return x if run.mask is None or run.cond is None else torch.where(run.mask[..., None], run.cond, x)

    z, x_prev = restore(run.z0), restore(torch.zeros_like(run.z0))
    steps = len(run.t) - 1
    for i in range(steps):
        if params.sampler == "refine":
            keep = max(0.0, 1.0 - params.gamma)
            z = restore(keep * z + (1.0 - keep) * config.noise_scale * run.eps[i]) if i else z
            x_prev = restore(guided(z, x_prev, 0.0))
            continue
        t, t_next = float(run.t[i]), float(run.t[i + 1])
        if params.sampler == "sde" and i < steps - 1:
            alpha = min(1.0, max(0.0, 1.0 - params.gamma * (t_next - t)))
            z = restore(alpha * z + (1.0 - alpha) * config.noise_scale * run.eps[i])
            t = alpha * t
        x = restore(guided(z, x_prev, t))
        kappa = (t_next - t) / max(1.0 - t, config.t_eps)
        z, x_prev = restore((1.0 - kappa) * z + kappa * x), x
    z = x_prev if params.sampler == "refine" else z
    _, hidden = net(z, torch.zeros_like(z), 1.0, mode=1.0)
    return z, model.discretize_logits(hidden).argmax(-1)


def plan_runs(
    config: ModelConfig,
    presets: dict[str, SamplingParams],
    cond: Tensor | None,
    mask: Tensor | None,
    *,
    max_steps: int,
    seed: int,
    batch: int = 4,
) -> list[Run]:
    """Runs of the official sampler at the guidance of every preset, and one without a source where the model takes one.
    A preset whose sampler the official code lacks is recorded as ode.

    cond (B, L, C) and mask (B, L) are source latents to run on. Steps and batch shrink for a large model.
    """
    generator = torch.Generator().manual_seed(seed)
    step_flop = 2.0 * _parameters(config) * config.max_length
    runs: list[Run] = []
    for params in presets.values():
        cost = step_flop * (2 if params.guidance_scale != 1 else 1)
        fitting = int(min(batch, max(1, FLOP_BUDGET // (cost * max_steps))))
        params = SamplingParams(
            steps=int(min(params.steps, max_steps, max(4, FLOP_BUDGET // (cost * fitting)))),
            sampler=params.sampler if params.sampler in RECORDED else "ode",
            guidance_scale=params.guidance_scale,
            sc_cfg=params.sc_cfg,
            gamma=params.gamma,
        )
        if all(params != run.params for run in runs):
            runs.append(_draw(config, params, fitting, generator, cond, mask))
    if cond is not None:
        runs.append(_draw(config, runs[0].params, len(runs[0].z0), generator, None, None))
    return runs


def _draw(
    config: ModelConfig,
    params: SamplingParams,
    batch: int,
    generator: torch.Generator,
    cond: Tensor | None,
    mask: Tensor | None,
) -> Run:
    n, shape = params.steps, (batch, config.max_length, config.latent_dim)
    inner = torch.sigmoid(config.p_mean + config.p_std * torch.randn(n - 1, generator=generator, dtype=torch.float64))
    t = torch.cat([torch.zeros(1), inner.sort().values, torch.ones(1)])
    z0 = config.noise_scale * torch.randn(shape, generator=generator)
    noisy = {"sde": n - 1, "refine": n}.get(params.sampler, 0)
    eps = torch.randn((noisy, *shape), generator=generator)
    if cond is None or mask is None:
        return Run(params, t, z0, eps)
    index = torch.arange(batch) % len(cond)
    return Run(params, t, z0, eps, cond[index], mask[index])


def record(model: ELF, runs: list[Run]) -> dict[str, np.ndarray]:
    """The arrays of replay.npz."""
    arrays: dict[str, np.ndarray] = {}
    for i, run in enumerate(runs):
        latent, ids = sample(model, run)
        p = run.params
        spec = {
            "method": p.sampler,
            "steps": p.steps,
            "schedule": p.schedule,
            "gamma": p.gamma,
            "cfg": p.guidance_scale,
            "sc": p.sc_cfg,
        }
        arrays[f"run{i}_spec"] = np.array("".join(f"{key}: {value}\n" for key, value in spec.items()))
        named = {"t": run.t, "z0": run.z0, "eps": run.eps, "latent": latent, "ids": ids}
        if run.cond is not None and run.mask is not None:
            named |= {"cond": run.cond, "cond_mask": run.mask.float()}
        arrays |= {f"run{i}_{name}": value.numpy() for name, value in named.items()}
    z = torch.from_numpy(arrays["run0_latent"][:2])  # where decoding calls happen: tokens of noise are near ties
    t, s = torch.linspace(0.2, 0.8, len(z)), torch.full((len(z),), runs[0].params.sc_cfg)
    with torch.no_grad():
        x, _ = model(z, torch.zeros_like(z), t, s, torch.zeros(len(z)))
        x_two, _ = model(z, x, t, s, torch.zeros(len(z)))
        _, hidden = model(z, torch.zeros_like(z), torch.ones(len(z)), s, torch.ones(len(z)))
        ids = model.discretize_logits(hidden).argmax(-1)
    forward = {"fwd_z": z, "fwd_x_prev": x, "fwd_t": t, "fwd_sc": s, "fwd_x": x_two, "dec_ids": ids}
    return arrays | {name: value.numpy() for name, value in forward.items()}


def _parameters(config: ModelConfig) -> int:
    """Weights of the blocks, which do nearly all the arithmetic."""
    h = config.hidden_size
    return config.depth * (4 * h * h + 3 * h * config.mlp_dim)
