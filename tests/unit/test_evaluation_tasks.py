"""Which questions are asked, and that the shuffled variant never shows the right picture."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from minivlm.evaluation.tasks import Question, select_questions, shuffle_pictures
from minivlm.schema import Message, Sample


def question(number: int, task: str, pictures: tuple[str, ...]) -> Question:
    messages = (Message("user", "<image>" * len(pictures) + "What?"),)
    return Question(f"q{number}", task, "en", pictures, pictures, messages, "red", "red")


def sample(sample_id: str, stage: str, task: str, picture: str, text: str = "<image>What?") -> Sample:
    messages = (Message("user", text), Message("assistant", "It is red."))
    return Sample(sample_id, (f"/{picture}",), (picture,), messages, stage, "test", task, answer="red")


PICTURES = st.lists(st.sampled_from("abcdef"), min_size=0, max_size=2).map(tuple)


@given(st.lists(st.tuples(st.sampled_from(["colour", "count"]), PICTURES), max_size=30), st.integers(0, 5))
def test_shuffled_pictures_are_a_derangement(rows: list[tuple[str, tuple[str, ...]]], seed: int) -> None:
    questions = [question(i, task, pictures) for i, (task, pictures) in enumerate(rows)]
    shuffled = shuffle_pictures(questions, seed=seed)
    for q in shuffled:
        group = {r.image_sha256 for r in questions if r.task == q.task and len(r.images) == len(q.images)}
        if not q.images or len(group) == 1:
            assert q.wrong_sha256 is None
        else:
            assert q.wrong_sha256 in group - {q.image_sha256}
    moves = {(q.task, len(q.images), q.image_sha256, q.wrong_sha256) for q in shuffled if q.wrong_sha256}
    assert set(Counter((t, n, wrong) for t, n, _, wrong in moves).values()) <= {1}


def test_shuffling_depends_on_the_seed_only() -> None:
    questions = [question(i, "colour", (str(i),)) for i in range(20)]
    first = [q.wrong_sha256 for q in shuffle_pictures(questions, seed=0)]
    assert [q.wrong_sha256 for q in shuffle_pictures(questions[::-1], seed=0)][::-1] == first
    assert [q.wrong_sha256 for q in shuffle_pictures(questions, seed=1)] != first


def test_questions_are_sft_tasks_and_captions_of_any_stage() -> None:
    samples = [
        sample("1", "sft", "colour", "a"),
        sample("2", "pretrain", "caption", "a"),
        sample("3", "prompts", "reasoning", "a"),
    ]
    assert [q.question_id for q in select_questions(samples, max_per_task=None, seed=0)] == ["2", "1"]


def test_the_truth_is_not_in_the_prompt() -> None:
    (q,) = select_questions([sample("1", "sft", "colour", "a")], max_per_task=None, seed=0)
    assert [m.role for m in q.messages] == ["user"]
    assert (q.truth, q.reference) == ("red", "It is red.")


def test_the_same_question_about_the_same_picture_is_asked_once() -> None:
    samples = [sample("1", "sft", "colour", "a"), sample("2", "sft", "colour", "a"), sample("3", "sft", "colour", "b")]
    assert [q.question_id for q in select_questions(samples, max_per_task=None, seed=0)] == ["1", "3"]


def test_a_cap_takes_the_same_questions_every_time() -> None:
    samples = [sample(f"{i:02}", "sft", "colour", str(i)) for i in range(50)]
    first = [q.question_id for q in select_questions(samples, max_per_task=5, seed=0)]
    assert len(first) == 5
    assert [q.question_id for q in select_questions(samples[::-1], max_per_task=5, seed=0)] == first
