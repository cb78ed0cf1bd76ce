"""Errors that a client sees, all in OpenAI's JSON form, none with paths, addresses or tracebacks.

400 bad body or parameter   401 key   404 model or route   408 slow body   413 body   415 content type
422 picture that cannot be decoded   429 queue full   500 our bug   503 not serving   504 deadline
"""

import re
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import ValidationError

MAX_REPORTED_ERRORS = 10
MAX_ECHO_CHARS = 200

_TYPES = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}


class ApiError(Exception):
    """A refusal with its HTTP status.

    Args:
        status: HTTP status code.
        message: what is wrong and what to send instead.
        param: the request field to blame, as OpenAI's clients show it.
        code: short machine-readable reason, for example `model_not_found`.
        retry_after_s: seconds after which a retry makes sense; sent as the Retry-After header.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The `{"error": {...}}` object of OpenAI's API."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The same as an HTTP response."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def echo(text: str) -> str:
    """A client's own text, safe to send back: printable ASCII, at most 200 characters."""
    return ascii(text[:MAX_ECHO_CHARS])[1:-1][:MAX_ECHO_CHARS]


def from_validation(error: ValidationError) -> ApiError:
    """400 that names at most ten fields, and says what each must be, without repeating what was sent."""
    items = error.errors(include_url=False, include_input=False, include_context=False)
    lines = [
        f"{_field(item['loc'])}: {plain(item['msg'].removeprefix('Value error, '))}"
        for item in items[:MAX_REPORTED_ERRORS]
    ]
    more = len(items) - len(lines)
    if more > 0:
        lines.append(f"and {more} more")
    return ApiError(400, "; ".join(lines), param=_field(items[0]["loc"]), code="invalid_request")


def _field(location: tuple[int | str, ...]) -> str:
    return echo(".".join(str(part) for part in location)) or "body"


def plain(message: str) -> str:
    """A library's message without memory addresses and of at most 200 characters."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", message)[:MAX_ECHO_CHARS]
