"""One chat request: from its checked body to the answer, whole or as server-sent events."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from minivlm.data.chat import turn_content
from minivlm.log import get_logger
from minivlm.model.generate import Prompt
from minivlm.schema import Message
from minivlm.serve.engine import Engine, Sampling, Slot
from minivlm.serve.errors import ApiError, echo
from minivlm.serve.media import decode_data_url
from minivlm.serve.protocol import ChatMessage, ChatRequest, Envelope, usage

logger = get_logger(__name__)

PING_EVERY_S = 10.0
LOWEST_TEMPERATURE = 0.01


@dataclass(frozen=True)
class Served:
    """What is served. `version` is the registry's, `key_sha256` the digest of the API key (None: no key asked)."""

    model_name: str
    version: str
    max_new_tokens: int
    key_sha256: bytes | None = None

    @property
    def fingerprint(self) -> str:
        """Names the model version in every answer, so that a change of champion can be seen."""
        return f"{self.model_name}-{self.version}"


class EventStream(StreamingResponse):
    """Server-sent events that free their slot even if the client left before the first one."""

    def __init__(self, events: AsyncIterator[str], slot: Slot) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._slot = slot

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, then free the slot."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._slot.close()


async def answer(engine: Engine, served: Served, body: ChatRequest, slot: Slot) -> Response:
    """Answer a request. A streamed response frees the slot itself, when its last event is out.

    Raises:
        ApiError: unknown model, refused picture, too many tokens, deadline.
    """
    check_model(body.model, served)
    limit = engine.limits.max_bytes
    pictures = [decode_data_url(url, max_bytes=limit) for message in body.messages for url in message.image_urls]
    prompt = await engine.prepare([_turn(message) for message in body.messages], pictures)
    room = engine.context_tokens - len(prompt.input_ids)
    if body.token_limit is not None and body.token_limit > room:
        message = f"{body.token_limit} tokens were asked for, but the context leaves {room} after the prompt"
        raise ApiError(400, message, param="max_completion_tokens", code="context_length_exceeded")
    seed = secrets.randbits(31) if body.seed is None else body.seed
    samplings = [
        Sampling(
            max_new_tokens=body.token_limit or min(served.max_new_tokens, room),
            temperature=max(body.temperature, LOWEST_TEMPERATURE) if body.temperature else 0.0,
            top_k=body.top_k,
            seed=(seed + index) % 2**31,
            stop=tuple(body.stop),
        )
        for index in range(body.n)
    ]
    envelope = Envelope(served.model_name, served.fingerprint)
    if body.stream:
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(_with_pings(_events(engine, prompt, samplings, slot, envelope, with_usage)), slot)
    answers, num_tokens = [], 0
    for sampling in samplings:
        pieces = [delta async for delta in engine.submit(prompt, sampling, slot)]
        answers.append(("".join(piece.text for piece in pieces), pieces[-1].finish_reason or "stop"))
        num_tokens += pieces[-1].num_tokens
    return JSONResponse(envelope.completion(answers, usage(len(prompt.input_ids), num_tokens)))


async def _events(
    engine: Engine, prompt: Prompt, samplings: list[Sampling], slot: Slot, envelope: Envelope, with_usage: bool
) -> AsyncIterator[str]:
    total = 0
    try:
        for index, sampling in enumerate(samplings):
            yield _event(envelope.chunk(index, {"role": "assistant", "content": ""}))
            async for delta in engine.submit(prompt, sampling, slot):
                if delta.text:
                    yield _event(envelope.chunk(index, {"content": delta.text}))
                if delta.finish_reason:
                    yield _event(envelope.chunk(index, {}, delta.finish_reason))
                    total += delta.num_tokens
        if with_usage:
            yield _event(envelope.usage_chunk(usage(len(prompt.input_ids), total)))
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body())
    except Exception:  # the status line is out: the client must still learn that this is no complete answer
        logger.exception("a stream failed")
        yield _event(ApiError(500, "the server failed while answering", code="internal_error").body())


async def _with_pings(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """The same events, with a comment line whenever nothing came for a while, so that proxies keep the line open."""
    while True:
        step = asyncio.ensure_future(_next(events))
        try:
            while not step.done():
                done, _ = await asyncio.wait({step}, timeout=PING_EVERY_S)
                if not done:
                    yield ": ping\n\n"
        finally:
            step.cancel()
        event = step.result()
        if event is None:
            return
        yield event


async def _next(events: AsyncIterator[str]) -> str | None:
    return await anext(events, None)


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _turn(message: ChatMessage) -> Message:
    role = "system" if message.role == "developer" else message.role
    if role == "user" and not message.text.strip() and not message.image_urls:
        raise ApiError(400, "a user message has neither text nor a picture", param="messages", code="invalid_request")
    text = message.text if role == "assistant" else turn_content(message.text, len(message.image_urls))
    return Message(role, text)


def check_model(name: str, served: Served) -> None:
    """404 for any model but the one that is served."""
    if name != served.model_name:
        message = f"The model `{echo(name)}` does not exist here: ask for `{served.model_name}`"
        raise ApiError(404, message, param="model", code="model_not_found")
