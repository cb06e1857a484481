"""The public API: ``load`` a bundle, ``generate`` or ``write`` texts, ``stream`` or ``submit`` them, or ``sample``
latents with everything given."""

import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from elf_rt.backends import open_backend
from elf_rt.bundle import Bundle
from elf_rt.engine import running_engine
from elf_rt.errors import BackendError, InputError
from elf_rt.forking import keep_in_child
from elf_rt.machine import check_threads
from elf_rt.network import Backend
from elf_rt.params import SamplingParams
from elf_rt.pending import EventStream, Pending, by_group
from elf_rt.request import (
    Checked,
    Pins,
    Text,
    check,
    check_drafts,
    check_length,
    check_many,
    check_params,
    check_seeds,
    is_whole,
    prepare,
    preset_of,
)
from elf_rt.results import Draft, Outcome, Result
from elf_rt.sampling import integrator
from elf_rt.sampling.driver import CLOSED, Driver
from elf_rt.sampling.given import as_floats, make_programs
from elf_rt.sampling.outlook import Load, Outlook
from elf_rt.sampling.program import Event, Program, Stats, StepDone, Timings, Written
from elf_rt.sampling.schedule import Table
from elf_rt.text.codec import TextCodec

__all__ = ["Draft", "Model", "Outcome", "Pending", "Result", "Stats", "Text", "Timings", "load"]

WARM_SECONDS = 10.0  # of a model that is warmed up
WARM_STEPS = 6
WARM_TEXTS = 64


def load(
    path: str | Path,
    backend: str = "auto",
    *,
    precision: str = "auto",
    threads: int | None = None,
    max_rows: int | None = None,
    check: bool = False,
) -> "Model":
    """Open a bundle.

    Args:
        path: the folder ``name.elfrt`` that ``elf-rt export`` wrote.
        backend: "auto", or a name that ``elf-rt doctor`` lists.
        precision: "auto", fp32, bf16, fp16 or int8, as the backend allows.
        threads: CPU threads, from 1 to 4 for each core; one for each core by default.
        max_rows: the most rows of one network call; by default as many as were measured to pay.
        check: verify the sha256 of every file now, not only of those that are used.

    Raises:
        BundleError: there is no bundle, or a file of it is missing or altered.
        BackendError: no engine library here can run it as asked.
        InputError: an argument is not possible; the message names what is.
    """
    if max_rows is not None and (not is_whole(max_rows) or max_rows < 1):
        raise InputError(f"max_rows must be a whole number, 1 or more, got {max_rows!r}")
    bundle = Bundle.open(path)
    if check:
        bundle.check()
    return Model(
        bundle, lambda opened: open_backend(opened, backend, precision, threads), threads=threads, max_rows=max_rows
    )


