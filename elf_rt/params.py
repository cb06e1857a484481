"""What a model is (`ModelConfig`) and how it is sampled (`SamplingParams`): frozen, checked when made.

Sizes are those of arXiv 2605.10938 and its official configurations.
"""

import dataclasses
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Self

from elf_rt.errors import InputError

SAMPLERS = ("ode", "sde", "ab2", "refine")
KINDS: dict[Any, Any] = {int: Integral, str: str, float: Real}  # type of a field -> what it may be given
SCHEDULES = ("logit_normal", "uniform", "quantile", "shift")
LIMITS: dict[str, tuple[float, float]] = {  # bounds of ModelConfig's numbers; the others have 1 .. 65536
    "vocab_size": (2, 1 << 24),
    "max_input_length": (0, 1 << 16),
    "num_time_tokens": (0, 1 << 10),
    "num_self_cond_cfg_tokens": (0, 1 << 10),
    "num_model_mode_tokens": (0, 1 << 10),
    "noise_scale": (1e-6, 1e4),
    "t_eps": (1e-9, 1),
    "p_mean": (-100, 100),
    "p_std": (0, 100),
    "latent_mean": (-1e6, 1e6),
    "latent_std": (1e-9, 1e6),
}


def _one_of(what: str, value: object, valid: Any) -> None:
    if value not in valid:
        raise InputError(f"{what} must be one of {', '.join(valid)}, got {value!r}")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of one ELF network and the constants that its sampler needs.

    Attributes:
        depth: blocks.
        hidden_size: H, the width of the residual stream.
        num_heads: heads of attention.
        head_dim: width of a head.
        mlp_dim: inner width of a block's feed-forward part.
        latent_dim: C, the width of a latent.
        bottleneck_dim: width between a latent and the residual stream.
        vocab_size: V, token ids that the token head knows.
        max_length: L, the canvas in tokens, source included.
        max_input_length: tokens of the canvas that a source may take; 0: the model is unconditional.
        num_time_tokens: tokens before the text that tell t.
        num_self_cond_cfg_tokens: tokens that tell the self-conditioning scale s; 0: it is applied by two calls.
        num_model_mode_tokens: tokens that tell the mode, to denoise or to decode.
        self_cond: whether the network sees its own last estimate.
        decoder_head_norm: an RMSNorm before the token head.
        head_gelu: approximation of the token head's GELU, as torch and ONNX name it; "none": exact.
        noise_scale: standard deviation of the noise at t = 0.
        t_eps: least 1 - t that is divided by.
        p_mean: mean of the logit-normal time distribution of training.
        p_std: its standard deviation.
        latent_mean: mean of the encoder's latents, which are normalised by it.
        latent_std: their standard deviation.

    Raises:
        InputError: a number is out of range, or of another type.
    """

    depth: int
    hidden_size: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    latent_dim: int
    bottleneck_dim: int
    vocab_size: int
    max_length: int
    max_input_length: int = 0
    num_time_tokens: int = 4
    num_self_cond_cfg_tokens: int = 4
    num_model_mode_tokens: int = 4
    self_cond: bool = True
    decoder_head_norm: bool = False
    head_gelu: str = "tanh"
    noise_scale: float = 2.0
    t_eps: float = 0.05
    p_mean: float = -1.5
    p_std: float = 0.8
    latent_mean: float = 0.0
    latent_std: float = 0.2

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kinds = (int, float) if field.type is float else (field.type,)
            if type(value) not in kinds:
                raise InputError(f"{field.name} must be {field.type.__name__}, got {value!r}")  # type: ignore[union-attr]
            least, most = LIMITS.get(field.name, (1, 1 << 16))
            if field.type in (int, float) and not least <= value <= most:  # also refuses NaN
                raise InputError(f"{field.name} must be between {least:g} and {most:g}, got {value!r}")
        _one_of("head_gelu", self.head_gelu, ("tanh", "none"))
        if self.max_input_length >= self.max_length:
            raise InputError(f"max_input_length {self.max_input_length} must be below max_length {self.max_length}")

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens attended before the text: time, self-conditioning scale, mode."""
        return self.num_time_tokens + self.num_self_cond_cfg_tokens + self.num_model_mode_tokens


