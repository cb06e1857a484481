"""One request: its texts are let in, written, told of, and dropped when its client leaves."""

import asyncio
import hashlib
import json
import secrets
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal

from anyio import to_thread
from starlette.requests import Request

from elf_rt.errors import BackendError, InputError
from elf_rt.model import Model, Text
from elf_rt.pending import Pending
from elf_rt.request import MAX_SEED
from elf_rt.results import Draft, Result
from elf_rt.serve.admission import Gate
from elf_rt.serve.errors import ApiError, bad_request, log
from elf_rt.serve.metrics import Metrics
from elf_rt.serve.schema import Choice, Completion, CompletionRequest, CompletionTimings, Usage

SAMPLING = ("steps", "sampler", "schedule", "guidance_scale", "sc_cfg", "gamma", "temperature")


class Service:
    """What all requests share.

    Raises:
        BackendError: the bundle has no tokenizer.
    """

    def __init__(self, model: Model, *, max_waiting: int, log_prompts: bool) -> None:
        if model.codec.tokenizer is None:
            raise BackendError("this bundle has no tokenizer: export the checkpoint again with --tokenizer")
        self.model, self.log_prompts, self.name = model, log_prompts, model.bundle.name
        self.metrics = Metrics(model.stats)
        self.gate = Gate(model, max_waiting, self.metrics)
        files = json.dumps(dict(model.bundle.manifest.files), sort_keys=True).encode()
        backend = model.backend
        self.fingerprint = f"{hashlib.sha256(files).hexdigest()[:12]}-{backend.name}-{backend.precision}"


@dataclass(frozen=True)
class Writing:
    """A text that was submitted."""

    index: int
    seed: int
    pending: Pending
    predicted_ms: float | None


