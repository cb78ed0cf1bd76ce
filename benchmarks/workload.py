"""Captions like LLaVA's and MiniMind-V's for measuring speed: lengths and shapes are real, tokens and features random.

Written as the token table and feature cache that training reads. Needs torch and numpy only.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from minivlm.data.features import FeatureCache
from minivlm.data.tokens import IGNORE, EncodedSample, TokenTable

IMAGE_TOKENS, VISION_SIZE, VOCAB_SIZE = 50, 768, 6400
PROMPT_TOKENS = 14
"""Chat markers and a short question."""

PAD_TOKEN_ID, IMAGE_TOKEN_ID, FIRST_TEXT_ID = 0, 3, 10
PICTURES_PER_SHARD = 512


def caption_lengths(count: int, seed: int) -> np.ndarray:
    """[count] tokens of the answers: 11 to 34, each equally likely (captions of CC3M-595K, as LLaVA pretrains on)."""
    return np.random.default_rng([seed, 1]).integers(11, 35, count)


def long_tailed_lengths(count: int, seed: int) -> np.ndarray:
    """[count] tokens of the answers: log-normal with median 60 and 1 % above 600, cut at 1,900 (instruction data)."""
    drawn = np.random.default_rng([seed, 2]).lognormal(np.log(60), 1.0, count)
    return np.clip(drawn, 4, 1900).astype(np.int64)


def total_lengths(answer_lengths: np.ndarray) -> np.ndarray:
    """Tokens of whole samples with one picture."""
    return answer_lengths + IMAGE_TOKENS + PROMPT_TOKENS


def digest(index: int) -> str:
    """A picture's name in the cache."""
    return f"{index:064x}"


def write_table(folder: Path, num_samples: int, seed: int) -> TokenTable:
    """A caption per picture; prompt first, then the picture's placeholders, then the answer."""
    return TokenTable.write(folder, _samples(caption_lengths(num_samples, seed), seed))


def write_features(root: Path, num_pictures: int, seed: int) -> FeatureCache:
    """Normal random features of ViT-B/32's shape."""
    cache = FeatureCache(root, "random", (IMAGE_TOKENS, VISION_SIZE))
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, num_pictures, PICTURES_PER_SHARD):
        names = [digest(index) for index in range(start, min(num_pictures, start + PICTURES_PER_SHARD))]
        missing = cache.missing(names)
        if missing:
            shape = (len(missing), IMAGE_TOKENS, VISION_SIZE)
            cache.append(missing, torch.randn(shape, generator=generator).bfloat16())
    return cache


def _samples(answer_lengths: np.ndarray, seed: int) -> Iterator[EncodedSample]:
    random = np.random.default_rng([seed, 3])
    for index, length in enumerate(answer_lengths):
        prompt = random.integers(FIRST_TEXT_ID, VOCAB_SIZE, PROMPT_TOKENS)
        answer = random.integers(FIRST_TEXT_ID, VOCAB_SIZE, length)
        input_ids = np.concatenate([prompt, np.full(IMAGE_TOKENS, IMAGE_TOKEN_ID), answer]).astype(np.int32)
        labels = input_ids.copy()
        labels[:-length] = IGNORE
        yield EncodedSample(f"caption{index}", input_ids, labels, (digest(index),))
