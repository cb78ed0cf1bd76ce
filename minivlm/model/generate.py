"""Batched decoding with a key-value cache: greedy or sampled, the same answers for any batch size.

Called by the generation actors and, one row at a time, by serving.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from minivlm.model.choose import choose
from minivlm.model.vlm import MiniVLM, document_mask

CACHE_ROOM = 32
KEEP_BATCH_ABOVE = 0.75


@dataclass(frozen=True)
class Prompt:
    """One question, ready for the model."""

    input_ids: list[int]
    """Ids with every picture expanded to its image tokens, ending in the assistant header."""

    image_features: Tensor
    """[n, P, D_vision], the pictures in reading order; n may be 0."""

    row: int | None = None
    """Number that, with the seed, determines what is sampled. Default: the place in the list of prompts. Give a global
    number when a larger job is split into batches, so that the split does not change the samples."""


def generate(
    vlm: MiniVLM,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    eos_token_id: int,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
) -> list[list[int]]:
    """Answer all prompts in one batch.

    In float32 answers do not depend on the batch: each row draws from a generator of its own, and where rounding could
    decide (the shapes of a batch change the last bits of a sum) the token is taken from a forward of that prompt
    alone. In bfloat16 nearly equal tokens may change places; benchmarks/batch_invariance.py counts them. In a mixture
    of experts so may nearly equal experts, in either type.

    Args:
        max_new_tokens: longest answer, in tokens.
        eos_token_id: ends an answer; it is not returned.
        temperature: 0 = greedy; else logits are divided by it.
        top_k: sample among so many best tokens; 0 = all.
        seed: with each prompt's `row` it determines the samples.

    Returns:
        One list of new ids per prompt.

    Raises:
        ValueError: an empty prompt, or placeholders unlike the pictures.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    steps = _decode(vlm, prompts, max_new_tokens, eos_token_id, temperature=temperature, top_k=top_k, seed=seed)
    for tokens in steps:
        for index, token in tokens:
            answers[index].append(token)
    return answers


def stream_generate(
    vlm: MiniVLM,
    prompt: Prompt,
    *,
    max_new_tokens: int,
    eos_token_id: int,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
) -> Iterator[int]:
    """The ids that `generate` would return for this prompt, one by one as they are decided."""
    steps = _decode(vlm, [prompt], max_new_tokens, eos_token_id, temperature=temperature, top_k=top_k, seed=seed)
    for tokens in steps:
        yield from (token for _, token in tokens)


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer as views of buffers with free room: a new token copies itself, not the cache."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append [B, H, L, D] and return all keys and values so far. (transformers' signature)"""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [key_states[:, :, :0], value_states[:, :, :0]]
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        for which, states in enumerate((key_states, value_states)):
            if end > self.buffers[which].shape[2]:
                batch, heads, _, width = states.shape
                larger = states.new_empty(batch, heads, end + CACHE_ROOM, width)
                larger[:, :, :start] = self.buffers[which][:, :, :start]
                self.buffers[which] = larger
            self.buffers[which][:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        length = self.get_seq_length()
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)


@torch.no_grad()
def _decode(
    vlm: MiniVLM,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    eos_token_id: int,
    *,
    temperature: float,
    top_k: int,
    seed: int,
) -> Iterator[list[tuple[int, int]]]:
    """Yield, per step, (index of the prompt, new token) for the rows that go on. Finished rows leave the batch."""
    if not prompts:
        return
    uniforms = None if temperature == 0 else _uniforms(prompts, max_new_tokens, seed)
    cache = Cache(layer_class_to_replicate=RoomyLayer)
    logits, bias, positions = _prefill(vlm, prompts, max_new_tokens, cache)
    length = bias.shape[-1] - max_new_tokens
    rows = torch.arange(len(prompts))
    is_running = torch.ones(len(prompts), dtype=torch.bool)
    is_exact = next(vlm.parameters()).dtype == torch.float32
    written: list[list[int]] = [[] for _ in prompts]
    for step in range(max_new_tokens):
        drawn = None if uniforms is None else uniforms[rows, step]
        tokens, doubts = choose(logits, temperature, top_k, drawn)
        for place in (doubts & is_running).nonzero()[:, 0].tolist() if is_exact else ():
            row, own = int(rows[place]), None if drawn is None else drawn[place : place + 1]
            tokens[place] = _settle(vlm, prompts[row], written[row], temperature, top_k, own)
        is_running &= tokens != eos_token_id
        running = is_running.nonzero()[:, 0]
        new = list(zip(rows[running].tolist(), tokens[running].tolist(), strict=True))
        for row, token in new:
            written[row].append(token)
        yield new
        if len(running) == 0 or step == max_new_tokens - 1:
            return
        if len(running) < KEEP_BATCH_ABOVE * len(rows):
            keep = running.to(bias.device)
            cache.batch_select_indices(keep)
            bias, positions = bias[keep], positions[keep]
            rows, tokens, is_running = rows[running], tokens[running], is_running[running]
        length += 1
        logits = _next_logits(vlm, tokens.to(bias.device), bias[..., :length], positions, cache)
        positions = positions + 1


