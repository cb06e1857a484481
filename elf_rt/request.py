"""What a caller asks for: checked once, then made into programs for the engine."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TypeGuard

import numpy as np

from elf_rt.errors import InputError, warn
from elf_rt.params import ModelConfig, SamplingParams
from elf_rt.sampling import schedule
from elf_rt.sampling.outlook import Load
from elf_rt.sampling.program import Program, mean_rows
from elf_rt.sampling.schedule import Row
from elf_rt.text.codec import TextCodec
from elf_rt.text.pins import Pinned

MAX_SEED = 2**64
MAX_TEXTS = 10**6  # of one call: each has its place in memory from the beginning

Pins = Mapping[int, int | str] | str  # {position: token}, or a template with blanks


@dataclass(frozen=True)
class Text:
    """One text to write, beside others that may differ in everything.

    Attributes:
        prompt: the source text of a conditional model.
        seed: 0 .. 2**64 - 1; drawn at random when None, and told in the result.
        preset: of the bundle, where `params` is None.
        params: how it is drawn; ``Model.params`` makes them from a preset.
        length: tokens of canvas, up to the model's max_length; another length than the trained one changes results.
        pinned: {position: token} of the text (a token is an id, or a text of one token), or a template with blanks of
            n tokens, "The train to [2] leaves at [5]."; the rest is written around them.
    """

    prompt: str | None = None
    seed: int | None = None
    preset: str = "default"
    params: SamplingParams | None = None
    length: int | None = None
    pinned: Pins | None = None


@dataclass(frozen=True)
class Checked:
    """A text that the model can write. source: token ids of the prompt."""

    params: SamplingParams
    seed: int
    length: int
    prompt: str | None
    source: tuple[int, ...] | None
    pins: Pinned | None

    def guidance_rows(self, config: ModelConfig) -> tuple[Row, ...]:
        """Of its calls."""
        return schedule.guidance_rows(self.params, config, conditional=bool(self.source or self.pins))

    def load(self, config: ModelConfig, drafts_every: int) -> Load:
        """What it asks of the engine."""
        calls, guidance = self.params.steps + 1, len(self.guidance_rows(config))
        return Load(calls, calls, mean_rows(self.params.steps, guidance, drafts_every), self.length)

    def finish(self, codec: TextCodec, ids: np.ndarray) -> np.ndarray:
        """Final ids of the raw ids (L,) of the decoding call. No text ends before its last pin."""
        start = len(self.source or ())
        ids = ids if self.pins is None else self.pins.restore(ids, start)
        lengths = None if self.source is None else np.array([start])
        return codec.finish(ids[None], lengths, ends_from=0 if self.pins is None else len(self.pins) - 1)[0]


def check(codec: TextCodec, presets: Mapping[str, SamplingParams], text: Text) -> Checked:
    """Check a text against a model.

    Raises:
        InputError: a field is not possible; the message names it and says what is.
    """
    if not isinstance(text, Text):
        raise InputError(f"a text must be an elf_rt.Text, got {text!r}")
    check_params(text.params)
    if text.prompt is not None and not isinstance(text.prompt, str):
        raise InputError(f"prompt must be a text, got {text.prompt!r}")
    params = text.params or preset_of(presets, text.preset)
    return check_many(codec, params, text.prompt, 1, text.seed, text.length, text.pinned)[0]


def check_many(
    codec: TextCodec,
    params: SamplingParams,
    prompts: str | Sequence[str] | None,
    n: int,
    seed: int | None,
    length: int | None,
    pinned: Pins | None,
) -> list[Checked]:
    """n texts for each prompt, or n texts without one. Text k has seed ``seed + k``.

    Raises:
        InputError: n, seed, length, a prompt or a pin is not possible; the message says what is.
    """
    if not is_whole(n) or n < 1:
        raise InputError(f"n must be a whole number, 1 or more, got {n!r}")
    n = int(n)
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(prompts, Sequence | None):
        raise InputError(f"prompts must be a text or a sequence of texts, got {prompts!r}")
    total = n if prompts is None else n * len(prompts)
    if total > MAX_TEXTS:
        raise InputError(f"n must ask for at most {MAX_TEXTS} texts at once, got {total}")
    seed = check_seed(secrets.randbits(32) if seed is None else seed, total)
    length = check_length(codec.config, length)
    pins = None if pinned is None else _pins(codec, pinned, codec.room(length, sourced=prompts is not None))
    alone = Checked(params, seed, length, None, None, pins)
    if prompts is None:
        return [replace(alone, seed=seed + k) for k in range(n)]
    sources = [tuple(ids) for ids in codec.tokenize(prompts, length)]
    return [replace(alone, seed=seed + k, prompt=prompts[k // n], source=sources[k // n]) for k in range(total)]


def prepare(codec: TextCodec, texts: Sequence[Checked], drafts_every: int) -> list[Program]:
    """Programs of texts that are written together."""
    grids: dict[int, np.ndarray] = {}
    for params in {text.params for text in texts}:
        mine = [i for i, text in enumerate(texts) if text.params == params]
        seeds = np.array([texts[i].seed for i in mine], np.uint64)
        grids |= dict(zip(mine, schedule.make_grid(params, codec.config, seeds), strict=True))
    pinned = {id(text.pins): text.pins.latents(codec.latents) for text in texts if text.pins is not None}
    programs = []
    for i, text in enumerate(texts):
        source, mask = (None, None) if text.source is None else codec.source(text.source, text.length)
        if text.pins is not None:
            shape = (text.length, codec.config.latent_dim)
            source = np.zeros(shape, np.float32) if source is None else source.copy()
            mask = np.zeros(text.length, bool) if mask is None else mask.copy()
            text.pins.hold(pinned[id(text.pins)], source, mask, len(text.source or ()))
        table = schedule.make_table(text.params, codec.config, grids[i], conditional=source is not None)
        programs.append(
            Program(table, text.length, text.seed, text.params.sc_cfg, source, mask, drafts_every=drafts_every)
        )
    return programs


def preset_of(presets: Mapping[str, SamplingParams], name: str) -> SamplingParams:
    if not isinstance(name, str) or name not in presets:
        raise InputError(f"preset must be one of {', '.join(presets)}, got {name!r}")
    return presets[name]


def check_params(params: object) -> None:
    """None stands for a preset's."""
    if params is not None and not isinstance(params, SamplingParams):
        raise InputError(f"params must be SamplingParams, as Model.params makes them, got {params!r}")


