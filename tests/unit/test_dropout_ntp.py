"""Answers cut between tokens and continued without the picture; with a tiny export where a model is needed."""

from pathlib import Path

import pyarrow as pa
import pytest
import torch

from minivlm.data.chat import encode_prompt
from minivlm.data.features import FeatureCache
from minivlm.data.tokenizer import encode_text, load_tokenizer
from minivlm.inference.actors import Decoding, Generator
from minivlm.inference.jobs import Request, to_table
from minivlm.preferences.dropout_ntp import blind_messages, cut_answer, judge_continuation
from minivlm.schema import Message
from tests.tiny_export import NUM_IMAGE_TOKENS, WIDTH, build_export

ENGLISH, CHINESE = "a red circle and a blue square", "红色的圆在左边，蓝色的方块在右边。"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_export(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(export: Path):
    return load_tokenizer(export)


@pytest.mark.parametrize("text", [ENGLISH, CHINESE])
@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.5, 0.9])
def test_a_prefix_is_never_empty_nor_the_whole_nor_half_a_character(text: str, ratio: float, tokenizer) -> None:
    ids = encode_text(tokenizer, text)
    prefix = cut_answer(ids, tokenizer, ratio=ratio)
    known = tokenizer.decode(list(prefix))
    assert prefix == tuple(ids[: len(prefix)])
    assert text.startswith(known)
    assert len(prefix) <= max(1, int(len(ids) * ratio))
    assert known == "" if not prefix else 0 < len(known) < len(text)
    assert prefix or ratio == 0.01  # a first Chinese character may be several tokens


def test_a_half_of_a_chinese_answer_is_about_half_of_it(tokenizer) -> None:
    ids = encode_text(tokenizer, CHINESE)
    prefix = cut_answer(ids, tokenizer, ratio=0.5)
    assert len(ids) // 2 - 2 <= len(prefix) <= len(ids) // 2


@pytest.mark.parametrize("text", ["", "a"])
def test_too_short_an_answer_is_not_cut(text: str, tokenizer) -> None:
    assert cut_answer(encode_text(tokenizer, text), tokenizer, ratio=0.5) == ()


@pytest.mark.parametrize(
    ("continuation", "rejected", "reason"),
    [
        (" and a green star", "a red circle and a green star", ""),
        (" and a blue square", None, "continuation_identical"),
        (" and a blue square ", None, "continuation_identical"),
        ("", None, "continuation_empty"),
        (" \n", None, "continuation_empty"),
    ],
)
def test_a_continuation_must_say_something_else(
    continuation: str, rejected: str | None, reason: str, tokenizer
) -> None:
    prefix = encode_text(tokenizer, "a red circle")
    ids = prefix + encode_text(tokenizer, " and a blue square")
    written = encode_text(tokenizer, continuation) if continuation else []
    assert judge_continuation(ids, prefix, written, tokenizer) == (rejected, reason)


def test_half_a_character_is_no_text_to_learn_from(tokenizer) -> None:
    whole = encode_text(tokenizer, "红")
    rare = encode_text(tokenizer, "瑟")
    assert len(rare) > 1
    assert judge_continuation(whole * 3, whole, rare[:1], tokenizer) == (None, "continuation_broken_text")


def test_the_blind_prompt_has_no_picture(tokenizer) -> None:
    turns = (Message("system", "Be short."), Message("user", "<image>\n<image>\nWhat differs in <image>?"))
    blind = blind_messages(turns)
    assert [turn.content for turn in blind] == ["Be short.", "What differs in ?"]
    ids = encode_prompt(tokenizer, blind, NUM_IMAGE_TOKENS, num_images=0)
    assert tokenizer.convert_tokens_to_ids("<image>") not in ids


def test_an_actor_continues_a_prefix_as_it_would_have_gone_on(export: Path, tmp_path: Path) -> None:
    """Greedy: behind the first five tokens of its own answer the model writes the others."""
    cache = FeatureCache(tmp_path, "none", (NUM_IMAGE_TOKENS, WIDTH))
    cache.append(["a" * 64], torch.zeros(1, NUM_IMAGE_TOKENS, WIDTH, dtype=torch.bfloat16))
    generator = Generator(str(cache.directory), Decoding(max_new_tokens=12), "cpu", 1)

    def ask(prefix: tuple[int, ...], question: str, images: tuple[str, ...] = ()) -> list[int]:
        request = Request("a", export, (Message("user", question),), images, response_prefix=prefix)
        table: pa.Table = generator(to_table([request]))
        return list(table.to_pylist()[0]["token_ids"])

    whole = ask((), "How many shapes?")
    assert len(whole) > 5
    start = tuple(whole[:5])
    assert ask(start, "How many shapes?")[: len(whole) - 5] == whole[5:]
    assert ask(start, "<image>\nHow many shapes?", ("a" * 64,)) != ask(start, "How many shapes?")
