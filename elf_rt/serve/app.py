"""The routes."""

import asyncio
import base64
import hashlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import elf_rt
from elf_rt.errors import BackendError
from elf_rt.params import SAMPLERS, SCHEDULES
from elf_rt.serve.boundary import Boundary
from elf_rt.serve.errors import CHAT, ApiError, bad_request, failed
from elf_rt.serve.job import Job, Service
from elf_rt.serve.schema import Completion, CompletionRequest, ModelCard, ModelList

CODES = {404: "not_found", 405: "method_not_allowed"}


def create_app(
    service: Service, *, keys: Sequence[str] = (), origins: Sequence[str] = (), root_path: str = ""
) -> FastAPI:
    """An ASGI application for one model. keys: API keys, or none; origins: of pages elsewhere that may ask."""
    app = FastAPI(title="elf-rt", version=elf_rt.__version__, root_path=root_path, docs_url=None, redoc_url=None)
    _add_routes(app, service)
    _add_pages(app, service)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_middleware(Boundary, metrics=service.metrics, keys=keys)
    if origins:  # outside of the boundary, since browsers ask without a key whether they may ask
        app.add_middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    created = int(time.time())

    @app.post("/v1/completions", response_model=Completion)
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        job = Job(service, asked, request)
        try:
            await job.start()
            if asked.stream:
                headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
                return StreamingResponse(_lines(job), media_type="text/event-stream", headers=headers)
            return Response((await job.answer()).line(), media_type="application/json")
        except asyncio.CancelledError:
            if not job.gone:
                raise
            return Response(status_code=499)

    @app.post("/v1/chat/completions", include_in_schema=False)
    async def chat() -> None:
        raise bad_request(CHAT, "messages", "unsupported")

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[_card(service, created)])

    @app.get("/v1/models/{name}")
    async def model(name: str) -> ModelCard:
        if name != service.name:
            raise ApiError(404, f"this server has the model {service.name}", code="model_not_found", param="model")
        return _card(service, created)


def _add_pages(app: FastAPI, service: Service) -> None:
    page, policy = read_page()

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"})

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        gate = service.gate
        status = "draining" if gate.draining else "ready" if gate.ready else "warming up"
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


async def _lines(job: Job) -> AsyncIterator[str]:
    """Server-sent events of a job. What goes wrong now can only be told in one of them."""
    try:
        async for event in job.events():
            yield f"data: {event.line()}\n\n"
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield f"data: {json.dumps(error.body())}\n\n"
    except BackendError as error:
        yield f"data: {json.dumps(failed(error, job.request_id).body())}\n\n"
    except asyncio.CancelledError:
        if not job.gone:
            raise
    finally:
        job.close()


def _card(service: Service, created: int) -> ModelCard:
    model = service.model
    return ModelCard(
        id=service.name,
        created=created,
        conditional=model.config.max_input_length > 0,
        max_length=model.config.max_length,
        engine=f"{model.backend.name} {model.backend.precision}",
        presets={name: asdict(params) for name, params in model.bundle.presets.items()},
        samplers=list(SAMPLERS),
        schedules=list(SCHEDULES),
    )


def read_page() -> tuple[str, str]:
    """The page with its style and script inside, and the policy that lets it run these and ask only its own server."""
    folder = resources.files("elf_rt.serve") / "page"
    page = (folder / "index.html").read_text(encoding="utf-8")
    sources = {}
    for kind, name in (("style", "page.css"), ("script", "page.js")):
        text = (folder / name).read_text(encoding="utf-8")
        page = page.replace(f"<{kind}></{kind}>", f"<{kind}>{text}</{kind}>")
        sources[kind] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{sources['script']}'; style-src 'sha256-{sources['style']}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


async def _invalid(request: Request, error: Any) -> Response:
    first = error.errors()[0]
    names = [str(part) for part in first["loc"] if part not in ("body", "path", "query")]
    where = names[0] if names and first["type"] != "json_invalid" else None
    message = "the body is not JSON" if first["type"] == "json_invalid" else first["msg"]
    return bad_request(f"{where}: {message}" if where else message, where).response()


async def _http(request: Request, error: Any) -> Response:
    if isinstance(error, ApiError):
        return error.response()
    known = error.status_code in CODES
    message = f"{request.method} {request.url.path} is not offered here" if known else "the body cannot be read as JSON"
    return ApiError(error.status_code, message, code=CODES.get(error.status_code, "bad_request")).response()
