"""Text to source latents, token ids to text."""

import threading
from collections.abc import Sequence

import numpy as np

from elf_rt.bundle import Bundle
from elf_rt.errors import BackendError, BundleError, InputError, warn
from elf_rt.text.encoder import open_encoder
from elf_rt.text.tokenizer import TextTokenizer

MAX_PROMPT = 10**6  # characters: no model reads more, and tokenizers take seconds and a GB for them
MAX_SOURCE_BYTES = 1 << 26  # of latents of prompts that are kept


def _closed(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    raise BackendError("the model is closed: load it again")


class TextCodec:
    """The tokenizer and the source encoder of a bundle. threads: of an encoder that is a network."""

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        self.config = bundle.config
        self.eos_id, self.pad_id = bundle.tokenizer.eos_id, bundle.tokenizer.pad_id
        self.append_eos = bundle.tokenizer.append_eos
        self.ends_at_eos = bundle.tokenizer.ends_at_eos
        self.tokenizer: TextTokenizer | None = None
        if bundle.tokenizer.file is not None:
            self.tokenizer = TextTokenizer(bundle.path(bundle.tokenizer.file))
            known = bundle.encoder.vocab_size if bundle.encoder else bundle.config.vocab_size
            if self.tokenizer.size > known:
                raise BundleError(
                    f"{self.tokenizer.path} has {self.tokenizer.size} tokens, the model knows {known}: export again"
                )
        self._encode = open_encoder(bundle, threads)
        self._encoded_ids = bundle.encoder.vocab_size if bundle.encoder is not None else 0
        # No lru_cache of a method: its cycle would leave the encoder to a garbage collection, maybe of a forked child.
        self._sources: dict[tuple[tuple[int, ...], int], tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Free the encoder, which refuses to be called from now on."""
        if self._encode is not None:
            self._encode = _closed

    def decode(self, ids: np.ndarray) -> str | None:
        """(L,) token ids -> text without padding and special tokens; None for a bundle without a tokenizer."""
        if self.tokenizer is None:
            return None
        return self.tokenizer.decode([int(i) for i in ids if i != self.pad_id]).strip()

    @property
    def takes_prompts(self) -> bool:
        return self.config.max_input_length > 0 and self._encode is not None

    def tokenize(self, prompts: Sequence[str], length: int | None = None) -> list[list[int]]:
        """Source token ids of each prompt: no special tokens but the EOS that the model was trained with, cut to
        ``max_input_length``.

        Args:
            length: tokens of canvas; the trained length when None.

        Raises:
            InputError: the model takes no prompt, or a prompt has no token, or leaves no room for text.
        """
        length, limit = length or self.config.max_length, self.config.max_input_length
        if not self.takes_prompts:
            raise InputError("this model takes no prompt: it was exported without a text encoder")
        if self.tokenizer is None:
            raise InputError("this bundle has no tokenizer: export the checkpoint again with --tokenizer")
        if length < self.config.max_length:
            warn(
                f"a length of {length} cuts texts to {self.room(length, sourced=True)} tokens, "
                f"for {limit} are kept for the source"
            )
        sources = []
        for index, prompt in enumerate(prompts):
            try:
                prompt.encode("utf-8")
            except (AttributeError, UnicodeEncodeError) as error:
                raise InputError(f"prompt {index + 1} is not a text in UTF-8: {prompt!r}") from error
            if len(prompt) > MAX_PROMPT:
                raise InputError(f"prompt {index + 1} has {len(prompt)} characters: at most {MAX_PROMPT} are read")
            ids, _ = self.tokenizer.encode(prompt)
            if not ids or not prompt.strip():
                raise InputError(f"prompt {index + 1} has no token in it: {prompt!r}")
            if self.append_eos:
                ids = [*ids, self.eos_id]
            if len(ids) > limit:
                warn(f"prompt {index + 1} has {len(ids)} tokens and is cut to {limit}")
            sources.append(ids[:limit])
            if len(sources[-1]) >= length:
                raise InputError(f"prompt {index + 1} leaves no room for text: it has {len(ids)} tokens of {length}")
        return sources

    def encode(self, sources: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Clean source latents (B, L, C) float32, normalised, and the mask (B, L) of the positions they hold."""
        width = max(len(ids) for ids in sources)
        ids = np.full((len(sources), width), self.pad_id, np.int64)
        mask = np.zeros((len(sources), length), bool)
        for row, source in enumerate(sources):
            ids[row, : len(source)] = source
            mask[row, : len(source)] = True
        source_latents = np.zeros((len(sources), length, self.config.latent_dim), np.float32)
        source_latents[:, :width] = self.latents(ids, mask[:, :width].astype(np.int64))
        source_latents[~mask] = 0.0
        return source_latents, mask

    def source(self, ids: tuple[int, ...], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Latents (L, C) and mask (L,) of one prompt. It is encoded by itself, so they do not depend on others."""
        source = self._sources.get((ids, length))
        if source is None:
            latents, mask = self.encode([ids], length)
            source = latents[0], mask[0]
            with self._lock:
                self._sources[ids, length] = source
                if len(self._sources) * latents.nbytes > MAX_SOURCE_BYTES:
                    del self._sources[next(iter(self._sources))]
        return source

    def latents(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Clean latents (B, S, C) float32 of token ids (B, S), normalised as in training; mask (B, S) is 1 at tokens.

        Raises:
            InputError: the bundle has no encoder.
        """
        if self._encode is None:
            raise InputError("this bundle has no text encoder: export the checkpoint again with --encoder")
        if ids.max(initial=0) >= self._encoded_ids:
            raise InputError(f"the text encoder knows ids up to {self._encoded_ids - 1}, got {ids.max()}")
        return (self._encode(ids, mask) - np.float32(self.config.latent_mean)) / np.float32(self.config.latent_std)

    def room(self, length: int, *, sourced: bool) -> int:
        """Tokens of text on a canvas of `length`: with sources, length - max_input_length, as the official sampler
        cuts it."""
        return max(1, length - self.config.max_input_length) if sourced else length

    def finish(self, ids: np.ndarray, source_lengths: np.ndarray | None, ends_from: int = 0) -> np.ndarray:
        """Raw ids (B, L) -> final ids (B, room): the source shifted away, all from the first EOS on made padding, but
        not of a model whose texts go on behind an EOS.

        ends_from: the first position whose EOS ends the text.
        """
        ids = np.asarray(ids).copy()
        if source_lengths is not None:
            kept = self.room(ids.shape[1], sourced=True)
            columns = np.arange(kept)[None] + np.asarray(source_lengths)[:, None]
            ids = np.take_along_axis(ids, np.minimum(columns, ids.shape[1] - 1), axis=1)
        if not self.ends_at_eos:
            return ids
        ends = (ids == self.eos_id) & (np.arange(ids.shape[1]) >= ends_from)
        ended = np.maximum.accumulate(ends, axis=1)
        ids[ended] = self.pad_id
        return ids
