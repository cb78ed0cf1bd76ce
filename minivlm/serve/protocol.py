"""The part of OpenAI's chat completions protocol that is spoken here: requests checked, answers built.

Fields that do not change an answer (`user`, `metadata`, ...) are accepted and ignored. Fields that would change it and
are not implemented (`tools`, `top_p`, ...) are refused unless they hold the value that changes nothing. Anything else
is unknown and refused: a typing error must not pass silently.
"""

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MAX_IMAGES = 4
MAX_TEXT_CHARS = 32_000
MAX_MESSAGES = 256
MAX_PARTS = 64
MAX_CHOICES = 4
MAX_STOPS = 4
MAX_STOP_CHARS = 64

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_p": (1, 1.0),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Known fields that are not implemented, with the values under which that makes no difference (null is always fine)."""


class Strict(BaseModel):
    """Unknown fields and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class TextPart(Strict):
    """Plain text. Control tokens in it are characters like any other."""

    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    """A picture as a `data:image/...;base64,...` URL; nothing is ever fetched."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"
    """Accepted and ignored: every picture costs the same number of tokens."""


class ImagePart(Strict):
    """One picture of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _as_list(stop: Any) -> Any:
    if stop is None:
        return []
    return [stop] if isinstance(stop, str) else stop


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class ChatMessage(Strict):
    """One turn: text, or a list of text and picture parts."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True), BeforeValidator(_as_parts)]
    name: str | None = None
    """Accepted and ignored."""

    @property
    def text(self) -> str:
        """All text parts joined: two parts must not be able to form what one could not."""
        return "".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def image_urls(self) -> list[str]:
        """Data URLs in order."""
        return [part.image_url.url for part in self.content if isinstance(part, ImagePart)]


class StreamOptions(Strict):
    """Options of a streamed answer."""

    include_usage: bool = False
    """Send one more chunk, with token counts and no choices, before the end."""

    include_obfuscation: bool = False
    """Accepted and ignored."""


class ChatRequest(Strict):
    """Body of POST /v1/chat/completions."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most tokens of one answer. Default: serve.max_new_tokens, or what the context leaves."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Older name; `max_completion_tokens` wins where both are given."""

    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    """0, the default, is greedy: the answer repeats exactly. Above 0 it counts as at least 0.01."""

    top_k: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Draw from the k likeliest tokens only; 0 is all of them."""

    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    """Makes a drawn answer repeatable. Default: a new one for each request."""

    stop: Annotated[list[StopText], Field(max_length=MAX_STOPS), BeforeValidator(_as_list)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    parallel_tool_calls: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    prediction: Any = None

    top_p: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    logit_bias: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    modalities: Any = None

    @model_validator(mode="before")
    @classmethod
    def _nulls_are_absent(cls, body: Any) -> Any:
        return {key: value for key, value in body.items() if value is not None} if isinstance(body, dict) else body

    @model_validator(mode="after")
    def _spans(self) -> "ChatRequest":
        for name in _NEUTRAL:
            value = getattr(self, name)
            if value is not None and value not in _NEUTRAL[name]:
                raise ValueError(f"`{name}` is not supported by this server: remove it")
        if self.messages[-1].role != "user":
            raise ValueError("the last message must have the role `user`")
        images = sum(len(message.image_urls) for message in self.messages)
        if images > MAX_IMAGES:
            raise ValueError(f"{images} pictures in one request: at most {MAX_IMAGES} are allowed")
        if any(message.image_urls for message in self.messages if message.role != "user"):
            raise ValueError("only messages with the role `user` can hold pictures")
        characters = sum(len(message.text) for message in self.messages)
        if characters > MAX_TEXT_CHARS:
            raise ValueError(f"{characters} characters of text: at most {MAX_TEXT_CHARS} are allowed")
        if self.n > 1 and self.temperature == 0:
            raise ValueError("`n` above 1 with temperature 0 would repeat one answer: add a temperature, such as 0.8")
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` needs `stream`: true")
        return self

    @property
    def token_limit(self) -> int | None:
        """Most tokens of one answer; None leaves it to the server."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class Envelope:
    """Builds the bodies of one answer: they share id, time, model name and fingerprint."""

    def __init__(self, model: str, fingerprint: str) -> None:
        self._common = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def completion(self, answers: list[tuple[str, str]], usage: dict[str, int]) -> dict[str, Any]:
        """The whole answer; `answers` are (text, finish_reason) of each choice."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": reason,
            }
            for index, (text, reason) in enumerate(answers)
        ]
        return self._common | {"object": "chat.completion", "choices": choices, "usage": usage}

    def chunk(self, index: int, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        """A piece of choice `index`."""
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._common | {"object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """The chunk after all choices that carries token counts."""
        return self._common | {"object": "chat.completion.chunk", "choices": [], "usage": usage}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts; picture tokens are part of the prompt."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}
