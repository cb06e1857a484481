"""What every request passes: its id, its key, the size and the pace of its body, and what of an error is told."""

import asyncio
import hmac
import json
import logging
import secrets
import sys
import time
from collections.abc import Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from elf_rt.serve.errors import ApiError, failed, log
from elf_rt.serve.metrics import Metrics

MAX_BODY = 1 << 20  # bytes
TOO_LARGE = f"the body must be at most {MAX_BODY} bytes"
BODY_SECONDS = 20.0  # in which a body must be there

PROBES = ("/health", "/ready", "/metrics")  # asked every few seconds, so not in the log


class Boundary:
    """ASGI middleware. keys: of which a request under /v1/ must bear one; none: everybody may ask."""

    def __init__(self, app: ASGIApp, metrics: Metrics, keys: Sequence[str]) -> None:
        self._app, self._metrics = app, metrics
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        number, begun, status = secrets.token_hex(8), time.perf_counter(), 0
        scope.setdefault("state", {})["id"] = number

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [(b"x-request-id", number.encode()), (b"x-content-type-options", b"nosniff")]
                message["headers"] = [*message.get("headers", ()), *extra]
            await send(message)

        try:
            self._check_key(scope)
            await self._app(scope, _bounded(scope, receive), tell)
        except Exception as error:
            told = error if isinstance(error, ApiError) else failed(error, number)
            if not status:
                await told.response()(scope, receive, tell)
        finally:
            self._metrics.requests.labels(str(status or 499)).inc()
            about = {"request": number, "status": status or 499, "ms": round(1e3 * (time.perf_counter() - begun), 1)}
            level = logging.DEBUG if scope["path"].endswith(PROBES) else logging.INFO
            log.log(level, "%s %s", scope["method"], scope["path"].encode("unicode_escape").decode()[:200], extra=about)

    def _check_key(self, scope: Scope) -> None:
        if not self._keys or "/v1/" not in scope["path"]:
            return
        given = dict(scope["headers"]).get(b"authorization", b"").removeprefix(b"Bearer ")
        if not max(hmac.compare_digest(given, key) for key in self._keys):
            raise ApiError(401, "this server asks for an API key: Authorization: Bearer KEY", code="invalid_api_key")


def _bounded(scope: Scope, receive: Receive) -> Receive:
    """The same messages, as far as a body is not too large, comes in time, and is whole."""
    size, more, end = 0, True, asyncio.get_running_loop().time() + BODY_SECONDS
    told = dict(scope["headers"]).get(b"content-length", b"0")
    if not told.isdigit() or int(told[:20]) > MAX_BODY:
        raise ApiError(413, TOO_LARGE, code="body_too_large")

    async def bounded() -> Message:
        nonlocal size, more
        try:
            async with asyncio.timeout_at(end if more else None):
                message = await receive()
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {BODY_SECONDS:.0f} s", code="body_timeout") from None
        if more and message["type"] == "http.disconnect":
            raise ApiError(499, "the client left before the end of its body", code="client_left")
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
        if size > MAX_BODY:
            raise ApiError(413, TOO_LARGE, code="body_too_large")
        return message

    return bounded


class LineFormatter(logging.Formatter):
    """One line, or one JSON object, for each record: what it says, and the fields that were given with it."""

    FIELDS = ("request", "status", "ms", "prompt", "error")

    def __init__(self, as_json: bool) -> None:
        super().__init__("%(message)s")
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(record.created))
        fields: dict[str, Any] = {name: value for name, value in vars(record).items() if name in self.FIELDS}
        if self._as_json:
            return json.dumps({"time": at, "message": record.getMessage(), **fields})
        return " ".join([at, record.getMessage(), *(f"{name}={json.dumps(value)}" for name, value in fields.items())])


def log_to_stderr(as_json: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(as_json))
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)
