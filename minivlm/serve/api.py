"""The HTTP routes. `build_api` gives a plain FastAPI app around an engine: Ray Serve hosts it, tests call it."""

import asyncio
import base64
import hashlib
import hmac
import re
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from minivlm.serve.chat import EventStream, Served, answer, check_model
from minivlm.serve.engine import Engine
from minivlm.serve.errors import ApiError, from_validation
from minivlm.serve.protocol import ChatRequest

MAX_BODY_BYTES = 48 * 1024 * 1024
MAX_ITEMS = 40_000
"""Most commas, which bound the items of the JSON; the longest text has fewer, pictures next to none."""

BODY_TIMEOUT_S = 30.0
PAGE = Path(__file__).parent / "page" / "index.html"

T = TypeVar("T")


def build_api(engine: Engine, served: Served) -> FastAPI:
    """The app: /v1/chat/completions, /v1/models, /health, /ready, and the chat page at /."""
    api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    _add_errors(api)
    _add_page(api)
    created = int(time.time())
    v1 = APIRouter(prefix="/v1", dependencies=[Depends(_key_check(served.key_sha256))])

    @api.get("/health")
    @api.get("/ready")
    async def ready() -> Response:
        return Response(status_code=200 if engine.is_ready else 503)

    @v1.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(engine, served, created)]}

    @v1.get("/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        check_model(name, served)
        return _model_card(engine, served, created)

    @v1.post("/chat/completions")
    async def chat(request: Request) -> Response:
        slot = engine.admit()
        try:
            body = await _read(request)
            response = await _until_gone(request, answer(engine, served, body, slot))
        except BaseException:
            slot.close()
            raise
        if not isinstance(response, EventStream):
            slot.close()
        return response

    api.include_router(v1)
    return api


async def _read(request: Request) -> ChatRequest:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(415, "send the body as Content-Type: application/json", code="unsupported_media_type")
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            data = await _read_body(request)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_TIMEOUT_S:g} s", code="timeout") from None
    if data.count(b",") > MAX_ITEMS:
        raise ApiError(413, f"the body has more than {MAX_ITEMS} commas", code="body_too_large")
    try:
        return ChatRequest.model_validate_json(data)
    except ValidationError as error:
        raise from_validation(error) from None


async def _read_body(request: Request) -> bytes:
    """All bytes, but never more than the limit in memory (the framework's own limit answers in plain text)."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY_BYTES:
            raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes", code="body_too_large")
    return bytes(data)


async def _until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`, but cancel it as soon as the client hangs up."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(request.receive())  # the body is read, so the next message is the end of the line
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client went away", code="client_closed_request")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


def _model_card(engine: Engine, served: Served, created: int) -> dict[str, Any]:
    return {
        "id": served.model_name,
        "object": "model",
        "created": created,
        "owned_by": "minivlm",
        "root": f"models:/{served.model_name}/{served.version}",
        "max_model_len": engine.context_tokens,
    }


def _key_check(key_sha256: bytes | None) -> Callable[[Request], Awaitable[None]]:
    async def check(request: Request) -> None:
        if key_sha256 is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "replace")).digest()
        if not hmac.compare_digest(given, key_sha256) or scheme.lower() != "bearer":
            raise ApiError(401, "a valid API key is needed: send Authorization: Bearer KEY", code="invalid_api_key")

    return check


def _add_errors(api: FastAPI) -> None:
    @api.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error.response()

    @api.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return ApiError(error.status_code, str(error.detail), code="http_error").response()

    @api.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return ApiError(500, "the server failed on this request", code="internal_error").response()


def _add_page(api: FastAPI) -> None:
    """The page allows itself its own script and style by hash, pictures from memory, and requests to this server."""
    html = PAGE.read_text(encoding="utf-8")
    csp = "; ".join(
        [
            "default-src 'none'",
            f"script-src {_hashes(html, 'script')}",
            f"style-src {_hashes(html, 'style')}",
            "img-src data: blob:",
            "connect-src 'self'",
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        ]
    )
    headers = {"Content-Security-Policy": csp, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}

    @api.get("/")
    async def page() -> Response:
        return HTMLResponse(html, headers=headers)


def _hashes(html: str, tag: str) -> str:
    bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in bodies)
    return " ".join(f"'sha256-{digest}'" for digest in digests)
