"""The presets that a bundle gets: those of arXiv 2605.10938 and its official configurations, and of public models."""

from elf_rt.params import RELEASED, ModelConfig, SamplingParams

PRESETS: dict[str, dict[str, SamplingParams]] = {
    "ELF-B": {"default": SamplingParams()},
    "ELF-M": {"default": SamplingParams(steps=64, gamma=1.0)},
    "ELF-L": {"default": SamplingParams(steps=64, gamma=1.0)},
    "conditional": {
        "default": SamplingParams(steps=64, sampler="ode", sc_cfg=1.0, guidance_scale=2.0),
    },
}

_REFINE = SamplingParams(steps=16, sampler="refine", schedule="uniform", gamma=0.0)
_REFINE_CONDITIONAL = _REFINE.replace(gamma=1.0, sc_cfg=1.0)

# Public models that sizes do not tell from the official ones. ELF-MMD, by its authors' README: perplexity 110, 43 and
# 40 at 4, 16 and 32 steps on OpenWebText (T5), accuracy 14, 34 and 35 % at 4, 16 and 64 on GSM8K. T5Gemma-2: the one
# setting that its authors give for each model.
FAMILY_PRESETS: dict[str, dict[str, SamplingParams]] = {
    "ELF-MMD": {"default": _REFINE, "fast": _REFINE.replace(steps=4), "best": _REFINE.replace(steps=32)},
    "ELF-MMD conditional": {
        "default": _REFINE_CONDITIONAL,
        "fast": _REFINE_CONDITIONAL.replace(steps=4),
        "best": _REFINE_CONDITIONAL.replace(steps=64),
    },
    "ELF on TinyGSM": {  # the teachers of the conditional students
        "default": SamplingParams(
            steps=64, sampler="ode", schedule="shift", time_shift=32.0, sc_cfg=1.0, guidance_scale=2.0
        )
    },
    "ELF-B-T5Gemma2": {"default": SamplingParams(steps=64, sc_cfg=1.0)},
    "ELF-M-T5Gemma2": {"default": SamplingParams(steps=256, sc_cfg=2.0)},
    "ELF-B-T5Gemma2distilled": {"default": SamplingParams(steps=256, sc_cfg=1.0)},
    "ELF-M-T5Gemma2distilled": {"default": SamplingParams(steps=512, sc_cfg=3.0)},
}


def presets_for(config: ModelConfig, family: str = "") -> dict[str, SamplingParams]:
    """The presets of a family; else the official ones of the model with these sizes, ELF-B's for any other."""
    if family in FAMILY_PRESETS:
        return FAMILY_PRESETS[family]
    if config.max_input_length > 0:
        return PRESETS["conditional"]
    for name, released in RELEASED.items():
        if (released.depth, released.hidden_size) == (config.depth, config.hidden_size):
            return PRESETS[name]
    return PRESETS["ELF-B"]