def check_seed(seed: object, total: int = 1) -> int:
    """A seed for `total` texts, of which the last has seed + total - 1."""
    if not is_whole(seed) or not 0 <= seed <= MAX_SEED - total:
        raise InputError(f"seed must be a whole number between 0 and 2**64 - {total}, got {seed!r}")
    return int(seed)


def check_seeds(seeds: Sequence[int] | np.ndarray) -> list[int]:
    """A caller's seeds, at least one."""
    try:
        checked = [check_seed(seed) for seed in seeds]
    except TypeError as error:
        raise InputError(f"seeds must be a sequence of whole numbers, got {seeds!r}") from error
    if not checked:
        raise InputError("seeds must hold at least one seed")
    return checked


def check_length(config: ModelConfig, length: int | None) -> int:
    """The canvas in tokens: the trained length, or a shorter one with a warning."""
    trained = config.max_length
    if length is None:
        return trained
    if not is_whole(length) or not 1 <= length <= trained:
        raise InputError(f"length must be a whole number between 1 and {trained}, got {length!r}")
    if length != trained:
        warn(f"the model was trained on {trained} tokens; a length of {length} changes results")
    return int(length)


def check_drafts(drafts_every: object) -> None:
    if not is_whole(drafts_every) or drafts_every < 0:
        raise InputError(f"drafts_every must be a whole number, 0 or more, got {drafts_every!r}")


def is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _pins(codec: TextCodec, pinned: Pins, room: int) -> Pinned:
    if not isinstance(pinned, str | Mapping):
        raise InputError(f"pinned must be a template or {{position: token}}, got {pinned!r}")
    if not isinstance(pinned, str):
        return Pinned.from_tokens(pinned, codec.tokenizer, codec.config.vocab_size, room)
    if codec.tokenizer is None:
        raise InputError("this bundle has no tokenizer: pin token ids instead of a template")
    # Where texts end with an EOS, so does the template.
    return Pinned.from_template(pinned, codec.tokenizer, codec.eos_id if codec.append_eos else None, room)
