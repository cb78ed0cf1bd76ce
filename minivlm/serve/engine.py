"""The model behind the routes: admits requests, prepares their pictures and text, and generates one answer at a time.

Two threads keep the event loop free: one decodes and encodes pictures, one generates. A caller holds a `Slot` from
before its body is read until its answer has gone out; closing the slot stops the generation at the next token.

    with engine.admit() as slot:
        prompt = await engine.prepare(messages, pictures)
        async for delta in engine.submit(prompt, sampling, slot): ...
"""

import asyncio
import copy
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from transformers import PreTrainedTokenizerFast

from minivlm.data.chat import encode_prompt
from minivlm.data.images import BadImage, ImageLimits, open_image
from minivlm.log import get_logger
from minivlm.model.export import load_export, load_export_tower
from minivlm.model.generate import Prompt, stream_generate
from minivlm.schema import Message
from minivlm.serve.errors import ApiError, plain
from minivlm.serve.text import Detokenizer, StopFilter

logger = get_logger(__name__)


@dataclass(frozen=True)
class Sampling:
    """How one answer is drawn. temperature 0 is greedy, top_k 0 is all tokens; max_new_tokens counts tokens."""

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Delta:
    """A piece of an answer. `num_tokens` counts all tokens so far; the last piece has a finish_reason."""

    text: str
    num_tokens: int
    finish_reason: str | None = None


class Slot:
    """Room for one request. Leaving the `with` block, or `close`, frees it and stops its generation."""

    def __init__(self, on_close: Callable[[], None]) -> None:
        self._on_close = on_close
        self._closed = threading.Event()

    @property
    def is_closed(self) -> bool:
        """True once nobody waits for the answer any more."""
        return self._closed.is_set()

    def close(self) -> None:
        """Free the room; a second call changes nothing."""
        if not self._closed.is_set():
            self._closed.set()
            self._on_close()

    def __enter__(self) -> "Slot":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Engine:
    """One export, loaded once.

    Args:
        export_dir: folder written by minivlm.model.export.save_export.
        limits: what a picture may be; the same as for training data.
        encode_precision: arithmetic of the vision tower, `float32` or `bfloat16`.
        device: `cpu` or `cuda`.
        max_requests: requests held at once, running and waiting; more are refused with 429.
        timeout_s: longest time from admission of a generation to its last token.
    """

    def __init__(
        self,
        export_dir: Path,
        *,
        limits: ImageLimits,
        encode_precision: str,
        device: str,
        max_requests: int,
        timeout_s: float,
    ) -> None:
        export = load_export(export_dir)
        self.limits = limits
        self.timeout_s = timeout_s
        self.vlm = export.vlm.to(device).eval()
        self.tower = load_export_tower(export_dir, precision=encode_precision, batch_size=1, device=device)
        self.context_tokens = int(self.vlm.language_model.config.max_position_embeddings)
        self.num_image_tokens = export.num_image_tokens
        self.tokenizer: PreTrainedTokenizerFast = export.tokenizer
        self._decoder: PreTrainedTokenizerFast = copy.deepcopy(export.tokenizer)  # one per thread: they hold state
        self._max_requests = max_requests
        self._num_requests = 0
        self._is_open = True
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self._generating = ThreadPoolExecutor(1, thread_name_prefix="generate")

    @property
    def is_ready(self) -> bool:
        """False once closed."""
        return self._is_open

    def close(self) -> None:
        """Refuse new requests; the running ones finish."""
        self._is_open = False
        self._preparing.shutdown(wait=False)
        self._generating.shutdown(wait=False)

    def admit(self) -> Slot:
        """Take a slot. Call from the event loop.

        Raises:
            ApiError: 503 while closing, 429 with Retry-After when all slots are taken.
        """
        if not self._is_open:
            raise ApiError(503, "the server is shutting down: try again", code="unavailable", retry_after_s=5)
        if self._num_requests >= self._max_requests:
            message = f"all {self._max_requests} places are taken: try again later"
            raise ApiError(429, message, code="queue_full", retry_after_s=2)
        self._num_requests += 1
        return Slot(self._free)

    def _free(self) -> None:
        self._num_requests -= 1

    async def prepare(self, messages: Sequence[Message], pictures: Sequence[bytes]) -> Prompt:
        """Decode and encode the pictures, and encode the text; in reading order, one `<image>` for each picture.

        Raises:
            ApiError: 422 for a picture that cannot be decoded or breaks a limit; 400 for more tokens than the context.
        """
        return await asyncio.get_running_loop().run_in_executor(self._preparing, self._prepare, messages, pictures)

    def _prepare(self, messages: Sequence[Message], pictures: Sequence[bytes]) -> Prompt:
        images = []
        for number, data in enumerate(pictures, start=1):
            try:
                images.append(open_image(data, self.limits))
            except BadImage as error:
                message = f"picture {number} was refused: {plain(str(error))}"
                raise ApiError(422, message, param="messages", code="invalid_image") from None
        input_ids = encode_prompt(self.tokenizer, messages, self.num_image_tokens, num_images=len(images))
        if len(input_ids) >= self.context_tokens:
            message = (
                f"the request has {len(input_ids)} tokens, of {self.context_tokens} in the context with the answer"
            )
            raise ApiError(400, message, param="messages", code="context_length_exceeded")
        if images:
            features = self.tower.encode(self.tower.preprocess(images))
        else:
            shape = (0, self.tower.num_features, self.tower.hidden_size)
            features = torch.zeros(shape, dtype=torch.bfloat16)
        return Prompt(input_ids, features)

    async def submit(self, prompt: Prompt, sampling: Sampling, slot: Slot) -> AsyncIterator[Delta]:
        """Generate one answer; the pieces joined are the whole text. Answers wait for each other in order of arrival.

        Raises:
            ApiError: 504 when timeout_s is over.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Delta | Exception] = asyncio.Queue()

        def put(item: Delta | Exception) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, item)

        deadline = time.monotonic() + self.timeout_s
        self._generating.submit(self._generate, prompt, sampling, slot, put)
        while True:
            try:
                item = await asyncio.wait_for(queue.get(), deadline - time.monotonic())
            except TimeoutError:
                slot.close()
                raise ApiError(504, f"no answer within {self.timeout_s:g} s", code="timeout") from None
            if isinstance(item, Exception):
                raise item
            yield item
            if item.finish_reason:
                return

    def _generate(
        self, prompt: Prompt, sampling: Sampling, slot: Slot, put: Callable[[Delta | Exception], None]
    ) -> None:
        try:
            self._write(prompt, sampling, slot, put)
        except Exception as error:  # goes to whoever waits for the answer; the thread must live on
            logger.exception("generation failed")
            put(error)

    def _write(self, prompt: Prompt, sampling: Sampling, slot: Slot, put: Callable[[Delta | Exception], None]) -> None:
        detokenizer, stops = Detokenizer(self._decode), StopFilter(sampling.stop)
        num_tokens = 0
        if slot.is_closed:
            return
        tokens = stream_generate(
            self.vlm,
            prompt,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=self._decoder.eos_token_id,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            seed=sampling.seed,
        )
        for token in tokens:
            if slot.is_closed:
                return
            num_tokens += 1
            text = stops.push(detokenizer.push(token))
            if stops.stopped:
                put(Delta(text, num_tokens, "stop"))
                return
            if text:
                put(Delta(text, num_tokens))
        text = stops.push(detokenizer.finish()) + stops.finish()
        is_cut = num_tokens == sampling.max_new_tokens and not stops.stopped
        put(Delta(text, num_tokens, "length" if is_cut else "stop"))

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._decoder.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
