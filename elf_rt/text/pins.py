"""Pinned spans: tokens of the text that are given, and held like source positions while the rest is written.

A template such as "The train to [2] leaves at [5]." pins its words and leaves blanks of 2 and of 5 tokens. Positions
count from the first token of the text, after the source where there is one.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Self

import numpy as np

from elf_rt.errors import InputError
from elf_rt.text.encoder import Encoder
from elf_rt.text.tokenizer import TextTokenizer

BLANK = re.compile(r"\s*\[(\d+)\]")  # white space before a blank is the blank's: a word carries its leading space
MAX_DIGITS = 9  # no canvas has as many tokens
FILLER = "\ue000"  # a private-use character, so no tokenizer has merged it with its neighbours


@dataclass(frozen=True)
class Pinned:
    """ids: (S,) int64, mask: (S,) bool, true where the token is pinned. Free positions have id 0.

    Raises:
        InputError: nothing is pinned.
    """

    ids: np.ndarray
    mask: np.ndarray

    def __post_init__(self) -> None:
        if not self.mask.any():
            raise InputError("nothing is pinned: give at least one token")

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def from_tokens(
        cls, tokens: Mapping[int, int | str], tokenizer: TextTokenizer | None, vocab_size: int, room: int
    ) -> Self:
        """Pins of {position: token}; a token is an id, or a text that is one token.

        Args:
            room: tokens that a text has place for.

        Raises:
            InputError: a position is not in the text, a text is not one token, an id is not in the vocabulary.
        """
        for position in tokens:
            if not isinstance(position, Integral) or not 0 <= position < room:
                raise InputError(f"a pinned position must be between 0 and {room - 1}, got {position!r}")
        size = 1 + max(tokens, default=-1)
        ids, mask = np.zeros(size, np.int64), np.zeros(size, bool)
        for position, token in tokens.items():
            number = _token_id(token, tokenizer) if isinstance(token, str) else token
            if not isinstance(number, Integral) or not 0 <= number < vocab_size:
                raise InputError(f"a pinned token id must be between 0 and {vocab_size - 1}, got {number!r}")
            ids[position], mask[position] = number, True
        return cls(ids, mask)

    @classmethod
    def from_template(cls, template: str, tokenizer: TextTokenizer, eos_id: int | None, room: int) -> Self:
        """Pins of a template: ``[n]`` is a blank of n tokens, everything else is pinned.

        Args:
            eos_id: pinned after the template, so that the text ends there; None lets the model write on.
            room: tokens that a text has place for.

        Raises:
            InputError: a blank has no length or stands inside a token, there is nothing but blanks, or no room.
        """
        blanks = [int(n[:MAX_DIGITS]) for n in BLANK.findall(template)]
        if not blanks and eos_id is not None:  # nothing would be left to write
            raise InputError(f"a template needs a blank such as [2], which stands for two tokens: {template!r}")
        if 0 in blanks:
            raise InputError(f"a blank needs at least one token, got [0] in {template!r}")
        if sum(blanks) > room:  # a list of so many would fill the memory
            raise InputError(f"the blanks need {sum(blanks)} tokens, but a text has room for {room}")
        text = BLANK.sub(FILLER, template)
        fillers = [i for i, char in enumerate(text) if char == FILLER]
        if len(fillers) != len(blanks):
            raise InputError(f"a template must not have the character U+E000: {template!r}")
        ids: list[int] = []
        mask: list[bool] = []
        seen: set[int] = set()
        for token, (start, end) in zip(*tokenizer.encode(text), strict=True):
            covered = [i for i in fillers if start <= i < end]
            if not covered:
                ids.append(token)
                mask.append(True)
                continue
            if end - start > 1:
                raise InputError(f"blank {fillers.index(covered[0]) + 1} stands inside a token: put a space around it")
            if covered[0] not in seen:  # a character may be several tokens, one for each of its bytes
                seen.add(covered[0])
                length = blanks[fillers.index(covered[0])]
                ids += [0] * length
                mask += [False] * length
        if len(seen) != len(blanks):
            raise InputError(f"this tokenizer cannot place the blanks of {template!r}: pin tokens by position instead")
        if eos_id is not None:
            ids.append(eos_id)
            mask.append(True)
        if len(ids) > room:
            raise InputError(f"the pinned text needs {len(ids)} tokens, but a text has room for {room}")
        return cls(np.array(ids, np.int64), np.array(mask))

    def latents(self, encode: Encoder) -> np.ndarray:
        """(S, C) normalised latents of the pins. They are encoded apart from the source, as texts are in training, with
        free positions masked out."""
        return encode(self.ids[None], self.mask[None].astype(np.int64))[0]

    def hold(self, latents: np.ndarray, source: np.ndarray, mask: np.ndarray, start: int) -> None:
        """Add the pins to what a text holds, in place.

        Args:
            latents: (S, C) of the pins.
            source, mask: (L, C) clean latents and (L,) bool where they stand; zeros and False without a source.
            start: where the text begins.
        """
        columns = start + np.flatnonzero(self.mask)
        source[columns] = latents[self.mask]
        mask[columns] = True

    def restore(self, ids: np.ndarray, start: int) -> np.ndarray:
        """Ids (L,) of the decoding call with the pinned tokens in their places: they come back verbatim."""
        ids = ids.copy()
        ids[start + np.flatnonzero(self.mask)] = self.ids[self.mask]
        return ids


def _token_id(text: str, tokenizer: TextTokenizer | None) -> int:
    if tokenizer is None:
        raise InputError("this bundle has no tokenizer: pin token ids instead of texts")
    ids, _ = tokenizer.encode(text)
    if len(ids) != 1:
        raise InputError(f"{text!r} is {len(ids)} tokens, not one: pin each at its own position, or use a template")
    return int(ids[0])
