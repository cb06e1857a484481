"""The public API: ``load`` a bundle, ``generate`` text, ``stream`` it, or ``sample`` latents with everything given."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from elf_rt.backends import open_backend
from elf_rt.bundle import Bundle
from elf_rt.errors import BackendError, InputError
from elf_rt.machine import check_threads
from elf_rt.params import SamplingParams
from elf_rt.request import HOST_TOKENS_PER_BATCH, TOKENS_PER_BATCH, Batch, Pins, Request, check_length, is_whole
from elf_rt.sampling import integrator, schedule
from elf_rt.sampling.engine import HostSampler, Job, Outcome, StepDone
from elf_rt.text.codec import TextCodec


@dataclass(frozen=True)
class Timings:
    """Milliseconds of the batch that a text was written in."""

    total_ms: float
    network_ms: float
    integrator_ms: float
    batch: int
    calls: int


@dataclass(frozen=True)
class Result:
    """One text. ids: (L,) int64 final token ids; text is None for a bundle without a tokenizer."""

    text: str | None
    ids: np.ndarray = field(repr=False)
    seed: int
    prompt: str | None
    timings: Timings


@dataclass(frozen=True)
class Draft:
    """A step of a stream. texts: what each sample would read now, on the steps that draft, else None. batch: how many
    are written together."""

    step: int
    steps: int
    t: float
    texts: list[str | None] | None
    batch: int


def load(
    path: str | Path, backend: str = "auto", *, precision: str = "auto", threads: int | None = None, check: bool = False
) -> "Model":
    """Open a bundle.

    Args:
        path: the folder ``name.elfrt`` that ``elf-rt export`` wrote.
        backend: "auto", or a name that ``elf-rt doctor`` lists.
        precision: "auto", fp32, bf16, fp16 or int8, as the backend allows.
        threads: CPU threads, from 1 to 4 for each core; one for each core by default. Of the integrator, all models of
            the process have as many as the last one that was loaded.
        check: verify the sha256 of every file now, not only of those that are used.

    Raises:
        BundleError, BackendError, InputError: with one line that says how to mend it.
    """
    bundle = Bundle.open(path)
    if check:
        bundle.check()
    return Model(bundle, *open_backend(bundle, backend, precision, threads), threads)


def _reopen(folder: Path, backend: str, precision: str, threads: int | None) -> "Model":
    return load(folder, backend, precision=precision, threads=threads)


class Model:
    """A loaded model. Safe to share between threads; ``close()`` it, or use it as a context manager."""

    def __init__(self, bundle: Bundle, backend: Any, reason: str, threads: int | None = None) -> None:
        self.bundle = bundle
        self.config = bundle.config
        self.backend = backend
        self.backend_reason = reason
        self.codec = TextCodec(bundle, backend.encode)
        self._sampler: Any = _make_sampler(backend, bundle)
        self._closed = False
        self._threads, self._folder = threads, bundle.folder.resolve()
        integrator.set_threads(check_threads(threads))

    def params(self, preset: str = "default", **overrides: Any) -> SamplingParams:
        """The bundle's preset with some values changed (None keeps the preset's)."""
        if preset not in self.bundle.presets:
            raise InputError(f"preset must be one of {', '.join(self.bundle.presets)}, got {preset!r}")
        return self.bundle.presets[preset].replace(**overrides)

    def generate(
        self,
        prompts: str | Sequence[str] | None = None,
        n: int = 1,
        *,
        seed: int | None = None,
        preset: str = "default",
        length: int | None = None,
        pinned: Pins | None = None,
        on_step: Callable[[int, int], None] | None = None,
        **overrides: Any,
    ) -> list[Result]:
        """Write n texts for each prompt, or n texts without one.

        Result k has seed ``seed + k``, and its text depends on that seed, its prompt and the sampling parameters
        alone: not on the batch or its place in it. So any result can be had again by itself.

        Args:
            seed: 0 .. 2**64 - 1; drawn at random when None, and told in the results.
            length: tokens of canvas, up to the model's max_length; another length than the trained one changes results.
            pinned: {position: token} of the text (a token is an id, or a text of one token), or a template with blanks
                of n tokens, "The train to [2] leaves at [5]."; the rest is written around them.
            on_step: called after each step with (steps done, all to do), summed over the texts.
            **overrides: fields of SamplingParams, such as steps=16.

        Returns:
            len(prompts) * n results, the n of the first prompt first.
        """
        results: list[Result] = []
        request = Request.make(self.codec, self.params(preset, **overrides), prompts, n, seed, length, pinned)
        for batch in request.batches(self.codec, self._max_rows(request.length)):
            for event in self._open_sampler.run(batch.job):
                if isinstance(event, Outcome):
                    results += self._results(batch, event)
                elif on_step is not None:
                    on_step(batch.done + event.step * len(batch.job.seeds), batch.total)
        return results

    def stream(
        self,
        prompts: str | Sequence[str] | None = None,
        n: int = 1,
        *,
        seed: int | None = None,
        preset: str = "default",
        length: int | None = None,
        pinned: Pins | None = None,
        drafts_every: int = 4,
        **overrides: Any,
    ) -> Iterator[Draft | list[Result]]:
        """Like ``generate``, step by step: a Draft after each step, each batch's results after its last.

        Every ``drafts_every`` steps (0: never) the current estimate is decoded, which costs one more network call.
        Stop iterating (or close the iterator) to cancel.
        """
        if not is_whole(drafts_every) or drafts_every < 0:
            raise InputError(f"drafts_every must be a whole number, 0 or more, got {drafts_every!r}")
        request = Request.make(self.codec, self.params(preset, **overrides), prompts, n, seed, length, pinned)
        for batch in request.batches(self.codec, self._max_rows(request.length), drafts_every):
            for event in self._open_sampler.run(batch.job):
                if isinstance(event, Outcome):
                    yield self._results(batch, event)
                else:
                    yield self._draft(batch, event)

    def sample(
        self,
        *,
        z0: np.ndarray | None = None,
        grid: np.ndarray | None = None,
        eps: np.ndarray | None = None,
        source: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        seeds: Sequence[int] | np.ndarray = (0,),
        params: SamplingParams | None = None,
        length: int | None = None,
        latents: bool = True,
    ) -> Outcome:
        """The sampler with everything given, below text: what ``elf-rt verify`` replays.

        Args:
            z0: (B, L, C) the start, noise scale applied; drawn from ``seeds`` when None.
            grid: (N + 1,) or (B, N + 1) times from 0 to 1; drawn from ``seeds`` when None.
            eps: (N, B, L, C) unit noise, eps[i] for step i, or fewer where the last have none (N - 1 for the SDE);
                drawn from ``seeds`` when None.
            source, mask: (B, L, C) normalised source latents and (B, L) where they stand.
            latents: False where only the ids are of use: it saves a copy from the GPU.

        Returns:
            latents (B, L, C) at t = 1 and ids (B, L) as the decoding call gave them, with timings.
        """
        params = params or self.params()
        seeds = np.asarray(seeds, np.uint64)
        batch = len(seeds) if z0 is None else len(z0)
        seeds = np.repeat(seeds, batch) if len(seeds) == 1 else seeds
        length = check_length(self.config, length if z0 is None else z0.shape[1])
        mask = None if mask is None else np.asarray(mask, bool)
        shape = (batch, length, self.config.latent_dim)
        _check_shape("seeds", seeds, (batch,))
        _check_shape("z0", z0, shape)
        _check_shape("source", source, shape)
        _check_shape("mask", mask, shape[:2])
        if (source is None) != (mask is None):
            raise InputError("source and mask go together: give both or neither")
        grid = schedule.make_grid(params, self.config, seeds) if grid is None else schedule.check_grid(grid)
        grid = np.repeat(grid, batch, axis=0) if len(grid) == 1 else grid
        _check_shape("grid", grid, (batch, grid.shape[1]))
        table = schedule.make_table(params, self.config, grid, conditional=source is not None)
        noisy = table.noisy_steps
        _check_shape("eps", eps if eps is None else eps[:noisy], (noisy, *shape))
        job = Job(table, length, seeds, params.sc_cfg, source, mask, z0, eps, latents=latents)
        return next(event for event in self._open_sampler.run(job) if isinstance(event, Outcome))

    def close(self) -> None:
        """Free the engine's memory. The model cannot be used after it."""
        if not self._closed:
            self._closed = True
            self._sampler.close()
            self.backend.close()

    def __repr__(self) -> str:
        return f"Model({str(self.bundle.folder)!r}, {self.backend_reason})"

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickled model is a path: whoever unpickles it, in another process, opens the bundle again."""
        if self._closed:
            raise BackendError("the model is closed: load it again, or send the bundle's path instead")
        return _reopen, (self._folder, self.backend.name, self.backend.precision, self._threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def _open_sampler(self) -> Any:
        if self._closed:
            raise BackendError("the model is closed: load it again")
        return self._sampler

    def _max_rows(self, length: int) -> int:
        """The most rows of one network call: what is worth putting together, or fewer where the engine takes fewer."""
        worth = (TOKENS_PER_BATCH if self.backend.device == "cuda" else HOST_TOKENS_PER_BATCH) // length
        limit = getattr(self.backend, "max_rows", None)
        return worth if limit is None else min(worth, int(limit(length)) or worth)  # 0: no plan, as the call will tell

    def _results(self, batch: Batch, outcome: Outcome) -> list[Result]:
        ids = batch.finish(self.codec, outcome.ids)
        timings = Timings(
            outcome.seconds * 1e3,
            outcome.network_seconds * 1e3,
            outcome.integrator_seconds * 1e3,
            len(ids),
            outcome.calls,
        )
        return [
            Result(self.codec.decode(row), row, int(seed), None if batch.prompts is None else batch.prompts[i], timings)
            for i, (row, seed) in enumerate(zip(ids, batch.job.seeds, strict=True))
        ]

    def _draft(self, batch: Batch, event: StepDone) -> Draft:
        texts = None
        if event.draft is not None:
            texts = [self.codec.decode(row) for row in batch.finish(self.codec, event.draft)]
        return Draft(event.step, batch.job.table.num_steps, event.t, texts, len(batch.job.seeds))


def _check_shape(name: str, array: np.ndarray | None, want: tuple[int, ...]) -> None:
    if array is not None and array.shape != want:
        raise InputError(f"{name} must have shape {want}, got {array.shape}")


def _make_sampler(backend: Any, bundle: Bundle) -> Any:
    if backend.device == "cuda":
        from elf_rt.device.sampler import DeviceSampler

        return DeviceSampler(backend, bundle.config)
    return HostSampler(backend, bundle.config.latent_dim)