class Model(AbstractContextManager["Model"]):
    """A loaded model, as ``load`` gives it. Safe to share between threads, whose texts share network calls; ``close()``
    it, or use it as a context manager.

    Attributes:
        bundle: the opened bundle; ``bundle.presets`` are its presets by name.
        config: sizes of the network.
        backend: the engine library; ``backend.name`` and ``backend.precision`` say which.
        backend_reason: one sentence that says why it was chosen.
        codec: tokens from text and text from tokens.
    """

    def __init__(
        self,
        bundle: Bundle,
        open_backend: Callable[[Bundle], tuple[Backend, str]],
        *,
        threads: int | None = None,
        max_rows: int | None = None,
    ) -> None:
        self._open, self._threads, self._max_rows = open_backend, threads, max_rows
        self._folder = bundle.folder.resolve()
        self._restarting = threading.Lock()  # of a forked child, whose threads may ask all at once
        self._start(bundle)

    def _start(self, bundle: Bundle) -> None:
        self.bundle, self.config = bundle, bundle.config
        integrator.set_threads(check_threads(self._threads))
        self.backend, self.backend_reason = backend, _ = self._open(bundle)
        self.codec = TextCodec(bundle, self._threads)
        driver = Driver(running_engine(backend, bundle.config, self._max_rows), bundle.config.max_length)
        keep_in_child(backend, self.codec, driver)
        self._finalizer = weakref.finalize(self, driver.close)
        self._driver = driver

    def params(self, preset: str = "default", **overrides: Any) -> SamplingParams:
        """The bundle's preset with some values changed (None keeps the preset's).

        Raises:
            InputError: there is no such preset or field, or a value is out of range.
        """
        return preset_of(self.bundle.presets, preset).replace(**overrides)

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
        alone: not on what is written beside it. So any result can be had again by itself.

        Args:
            prompts: source texts of a conditional model.
            n: texts for each prompt.
            seed: of the first text, 0 .. 2**64 - 1; drawn at random when None, and told in the results.
            preset: of the bundle; ``overrides`` change it.
            length: see ``Text``.
            pinned: see ``Text``.
            on_step: called after each step with (steps done, all to do), summed over the texts.
            **overrides: fields of SamplingParams, such as steps=16.

        Returns:
            len(prompts) * n results, the n of the first prompt first.

        Raises:
            InputError: an argument is not possible; the message names what is.
            BackendError: a call failed, or the model is closed.
        """
        params = self.params(preset, **overrides)
        texts = check_many(self.codec, params, prompts, n, seed, length, pinned)
        return self._write(texts, on_step)

    def write(self, texts: Sequence[Text], on_step: Callable[[int, int], None] | None = None) -> list[Result]:
        """Write texts with different prompts, parameters and lengths side by side, and return them in their order.

        ``on_step`` and what is raised are those of ``generate``.
        """
        if isinstance(texts, Text) or not isinstance(texts, Iterable):
            raise InputError(f"texts must be a sequence of elf_rt.Text, got {texts!r}")
        return self._write([check(self.codec, self.bundle.presets, text) for text in texts], on_step)

    def submit(self, text: Text, *, drafts_every: int = 0) -> Pending:
        """Start writing a text and return at once, when its prompt is encoded. It shares the network calls of all texts
        that are being written, from the next call on. What is raised is that of ``generate``.

        Args:
            text: what to write.
            drafts_every: after so many steps each, the current estimate is decoded; 0: never.
        """
        check_drafts(drafts_every)
        driver = self._open_driver
        checked = check(self.codec, self.bundle.presets, text)
        (program,) = prepare(self.codec, [checked], drafts_every)
        return Pending(driver, program, partial(self._result, checked), partial(self._read, checked))

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
        """Like ``generate``, step by step: a Draft after each step of a batch, its list of results after the last.

        Every ``drafts_every`` steps (0: never) the current estimate is decoded, which costs one more row of a network
        call. Stop iterating (or close the iterator) to cancel. Arguments are checked before the first step.
        """
        check_drafts(drafts_every)
        params = self.params(preset, **overrides)
        texts = check_many(self.codec, params, prompts, n, seed, length, pinned)
        return self._told(texts, *self._run(texts, drafts_every))

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
        table: Table | None = None,
        x_prev: np.ndarray | None = None,
    ) -> Outcome:
        """The sampler with everything given, below text: what ``elf-rt verify`` replays.

        Args:
            z0: (B, L, C) the start, noise scale applied; drawn from ``seeds`` when None.
            grid: (N + 1,) or (B, N + 1) times from 0 to 1; drawn from ``seeds`` when None.
            eps: (N, B, L, C) unit noise, eps[i] for step i, or fewer where the last have none (N - 1 for the SDE);
                drawn from ``seeds`` when None.
            source: (B, L, C) normalised source latents.
            mask: (B, L), true where the source stands.
            seeds: (B,), or one for all.
            params: how it is drawn; the default preset when None.
            length: L where there is no z0; the trained length when None.
            latents: False where only the ids are of use: it saves a copy from the GPU.
            table: a sampler of your own, instead of the one that ``params`` and ``grid`` make.
            x_prev: (B, L, C) the estimate that the first call sees; zeros when None.

        Returns:
            latents (B, L, C) at t = 1 and ids (B, L) as the decoding call gave them, with timings.

        Raises:
            InputError: an array has another shape than it says here, or holds other things than numbers.
            BackendError: a call failed, or the model is closed.
        """
        whole = check_seeds(seeds)
        z0 = None if z0 is None else as_floats("z0", z0, (None, None, self.config.latent_dim))
        batch = len(whole) if z0 is None else len(z0)
        if not batch:
            raise InputError("z0 must hold at least one text")
        check_params(params)
        whole = whole * batch if len(whole) == 1 else whole
        if len(whole) != batch:
            raise InputError(f"seeds must have shape ({batch},), got ({len(whole)},)")
        length = check_length(self.config, length if z0 is None else z0.shape[1])
        programs = make_programs(
            self.config,
            params or self.params(),
            whole,
            length,
            z0=z0,
            grid=grid,
            eps=eps,
            source=source,
            mask=mask,
            x_prev=x_prev,
            table=table,
            latents=latents,
        )
        return Outcome.of(self.run(programs))

    def run(self, programs: Sequence[Program]) -> list[Written]:
        """Programs of the engine, side by side: below text and arrays."""
        with closing(EventStream(self._open_driver, iter([programs]), steps=False)) as run:
            written = {index: event for index, event in run if isinstance(event, Written)}
        return [written[index] for index in range(len(programs))]

    def stats(self) -> Stats:
        """What the model is doing now, and what its calls cost."""
        return self._open_driver.stats()

    def outlook(self, texts: Sequence[Text] = (), drafts_every: int = 0) -> tuple[Outlook, list[Load]]:
        """What is being written now, and what these texts would add to it: ``outlook.finishes(loads)`` tells in how
        many seconds each would be written."""
        checked = [check(self.codec, self.bundle.presets, text) for text in texts]
        loads = [text.load(self.config, drafts_every) for text in checked]
        return self._open_driver.outlook([load.length for load in loads]), loads

    def warm_up(self) -> None:
        """Write texts, one, then twice as many, … until it is found out how many rows of a call pay, so that it is
        known how long texts take. That takes about ``WARM_SECONDS``, or as long as one text, if that is more."""
        params = self.params(steps=WARM_STEPS)
        texts, last, end = 1, 0.0, time.monotonic() + WARM_SECONDS
        while not self.stats().settled and time.monotonic() + 2 * last < end:
            prompt = "a" if self.codec.takes_prompts else None
            results = self.write([Text(prompt, seed, params=params) for seed in range(texts)])
            last = max(result.timings.total_ms for result in results) / 1e3
            texts = min(2 * texts, WARM_TEXTS)

    def close(self) -> None:
        """Free the engine's memory. Texts that are being written end with a BackendError, and the model cannot be used
        after it."""
        self._finalizer()
        self.codec.close()

    def __repr__(self) -> str:
        return f"Model({str(self.bundle.folder)!r}, {self.backend_reason})"

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickled model is a path: whoever unpickles it, in another process, opens the bundle again."""
        if not self._finalizer.alive:
            raise BackendError("the model is closed: load it again, or send the bundle's path instead")
        options: dict[str, Any] = {"threads": self._threads, "max_rows": self._max_rows}
        return partial(load, precision=self.backend.precision, **options), (self._folder, self.backend.name)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def _open_driver(self) -> Driver:
        if self._driver.forked:
            with self._restarting:
                self._start_in_child()
        if not self._finalizer.alive:
            raise BackendError(CLOSED)
        return self._driver

    def _start_in_child(self) -> None:
        """The bundle may lie elsewhere, seen from the folder that the child is in."""
        if not self._driver.forked or not self._finalizer.alive:
            return
        if self.backend.device == "cuda":
            raise BackendError("a GPU cannot be used in a process forked after load: load the model in the child")
        of_parent = self._finalizer
        self._start(Bundle.open(self._folder))
        of_parent.detach()

    def _run(
        self, texts: Sequence[Checked], drafts_every: int = 0, *, steps: bool = True
    ) -> tuple[EventStream, list[range]]:
        """The events of texts, and the groups that are prepared together and share a call."""
        driver, groups = self._open_driver, list[range]()

        def programs() -> Iterator[list[Program]]:
            start = 0
            while start < len(texts):
                first = texts[start]
                size = max(1, driver.share(first.length) // len(first.guidance_rows(self.config)))
                groups.append(range(start, min(len(texts), start + size)))
                start = groups[-1].stop
                yield prepare(self.codec, texts[groups[-1].start : start], drafts_every)

        return EventStream(driver, programs(), steps), groups

    def _write(self, texts: Sequence[Checked], on_step: Callable[[int, int], None] | None) -> list[Result]:
        if not texts:
            return []
        run, _ = self._run(texts, steps=on_step is not None)
        results: dict[int, Result] = {}
        done, total = 0, sum(text.params.steps for text in texts)
        with closing(run):
            for index, event in run:
                if isinstance(event, Written):
                    results[index] = self._result(texts[index], event)
                    continue
                done += 1
                if on_step is not None:
                    on_step(done, total)
        return [results[index] for index in range(len(texts))]

    def _told(self, texts: Sequence[Checked], run: EventStream, groups: list[range]) -> Iterator[Draft | list[Result]]:
        steps = texts[0].params.steps
        with closing(run):
            for events in by_group(run, groups, steps):
                written = [self._result(texts[i], event) for i, event in events.items() if isinstance(event, Written)]
                yield written or self._draft(texts, events, steps)

    def _draft(self, texts: Sequence[Checked], events: Mapping[int, Event], steps: int) -> Draft:
        done = {i: event for i, event in events.items() if isinstance(event, StepDone)}
        drafts = [self._read(texts[i], event.draft) for i, event in done.items() if event.draft is not None]
        first = next(iter(done.values()))
        return Draft(first.step, steps, first.t, drafts or None, len(done))

    def _result(self, text: Checked, written: Written) -> Result:
        ids = text.finish(self.codec, written.ids)
        return Result(self.codec.decode(ids), ids, text.seed, text.prompt, written.timings)

    def _read(self, text: Checked, ids: np.ndarray) -> str | None:
        return self.codec.decode(text.finish(self.codec, ids))
