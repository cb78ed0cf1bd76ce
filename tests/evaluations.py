"""Evaluation folders as the evaluation writes them, from rows scored by hand."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minivlm.evaluation.results import write_results
from minivlm.evaluation.summary import Reply, ScoredRow, score_question, summarize
from minivlm.evaluation.tasks import Question
from minivlm.schema import Message


def scored(
    number: int,
    task: str,
    answer: str,
    truth: str,
    picture: Path,
    *,
    shuffled: str | None = "blue",
    question: str = "Which colour?",
    language: str = "en",
) -> ScoredRow:
    """One answered question about one picture; `shuffled` is the answer with another one (None: not asked)."""
    messages = (Message("user", f"<image>\n{question}"),)
    images, digests = (str(picture),), (f"{number:064}",)
    scorer = "caption_tokens" if task == "caption" else "short_answer"
    asked = Question(f"q{number}", task, language, images, digests, messages, truth, truth, scorer)
    others = {"shuffled": Reply(shuffled, (1,))} if shuffled is not None else {}
    return score_question(asked, Reply(answer, (1, 2)), others, encode=lambda text: [1, 2], max_new_tokens=8)


def save_evaluation(
    folder: Path,
    name: str,
    rows: Sequence[ScoredRow],
    *,
    questions: str = "same",
    checkpoint: Path | None = None,
    attention: Mapping[int, Mapping[str, Any]] | None = None,
) -> Path:
    """Write the folder; `checkpoint` is that of a stage (None: an export from elsewhere)."""
    head = {
        "name": name,
        "stage": None if checkpoint is None else name,
        "checkpoint": str(checkpoint or folder),
        "reference": "ab12",
        "questions": questions,
        "num_questions": len(rows),
    }
    write_results(folder, rows, head | summarize(rows, {"shuffled": {}}), attention=attention or {})
    return folder
