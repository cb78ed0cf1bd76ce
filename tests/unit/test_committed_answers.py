"""Answers are committed batch by batch: a kill at any point loses and doubles nothing. No cluster."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from minivlm.inference.actors import Decoding
from minivlm.inference.committed import Work, finish_answers
from minivlm.inference.jobs import Answer, Request
from minivlm.schema import Message

GREEDY = Decoding(max_new_tokens=8)


class Killed(Exception):
    """Stands for the end of the process."""


class Model:
    """Answers with the question in capitals, and dies before it gives the batch numbered `dies_at`."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.dies_at = dies_at
        self.asked: Counter[str] = Counter()

    def __call__(self, blocks: Sequence[Sequence[Request]]) -> Iterator[list[Answer]]:
        for number, block in enumerate(reversed(blocks)):  # results arrive in another order than asked
            if number == self.dies_at:
                raise Killed
            self.asked.update(request.row_id for request in block)
            yield [Answer(r.row_id, r.messages[-1].content.upper(), (len(r.row_id),)) for r in block]


def work(folder: Path, name: str = "sft", *, word: str = "why", reference: str = "ab") -> Work:
    turns = [(Message("user", f"{name} {word} {number}"),) for number in range(10)]
    requests = [Request(f"real/{number}", Path("/export"), turn, ()) for number, turn in enumerate(turns)]
    return Work(folder / name, reference, requests)


def run(works: Sequence[Work], model: Model, batch_size: int = 3) -> list[dict[str, str]]:
    found = finish_answers(works, model, decoding=GREEDY, batch_size=batch_size, title="test")
    return [{row: answer.text for row, answer in answers.items()} for answers in found]


EXPECTED = [{f"real/{n}": f"{name} WHY {n}" for n in range(10)} for name in ("SFT", "MPO")]


@pytest.mark.parametrize("batches_before", range(8))
def test_a_kill_between_batches_loses_and_doubles_nothing(tmp_path: Path, batches_before: int) -> None:
    works = [work(tmp_path, "sft"), work(tmp_path, "mpo")]
    first, second = Model(dies_at=batches_before), Model()
    with pytest.raises(Killed):
        run(works, first)
    assert run(works, second) == EXPECTED
    assert first.asked + second.asked == Counter({f"{place}:real/{n}": 1 for place in (0, 1) for n in range(10)})
    assert run(works, Model(dies_at=0)) == EXPECTED


@pytest.mark.parametrize("commit", range(8))
def test_a_kill_in_a_commit_leaves_that_batch_to_be_asked_again(
    tmp_path: Path, commit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = [work(tmp_path, "sft"), work(tmp_path, "mpo")]
    calls = iter(range(100))

    def die(file: int) -> None:
        if next(calls) == commit:
            raise Killed

    first, second = Model(), Model()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", die)  # the temporary file is written, its name is not given
        with pytest.raises(Killed):
            run(works, first)
    assert run(works, second) == EXPECTED
    twice = [row for row, count in (first.asked + second.asked).items() if count == 2]
    assert 1 <= len(twice) <= 3
    assert set(first.asked) | set(second.asked) == {f"{place}:real/{n}" for place in (0, 1) for n in range(10)}


def test_the_works_beside_it_do_not_change_a_works_batches(tmp_path: Path) -> None:
    run([work(tmp_path, "mpo")], Model())
    model = Model()
    assert run([work(tmp_path, "sft"), work(tmp_path, "mpo")], model) == EXPECTED
    assert {row.partition(":")[0] for row in model.asked} == {"0"}


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: work(folder, reference="cd"),
        lambda folder: work(folder, word="how"),
        lambda folder: Work(folder / "sft", "ab", [replace(r, seed=1) for r in work(folder).requests]),
        lambda folder: Work(folder / "sft", "ab", [replace(r, response_prefix=(7,)) for r in work(folder).requests]),
    ],
    ids=["weights", "prompts", "seeds", "prefixes"],
)
def test_answers_of_other_questions_or_weights_are_not_taken(tmp_path: Path, change) -> None:
    run([work(tmp_path)], Model())
    model = Model()
    run([change(tmp_path)], model)
    assert len(model.asked) == 10


def test_a_batch_that_never_comes_back_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="10 answers are missing, first 0:real/0"):
        finish_answers([work(tmp_path)], lambda blocks: iter(()), decoding=GREEDY, batch_size=3, title="test")