def _prefill(
    vlm: MiniVLM, prompts: Sequence[Prompt], max_new_tokens: int, cache: Cache
) -> tuple[Tensor, Tensor, Tensor]:
    """Read the left-padded prompts.

    Returns:
        logits [B, V] float32 of the first new token; additive mask [B, 1, 1, T + max_new_tokens] over keys (-inf at
        padding); position [B, 1] of the first new token.
    """
    device = next(vlm.parameters()).device
    longest = max(len(prompt.input_ids) for prompt in prompts)
    input_ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    is_token = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        if not prompt.input_ids:
            raise ValueError(f"prompt {row} is empty: it must end in the assistant header")
        start = longest - len(prompt.input_ids)
        input_ids[row, start:] = torch.tensor(prompt.input_ids)
        is_token[row, start:] = 1
    image_features = torch.cat([prompt.image_features for prompt in prompts]).to(device)
    image_index = torch.arange(len(image_features), device=device)
    # Padding must not look like a picture, and 0 is an image token in no tokenizer but a strange one.
    input_ids = input_ids.masked_fill(is_token == 0, 1 if vlm.image_token_id == 0 else 0).to(device)
    is_token = is_token.to(device)
    inputs_embeds = vlm.embed(input_ids, image_features, image_index)
    outputs = vlm.language_model.get_decoder()(
        inputs_embeds=inputs_embeds,
        attention_mask=document_mask(is_token, inputs_embeds.dtype),
        position_ids=(is_token.cumsum(dim=1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
    )
    logits = vlm.language_model.get_output_embeddings()(outputs.last_hidden_state[:, -1]).float()
    bias = inputs_embeds.new_zeros(len(prompts), 1, 1, longest + max_new_tokens)
    bias[..., :longest].masked_fill_(is_token[:, None, None] == 0, float("-inf"))
    return logits, bias, is_token.sum(dim=1, keepdim=True)


def _next_logits(vlm: MiniVLM, tokens: Tensor, bias: Tensor, positions: Tensor, cache: Cache) -> Tensor:
    outputs = vlm.language_model.get_decoder()(
        inputs_embeds=vlm.language_model.get_input_embeddings()(tokens.unsqueeze(1)),
        attention_mask=bias,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    logits: Tensor = vlm.language_model.get_output_embeddings()(outputs.last_hidden_state[:, -1]).float()
    return logits


def _settle(
    vlm: MiniVLM,
    prompt: Prompt,
    written: Sequence[int],
    temperature: float,
    top_k: int,
    drawn: Tensor | None,
) -> int:
    """The next token of one prompt from a forward of it alone, whose shapes no other prompt changes.

    A placeholder that the model wrote is a token like any other, as in the decoding of a batch.
    """
    device = next(vlm.parameters()).device
    image_features = prompt.image_features.to(device)
    asked = torch.tensor([prompt.input_ids], device=device)
    given = vlm.embed(asked, image_features, torch.arange(len(image_features), device=device))
    answered = vlm.language_model.get_input_embeddings()(torch.tensor([written], dtype=torch.long, device=device))
    outputs = vlm.language_model.get_decoder()(inputs_embeds=torch.cat([given, answered], dim=1), use_cache=False)
    logits = vlm.language_model.get_output_embeddings()(outputs.last_hidden_state[:, -1]).float()
    return int(choose(logits, temperature, top_k, drawn)[0])


def _uniforms(prompts: Sequence[Prompt], max_new_tokens: int, seed: int) -> Tensor:
    """[B, max_new_tokens] float64 in [0, 1): every row from its own generator."""
    draws = []
    for index, prompt in enumerate(prompts):
        row = index if prompt.row is None else prompt.row
        digest = hashlib.sha256(f"{seed}:{row}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
        draws.append(torch.rand(max_new_tokens, generator=generator, dtype=torch.float64))
    return torch.stack(draws)
