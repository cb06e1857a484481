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

from elf_rt.errors import first_line
from elf_rt.serve.errors import ApiError
from elf_rt.serve.metrics import Metrics

MAX_BODY = 1 << 20  # bytes
BODY_SECONDS = 20.0  # in which a body must be there

PROBES = ("/health", "/ready", "/metrics")  # asked every few seconds, so not in the log

log = logging.getLogger("elf_rt.serve")


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
            body = await _read(scope, receive)
            if body is not None:
                await self._app(scope, _replay(body, receive), tell)
        except ApiError as error:
            await error.response()(scope, receive, tell)
        except Exception as error:
            log.error("failed", extra={"request": number, "error": f"{type(error).__name__}: {first_line(error)}"})
            if not status:
                failure = ApiError(500, "the server failed; its log says why, under the request's id", code="internal")
                await failure.response()(scope, receive, tell)
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


async def _read(scope: Scope, receive: Receive) -> bytes | None:
    """The body, or None where the client left before its end."""
    too_large = ApiError(413, f"the body must be at most {MAX_BODY} bytes", code="body_too_large")
    told = dict(scope["headers"]).get(b"content-length", b"0")
    if not told.isdigit() or int(told[:20]) > MAX_BODY:
        raise too_large
    body, more = bytearray(), True
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > MAX_BODY:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {BODY_SECONDS:.0f} s", code="body_timeout") from None
    return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay


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
