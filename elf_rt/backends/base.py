"""What a backend is: one engine library behind two small protocols."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from elf_rt.errors import BackendError
from elf_rt.params import ModelConfig

DISCRETIZED_TOKENS = 256  # positions whose logits, each V wide, are in memory at the same time


class BoundNetwork(Protocol):
    """The network bound to R rows of length L. Its arrays are the engine's own buffers: write the inputs in place,
    call ``denoise``, read ``x``. Used by one thread at a time.

    z, x: (R, L, C) float32. x_prev: (R, L, C) or None for a model without self-conditioning.
    t: (R,). s: (R,) self-conditioning guidance scale, or None. mode: (R,) 0 denoise, 1 decode, or None.
    """

    z: np.ndarray
    x: np.ndarray
    x_prev: np.ndarray | None
    t: np.ndarray
    s: np.ndarray | None
    mode: np.ndarray | None

    def denoise(self) -> None:
        """One network call: fills ``x`` and keeps the hidden state for ``discretize``."""
        ...

    def discretize(self) -> np.ndarray:
        """(R, L) int64 token ids of the hidden state of the last ``denoise``."""
        ...

    def close(self) -> None: ...


class Backend(Protocol):
    """An engine library with one model loaded in one precision. Safe to share between threads."""

    name: str
    precision: str
    device: str  # "cpu" or "cuda"

    def bind(self, rows: int, length: int) -> BoundNetwork:
        """Buffers and engine state for calls of this shape."""
        ...

    def encode(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """(B, S) int64 ids and mask -> (B, S, C) float32 latents of the bundle's encoder.onnx, not normalised."""
        ...

    def describe(self) -> Mapping[str, str]:
        """Library, version, precision, threads: what ``elf-rt bench`` prints."""
        ...

    def close(self) -> None: ...


def check_widths(name: str, config: ModelConfig, widths: Mapping[str, int]) -> None:
    """Raises BackendError when the denoiser's outputs "x" and "hidden" do not have the sizes of the manifest."""
    for output, want in (("x", config.latent_dim), ("hidden", config.hidden_size)):
        if widths[output] != want:
            raise BackendError(
                f"{name}: the graphs do not have the sizes of the manifest ({output} is {widths[output]} wide, "
                f"not {want}): export the checkpoint again"
            )


def token_slices(tokens: int) -> list[slice]:
    """Pieces of all R·L tokens that a host backend discretizes one after the other."""
    return [slice(start, min(start + DISCRETIZED_TOKENS, tokens)) for start in range(0, tokens, DISCRETIZED_TOKENS)]
