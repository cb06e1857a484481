"""What the public API gives back."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from elf_rt.sampling.program import Timings, Written


@dataclass(frozen=True, eq=False)  # arrays have no one truth of being equal
class Result:
    """One text that is written.

    Attributes:
        text: None for a bundle without a tokenizer.
        ids: (L,) int64 token ids, those of the prompt cut off, and pad from the end of the text on.
        seed: writes the same text again, with the same prompt and parameters.
        prompt: the source text, if there was one.
        timings: what it took.
    """

    text: str | None
    ids: np.ndarray = field(repr=False)
    seed: int
    prompt: str | None
    timings: Timings

    def to_json(self) -> dict[str, Any]:
        """What ``elf-rt generate`` writes of it in a line of JSON; ids where there is no text."""
        ids = {"ids": self.ids.tolist()} if self.text is None else {}
        timings = self.timings
        ms = {
            "total": round(timings.total_ms, 3),
            "waited": round(timings.waited_ms, 3),
            "network": round(timings.network_ms, 3),
        }
        return {"input": self.prompt, "text": self.text, "seed": self.seed, **ids, "ms": ms}


@dataclass(frozen=True)
class Draft:
    """A step that is done.

    Attributes:
        step: 1 .. steps.
        steps: how many there are.
        t: time of the flow that the step reached, from 0 (noise) to 1 (text).
        texts: what each text of the batch would read now, on the steps that draft; else None.
        batch: how many texts are told of together.
    """

    step: int
    steps: int
    t: float
    texts: list[str | None] | None
    batch: int


@dataclass(frozen=True, eq=False)
class Outcome:
    """What ``Model.sample`` gives.

    Attributes:
        latents: (B, L, C) float32, z at t = 1; of size 0 where they were not asked for.
        ids: (B, L) int64, as the network gave them.
        timings: what each text took.
    """

    latents: np.ndarray
    ids: np.ndarray
    timings: tuple[Timings, ...]

    @classmethod
    def of(cls, written: Sequence[Written]) -> "Outcome":
        latents = [each.latents for each in written if each.latents is not None]
        return cls(
            np.stack(latents) if latents else np.empty(0, np.float32),
            np.stack([each.ids for each in written]),
            tuple(each.timings for each in written),
        )
