"""A Ray Serve application: ``serve run elf_rt.scale.ray_serve:app bundle=/models/name.elfrt``.

A replica holds one model, whose engine batches: Serve hands it more requests than fit in a call, and does no batching
of its own. ``POST /`` takes a JSON object with the fields of ``TextRequest`` and answers with one; with "stream", with
one a line: drafts, each with its whole text, then the answer.
"""

import json
from collections.abc import AsyncIterator
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from ray import serve
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

import elf_rt
from elf_rt.errors import ElfError, InputError

PIECES = 4  # drafts of a text: Serve is slow with many small pieces


class Settings(BaseModel):
    """How the application runs. max_rows: the largest network call; twice as many requests are given to a replica.
    max_waiting: requests beyond those, which wait; more are refused with status 503. cores: of a replica, without GPU.
    """

    model_config = ConfigDict(extra="forbid")

    bundle: str
    backend: str = "auto"
    precision: str = "auto"
    replicas: int = 1
    gpus: float = 0
    cores: int = 1
    max_rows: int = 16
    max_waiting: int = 256


class TextRequest(BaseModel):
    """One text. drafts_every: steps between the drafts of a stream."""

    model_config = ConfigDict(extra="forbid")

    prompt: str | None = None
    seed: int | None = None
    preset: str = "default"
    steps: int | None = None
    sampler: str | None = None
    guidance_scale: float | None = None
    length: int | None = None
    template: str | None = None
    stream: bool = False
    drafts_every: int | None = None


def app(settings: Settings) -> serve.Application:
    """The application, as ``serve run`` and Serve's configuration files make it."""
    deployment = serve.deployment(
        num_replicas=settings.replicas,
        ray_actor_options={"num_gpus": settings.gpus} if settings.gpus else {"num_cpus": settings.cores},
        max_ongoing_requests=2 * settings.max_rows,
        max_queued_requests=settings.max_waiting,
    )
    return deployment(Writer).bind(settings)


class Writer:
    """A replica."""

    def __init__(self, settings: Settings) -> None:
        threads = None if settings.gpus else settings.cores
        self._model = elf_rt.load(
            settings.bundle,
            settings.backend,
            precision=settings.precision,
            threads=threads,
            max_rows=settings.max_rows,
        )

    async def __call__(self, http: HttpRequest) -> Response:
        """One request over HTTP. Its text is cancelled when its client leaves."""
        try:
            request = TextRequest.model_validate_json(await http.body())
            pending = self._start(request)
            if request.stream:
                return StreamingResponse(_pieces(pending), media_type="application/x-ndjson")
            return JSONResponse((await pending).to_json())
        except ValidationError as error:
            first = error.errors()[0]
            return _refusal(400, f"{'.'.join(map(str, first['loc'])) or 'the body'}: {first['msg']}")
        except InputError as error:
            return _refusal(400, str(error))
        except ElfError as error:
            return _refusal(500, str(error))

    def check_health(self) -> None:
        """Serve asks, and replaces a replica of which this fails."""
        self._model.stats()

    def _start(self, request: TextRequest) -> elf_rt.Pending:
        given = {name: getattr(request, name) for name in ("steps", "sampler", "guidance_scale")}
        params = self._model.params(request.preset, **given)
        text = elf_rt.Text(
            request.prompt, seed=request.seed, params=params, length=request.length, pinned=request.template
        )
        every = -(-params.steps // (PIECES + 1)) if request.drafts_every is None else request.drafts_every
        return self._model.submit(text, drafts_every=every if request.stream else 0)


async def _pieces(pending: elf_rt.Pending) -> AsyncIterator[str]:
    """One JSON object a line."""
    try:
        async for draft in pending:
            if draft.texts is not None:
                yield _line({"draft": draft.texts[0], "step": draft.step, "steps": draft.steps, "t": draft.t})
        yield _line((await pending).to_json())
    except ElfError as error:
        yield _line({"error": str(error)})
    finally:
        pending.cancel()


def _refusal(status: int, error: str) -> Response:
    return JSONResponse({"error": error}, status)


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
