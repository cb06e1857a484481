"""Errors in OpenAI's envelope."""

import logging
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from elf_rt.errors import first_line

log = logging.getLogger("elf_rt.serve")

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
CHAT = (
    "an ELF model writes a whole text at once and has no chat: POST /v1/completions, with the source text as the prompt"
)


class ApiError(HTTPException):
    """A request that is refused. param: the field that is at fault. retry_after: seconds until it may be accepted."""

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(status, message)
        self.code, self.param, self.retry_after = code, param, retry_after

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status_code == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status_code, headers)


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, code=code, param=param)


def failed(error: Exception, request_id: str) -> ApiError:
    """What a client is told of an error of ours, which goes to the log."""
    about = {"request": request_id, "error": f"{type(error).__name__}: {first_line(error)}"}
    log.error("failed", extra=about)
    return ApiError(500, "the server failed; its log says why, under the request's id", code="internal")