def _released(depth: int, hidden_size: int, num_heads: int, mlp_dim: int) -> ModelConfig:
    return ModelConfig(
        depth=depth,
        hidden_size=hidden_size,
        num_heads=num_heads,
        head_dim=hidden_size // num_heads,
        mlp_dim=mlp_dim,
        latent_dim=512,
        bottleneck_dim=128,
        vocab_size=32100,
        max_length=1024,
    )


RELEASED: dict[str, ModelConfig] = {
    "ELF-B": _released(12, 768, 12, 2048),
    "ELF-M": _released(24, 1056, 16, 2816),
    "ELF-L": _released(32, 1280, 16, 3413),
}


@dataclass(frozen=True)
class SamplingParams:
    """How one text is drawn. The defaults are those of ELF-B on OpenWebText.

    Attributes:
        steps: N, network calls before the decoding one, 1 .. 10000.
        sampler: "ode", "sde", "ab2" (second order) or "refine" (of models distilled to few steps).
        schedule: the time grid: "logit_normal", "uniform", "quantile" or "shift".
        guidance_scale: classifier-free guidance w; 1 needs one row of a call.
        sc_cfg: self-conditioning guidance s.
        gamma: noise of the SDE, alpha = clamp(1 - gamma * step size, 0, 1); for refine 0 keeps its noise, 1 renews it.
        temperature: factor on all noise, the start's and the SDE's.
        gamma_power: anneals gamma: gamma * (1 - t) ** gamma_power.
        grid_mean: mean of the logit-normal grid and its quantiles; None: the model's p_mean.
        grid_std: their standard deviation; None: the model's p_std.
        time_shift: of the schedule "shift": above 1, more steps near the noise.
        x_prev_scale: factor on the estimate that is fed back to the network.
        guidance_from: classifier-free guidance only where guidance_from <= t ...
        guidance_until: ... and t <= guidance_until.

    Raises:
        InputError: a value is out of range; the message names the valid ones.
    """

    steps: int = 32
    sampler: str = "sde"
    schedule: str = "logit_normal"
    guidance_scale: float = 1.0
    sc_cfg: float = 3.0
    gamma: float = 1.5
    temperature: float = 1.0
    gamma_power: float = 0.0
    grid_mean: float | None = None
    grid_std: float | None = None
    time_shift: float = 1.0
    x_prev_scale: float = 1.0
    guidance_from: float = 0.0
    guidance_until: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind = KINDS.get(field.type, Real | None)
            if isinstance(value, bool) or not isinstance(value, kind):
                raise InputError(f"{field.name} must be a {'text' if kind is str else 'number'}, got {value!r}")
        if not 1 <= self.steps <= 10_000:
            raise InputError(f"steps must be between 1 and 10000, got {self.steps}")
        _one_of("sampler", self.sampler, SAMPLERS)
        _one_of("schedule", self.schedule, SCHEDULES)
        for name in ("guidance_scale", "sc_cfg", "gamma", "temperature", "gamma_power", "x_prev_scale", "grid_std"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1e6:  # also refuses NaN
                raise InputError(f"{name} must be at least 0 and less than a million, got {value}")
        if not 0 < self.time_shift < 1e6:
            raise InputError(f"time_shift must be above 0 and less than a million, got {self.time_shift}")
        if self.grid_mean is not None and not abs(self.grid_mean) < 100:
            raise InputError(f"grid_mean must be greater than -100 and less than 100, got {self.grid_mean}")
        if not 0 <= self.guidance_from <= self.guidance_until <= 1:
            raise InputError(
                "the guidance interval must have 0 <= guidance_from <= guidance_until <= 1, "
                f"got {self.guidance_from} and {self.guidance_until}"
            )

    def replace(self, **changes: Any) -> Self:
        """A copy with the given fields changed; those given as None keep their value."""
        names = [f.name for f in dataclasses.fields(self)]
        for name in changes:
            _one_of("sampling parameter", name, names)
        return dataclasses.replace(self, **{k: v for k, v in changes.items() if v is not None})
