"""How large the tensors of a model get, measured by running the reference.

Letters: R rows, S = prefix + text tokens, D head width, H hidden, C latent width.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elf_rt.errors import CheckpointError
from elf_rt.export import rewrite
from elf_rt.export.precision import Precision
from elf_rt.export.reference import ELF
from elf_rt.export.replay import Run, sample

TORCH_TYPE = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}


@dataclass
class Range:
    """Statistics of one tensor, per channel, over every token of every measured call.

    maximum: largest magnitude; of a GEMM's output, the sum of the magnitudes of its terms, which no partial sum
    exceeds in whatever order it is added up. rms: root mean square. typical: (mean sqrt|x|)^2, which a few huge tokens
    hardly move.
    """

    maximum: np.ndarray
    _squares: np.ndarray
    _roots: np.ndarray
    _count: int

    @property
    def rms(self) -> np.ndarray:
        return np.sqrt(self._squares / self._count)

    @property
    def typical(self) -> np.ndarray:
        return np.square(self._roots / self._count)

    def include(self, other: "Range") -> None:
        self.maximum = np.maximum(self.maximum, other.maximum)  # keeps NaN
        self._squares = self._squares + other._squares
        self._roots = self._roots + other._roots
        self._count += other._count


@dataclass
class Ranges:
    """Everything measured, by the names of `elf_rt.export.precision`.

    logits: largest sum of magnitudes of a logit's terms, over the decode calls. head_agreement: share of decoded
    tokens that stay the same when the unembedding alone runs in that type; empty when no decode call was seen.
    ids: (B, L) what each run wrote.
    """

    tensors: dict[str, Range] = field(default_factory=dict)
    logits: float = 0.0
    ids: list[Tensor] = field(default_factory=list)
    _head_hits: dict[Precision, int] = field(default_factory=dict)
    _head_tokens: int = 0

    @property
    def head_agreement(self) -> dict[Precision, float]:
        return {precision: hits / self._head_tokens for precision, hits in self._head_hits.items()}

    def include(self, name: str, values: Tensor, maximum: Tensor | None = None) -> None:
        """values (..., channels); maximum (channels,) where it is not simply that of the values."""
        magnitude = values.detach().abs().reshape(-1, values.shape[-1])  # (tokens, channels)
        largest = magnitude.amax(0) if maximum is None else maximum
        squares, roots = magnitude.square().sum(0), magnitude.sqrt().sum(0)
        new = Range(_double(largest), _double(squares), _double(roots), len(magnitude))
        if name in self.tensors:
            self.tensors[name].include(new)
        else:
            self.tensors[name] = new

    def include_head(self, model: ELF, hidden: Tensor) -> None:
        """hidden (R, L, H) of decoded texts."""
        features = model.head_features(hidden)  # (R, L, C)
        self.logits = float(np.maximum(self.logits, float(largest_sums(features, model.unembed_kernel.T).max())))
        expected = (features @ model.unembed_kernel + model.unembed_bias).argmax(-1)  # (R, L)
        for precision, kind in TORCH_TYPE.items():
            rounded = (features.to(kind).float() @ model.unembed_kernel.to(kind).float()).to(kind).float()
            hits = int(((rounded + model.unembed_bias).argmax(-1) == expected).sum())
            self._head_hits[precision] = self._head_hits.get(precision, 0) + hits
        self._head_tokens += expected.numel()


def _double(x: Tensor) -> np.ndarray:
    return x.double().numpy()


def measure_ranges(model: ELF, runs: Iterable[Run]) -> Ranges:
    """Sample every run with the float32 reference and watch its tensors.

    Raises CheckpointError: a tensor is not finite in float32 already.
    """
    with watch(model) as ranges:
        for run in runs:
            ranges.ids.append(sample(model, run)[1])
    for name, tensor in ranges.tensors.items():
        if not np.isfinite(tensor.maximum).all():
            raise CheckpointError(f"{name} overflows in float32: the checkpoint is broken, take an earlier one")
    return ranges


@contextmanager
def watch(model: ELF) -> Iterator[Ranges]:
    """Ranges of all calls made to `model` inside the context."""
    ranges = Ranges()
    with ExitStack() as stack:
        for module, hook in _hooks(model, ranges):
            stack.callback(module.register_forward_hook(torch.no_grad()(hook)).remove)
        yield ranges


def largest_sums(x: Tensor, weight: Tensor) -> Tensor:
    """(outputs,): the largest sum of |terms| of x @ weight.T, weight (outputs, inputs), over all tokens of x."""
    return F.linear(x.abs(), weight.abs()).reshape(-1, len(weight)).amax(0)


Hook = Callable[[Any, Any, Any], None]


def _hooks(model: ELF, ranges: Ranges) -> Iterator[tuple[nn.Module, Hook]]:
    def on(*parts: str) -> Hook:
        """Watch the product of a linear layer, without its bias: equal slices of it under `parts`."""

        def hook(layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
            sums = largest_sums(inputs[0], layer.weight).chunk(len(parts))
            for name, values, maximum in zip(parts, (output - layer.bias).chunk(len(parts), -1), sums, strict=True):
                ranges.include(name, values, maximum)

        return hook

    def entering(name: str, offset: Tensor | float = 0.0) -> Hook:
        """Watch the input of a layer, less `offset`."""
        return lambda _, inputs, __: ranges.include(name, inputs[0] - offset)

    blocks: Any = model.blocks  # nn.Module's attributes have no types
    for i, block in enumerate(blocks):
        attn, mlp = f"blocks.{i}.attn", f"blocks.{i}.mlp"
        yield block.attn.qkv, on(f"{attn}.q", f"{attn}.k", f"{attn}.v")
        yield block.attn.q_norm, _norms(ranges, f"{attn}.q_norm")
        yield block.attn.k_norm, _norms(ranges, f"{attn}.k_norm")
        # The graphs keep the bias of v out of attention.
        yield block.attn.proj, entering(f"{attn}.mix", block.attn.qkv.bias.detach().chunk(3)[2])
        yield block.attn.proj, on(f"{attn}.proj")
        yield block.mlp.w12, on(f"{mlp}.a", f"{mlp}.b")
        yield block.mlp.w3, entering(f"{mlp}.product")
        yield block.mlp.w3, on(f"{mlp}.w3")
    yield model.text_proj["proj2"], on("text_proj.proj2")
    yield model.final_layer["linear"], on("final_layer.linear")
    yield model, _on_call(model, ranges)


def _norms(ranges: Ranges, name: str) -> Hook:
    """Lengths of the normed queries or keys (R, heads, S, D): rotary does not change them, and they bound q.k."""

    def hook(_: nn.Module, __: tuple[Tensor], output: Tensor) -> None:
        ranges.include(name, output.norm(dim=-1).amax(dim=2))  # (R, heads)

    return hook


def _on_call(model: ELF, ranges: Ranges) -> Hook:
    """Watch the network's inputs through the merged input projection, and the token head on decode calls."""
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    merged = rewrite.input_projection(model.config, state)
    weight = torch.from_numpy(merged.weight.T.copy())  # (bottleneck, C or 2C)

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Tensor]) -> None:
        z, x_prev, _t, _s, mode = inputs
        x = torch.cat([z, x_prev], dim=-1) if model.config.self_cond else z
        ranges.include("text_proj.input", x)
        ranges.include("text_proj.proj1", F.linear(x, weight), largest_sums(x, weight))
        if mode is not None and bool((mode == 1).all()):
            ranges.include_head(model, outputs[1])

    return hook