class Job:
    """The texts of a request, from ``start`` to ``close``. gone: its client left."""

    def __init__(self, service: Service, asked: CompletionRequest, request: Request) -> None:
        self._service, self._asked, self._request = service, asked, request
        self.request_id, self._created = str(request.state.id), int(time.time())
        ms = asked.deadline_ms
        self._deadline = None if ms is None else asyncio.get_running_loop().time() + ms / 1e3
        self._lock = threading.Lock()  # submission is in another thread
        self._writings: list[Writing] = []
        self._prompt_tokens, self._tokens, self._closed = 0, 0, False
        self.gone = False

    async def start(self) -> None:
        """Let the texts in and submit them; encoding prompts does not hold up the event loop.

        Raises:
            ApiError: they are refused.
        """
        self._service.gate.enter(self._asked.num_texts)
        self._watch = asyncio.create_task(self._until_gone())
        try:
            await to_thread.run_sync(self._submit)
        except InputError as error:
            self.close()
            raise bad_request(str(error)) from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Drop what is not written. The gate has room again."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for writing in self._writings:
                writing.pending.cancel()
        self._watch.cancel()
        self._service.gate.leave(self._asked.num_texts)

    async def answer(self) -> Completion:
        """All texts.

        Raises:
            ApiError: the deadline passed. BackendError: the engine failed.
        """
        try:
            async with asyncio.timeout_at(self._deadline):
                results = await asyncio.gather(*(writing.pending for writing in self._writings))
            choices = [self._choice(*pair) for pair in zip(self._writings, results, strict=True)]
            return self._completion(choices, usage=self._usage())
        except TimeoutError:
            raise self._late() from None
        finally:
            self.close()

    async def events(self) -> AsyncIterator[Completion]:
        """Drafts where they were asked for, and each text when it is written.

        Raises:
            ApiError, BackendError: see ``answer``.
        """
        told: asyncio.Queue[tuple[Writing, Draft | Result | BaseException]] = asyncio.Queue()
        followers = [asyncio.create_task(self._follow(writing, told)) for writing in self._writings]
        left = len(followers)
        try:
            while left:
                async with asyncio.timeout_at(self._deadline):
                    writing, event = await told.get()
                if isinstance(event, BaseException):
                    raise event
                if isinstance(event, Draft):
                    yield self._draft(writing, event)
                    continue
                left -= 1
                yield self._completion([self._choice(writing, event)], usage=None if left else self._usage())
            if self._asked.stream_options is not None and self._asked.stream_options.include_usage:
                yield self._completion([], usage=self._usage())
        except TimeoutError:
            raise self._late() from None
        finally:
            self.close()
            for follower in followers:
                follower.cancel()

    async def _follow(self, writing: Writing, told: "asyncio.Queue[Any]") -> None:
        try:
            if self._asked.diffusing:
                async for draft in writing.pending:
                    told.put_nowait((writing, draft))
            told.put_nowait((writing, await writing.pending))
        except BaseException as error:
            told.put_nowait((writing, error))

    async def _until_gone(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self._service.metrics.left.inc(sum(not writing.pending.done() for writing in self._writings))
        self.close()

    def _submit(self) -> None:
        """In a thread of its own."""
        asked, service = self._asked, self._service
        if asked.model not in (None, service.name):
            message = f"this server has the model {service.name}, not {asked.model!r}"
            raise ApiError(404, message, code="model_not_found", param="model")
        for prompt in asked.prompts:
            self._prompt_tokens += asked.n * self._count(prompt)
            if service.log_prompts:
                log.info("prompt", extra={"request": self.request_id, "prompt": prompt})
        texts, drafts_every = self._texts(), 0
        if asked.diffusing:
            drafts_every = 1 if asked.drafts_every is None else asked.drafts_every
        predicted = service.gate.predict(texts, drafts_every, asked.deadline_ms, self)
        try:
            for index, (text, ms) in enumerate(zip(texts, predicted, strict=True)):
                pending = service.model.submit(text, drafts_every=drafts_every)
                with self._lock:
                    self._writings.append(Writing(index, text.seed or 0, pending, ms))
                    if self._closed:
                        pending.cancel()
                        return
        finally:
            service.gate.submitted(self)
        service.metrics.prompt_tokens.inc(self._prompt_tokens)

    def _texts(self) -> list[Text]:
        asked, model = self._asked, self._service.model
        overrides = {name: getattr(asked, name) for name in SAMPLING}
        params = model.params(asked.preset or "default", **overrides)
        first = secrets.randbits(32) if asked.seed is None else asked.seed
        if first + asked.num_texts > MAX_SEED:
            raise bad_request(f"seed must be at most 2**64 - {asked.num_texts}, got {first}", "seed")
        pinned = asked.template if asked.suffix is None else f"[{asked.max_tokens}]{asked.suffix}"
        prompts = [prompt for prompt in asked.prompts for _ in range(asked.n)]
        return [
            Text(prompt, first + k, params=params, length=asked.length, pinned=pinned)
            for k, prompt in enumerate(prompts)
        ]

    def _count(self, prompt: str | None) -> int:
        """Tokens of a prompt, which must not be cut."""
        codec = self._service.model.codec
        limit = codec.config.max_input_length
        if prompt is None or limit == 0 or codec.tokenizer is None:
            return 0
        tokens = len(codec.tokenizer.encode(prompt)[0]) + codec.append_eos
        if tokens > limit:
            message = f"a prompt of {tokens} tokens is too long: this model reads {limit}"
            raise bad_request(message, "prompt", "context_length_exceeded")
        return tokens

    def _late(self) -> ApiError:
        self._service.metrics.late.inc(sum(not writing.pending.done() for writing in self._writings))
        return ApiError(504, f"not written within deadline_ms {self._asked.deadline_ms}", code="deadline")

    def _choice(self, writing: Writing, result: Result) -> Choice:
        codec, timings, limit = self._service.model.codec, result.timings, self._asked.max_tokens
        ids = result.ids if limit is None else result.ids[:limit]
        text = result.text if limit is None else codec.decode(ids)
        reason: Literal["stop", "length"] = "stop" if ids[-1] == codec.pad_id else "length"
        tokens = int((ids != codec.pad_id).sum())
        self._tokens += tokens
        self._service.metrics.written(reason, timings, tokens, writing.predicted_ms)
        self._service.gate.written()
        times = {**vars(timings), "predicted_ms": writing.predicted_ms}
        rounded = {name: ms if ms is None else round(ms, 3) for name, ms in times.items()}
        told = CompletionTimings.model_validate(rounded)
        return Choice(text=text or "", index=writing.index, seed=result.seed, finish_reason=reason, timings=told)

    def _draft(self, writing: Writing, draft: Draft) -> Completion:
        text = (draft.texts or [None])[0] or ""
        choice = Choice(text=text, index=writing.index, seed=writing.seed, finish_reason=None)
        return self._completion([choice], diffusing=True, step=draft.step, steps=draft.steps, t=round(draft.t, 6))

    def _usage(self) -> Usage:
        total = self._prompt_tokens + self._tokens
        return Usage(prompt_tokens=self._prompt_tokens, completion_tokens=self._tokens, total_tokens=total)

    def _completion(self, choices: list[Choice], **fields: Any) -> Completion:
        return Completion(
            id=f"cmpl-{self.request_id}",
            created=self._created,
            model=self._service.name,
            system_fingerprint=self._service.fingerprint,
            choices=choices,
            **fields,
        )
