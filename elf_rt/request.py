"""What a caller asks for, checked once and cut into batches of bounded size."""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Self

import numpy as np

from elf_rt.errors import InputError, warn
from elf_rt.params import ModelConfig, SamplingParams
from elf_rt.sampling import schedule
from elf_rt.sampling.engine import Job
from elf_rt.text.codec import TextCodec
from elf_rt.text.pins import Pinned

# Rows x length of one network call; larger requests are cut into batches of this size. A CPU gains nothing from more,
# and its first text would come later.
TOKENS_PER_BATCH = 8192
HOST_TOKENS_PER_BATCH = 2048
MAX_SEED = 2**64

Pins = Mapping[int, int | str] | str  # {position: token}, or a template with blanks
Encoded = dict[int, tuple[np.ndarray, np.ndarray]]  # prompt -> source latents (L, C), mask (L,)


@dataclass(frozen=True)
class Batch:
    """Texts that are written together. ``done`` and ``total`` count steps x samples, before and in all."""

    job: Job
    prompts: Sequence[str] | None
    source_lengths: np.ndarray | None  # (B,)
    pins: Pinned | None
    done: int
    total: int

    def finish(self, codec: TextCodec, ids: np.ndarray) -> np.ndarray:
        """Final ids of the raw ids (B, L) of the decoding call. No text ends before its last pin."""
        if self.pins is None:
            return codec.finish(ids, self.source_lengths)
        starts = np.zeros(len(ids), int) if self.source_lengths is None else self.source_lengths
        return codec.finish(self.pins.restore(ids, starts), self.source_lengths, ends_from=len(self.pins) - 1)


@dataclass(frozen=True)
class Request:
    """n texts for each prompt, or n texts without one. Text k has seed ``seed + k``.

    sources: token ids of each prompt. length: tokens of canvas.
    """

    params: SamplingParams
    n: int
    seed: int
    length: int
    prompts: Sequence[str] | None
    sources: Sequence[Sequence[int]] | None
    pins: Pinned | None

    @classmethod
    def make(
        cls,
        codec: TextCodec,
        params: SamplingParams,
        prompts: str | Sequence[str] | None,
        n: int,
        seed: int | None,
        length: int | None,
        pinned: Pins | None,
    ) -> Self:
        """Check a request.

        Raises:
            InputError: n, seed, length, a prompt or a pin is not possible; the message says what is.
        """
        if not is_whole(n) or n < 1:
            raise InputError(f"n must be a whole number, 1 or more, got {n!r}")
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(prompts, Sequence | None):
            raise InputError(f"prompts must be a text or a sequence of texts, got {prompts!r}")
        total = n if prompts is None else n * len(prompts)
        seed = secrets.randbits(32) if seed is None else seed
        if not is_whole(seed) or not 0 <= seed <= MAX_SEED - total:
            raise InputError(f"seed must be a whole number between 0 and 2**64 - {total}, got {seed!r}")
        length = check_length(codec.config, length)
        sources = None if prompts is None else codec.tokenize(prompts)
        room = codec.room(length, sourced=prompts is not None)
        pins = None if pinned is None else _pins(codec, pinned, room)
        return cls(params, n, seed, length, prompts, sources, pins)

    def batches(self, codec: TextCodec, max_rows: int, drafts_every: int = 0) -> Iterator[Batch]:
        """The jobs, each made when it is needed. max_rows: the most of one network call."""
        config = codec.config
        total = self.n if self.prompts is None else self.n * len(self.prompts)
        conditional = self.sources is not None or self.pins is not None
        rows = schedule.guidance_rows(self.params, config, conditional=conditional)
        size = max(1, max_rows // len(rows))
        encoded: Encoded = {}
        for start in range(0, total, size):
            index = range(start, min(total, start + size))
            seeds = np.array([self.seed + i for i in index], np.uint64)
            source, mask, lengths = self._hold(codec, [i // self.n for i in index], encoded)
            grid = schedule.make_grid(self.params, config, seeds)
            table = schedule.make_table(self.params, config, grid, conditional=conditional)
            yield Batch(
                Job(table, self.length, seeds, self.params.sc_cfg, source, mask, drafts_every=drafts_every),
                None if self.prompts is None else [self.prompts[i // self.n] for i in index],
                lengths,
                self.pins,
                start * self.params.steps,
                total * self.params.steps,
            )

    def _hold(
        self, codec: TextCodec, prompts: list[int], encoded: Encoded
    ) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
        """Source latents (B, L, C), mask (B, L) and source lengths (B,) of samples of these prompts.

        ``encoded`` keeps the prompts of the last batch, so that each is encoded once however many texts it gets.
        """
        source = mask = lengths = None
        if self.sources is not None:
            new = sorted(set(prompts) - encoded.keys())
            for old in encoded.keys() - set(prompts):
                del encoded[old]
            if new:
                latents, masks = codec.encode([self.sources[p] for p in new], self.length)
                encoded |= {p: (latents[i], masks[i]) for i, p in enumerate(new)}
            source, mask = (np.stack(held) for held in zip(*(encoded[p] for p in prompts), strict=True))
            lengths = np.array([len(self.sources[p]) for p in prompts])
        if self.pins is not None:
            if source is None or mask is None:
                source = np.zeros((len(prompts), self.length, codec.config.latent_dim), np.float32)
                mask = np.zeros((len(prompts), self.length), bool)
            starts = np.zeros(len(prompts), int) if lengths is None else lengths
            source, mask = self.pins.hold(codec.latents, source, mask, starts)
        return source, mask, lengths


def check_length(config: ModelConfig, length: int | None) -> int:
    """The canvas in tokens: the trained length, or a shorter one with a warning."""
    trained = config.max_length
    if length is None:
        return trained
    if not is_whole(length) or not 1 <= length <= trained:
        raise InputError(f"length must be a whole number between 1 and {trained}, got {length!r}")
    if length == trained:
        return trained
    warn(f"the model was trained on {trained} tokens; a length of {length} changes results")
    return length


def is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _pins(codec: TextCodec, pinned: Pins, room: int) -> Pinned:
    if not isinstance(pinned, str):
        return Pinned.from_tokens(pinned, codec.tokenizer, codec.config.vocab_size, room)
    if codec.tokenizer is None:
        raise InputError("this bundle has no tokenizer: pin token ids instead of a template")
    # Where texts end with an EOS, so does the template.
    return Pinned.from_template(pinned, codec.tokenizer, codec.eos_id if codec.append_eos else None, room)
