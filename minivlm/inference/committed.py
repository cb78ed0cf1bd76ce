"""Answers that survive a kill: each decoding batch is committed as it comes, and the same call asks only for the rest.

    FOLDER/00000.json   {key, answers: {row_id: [text, token ids]}} of one decoding batch

Preference sampling and evaluation both go this way. The way of answering is an argument, so nothing here needs Ray.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from minivlm.inference.actors import Decoding
from minivlm.inference.jobs import Answer, Request, make_blocks
from minivlm.log import Progress
from minivlm.storage import content_hash, write_json

AnswerBlocks = Callable[[Sequence[Sequence[Request]]], Iterator[list[Answer]]]
"""Decoding batches -> the answers of whole batches, in any order."""


@dataclass(frozen=True)
class Work:
    """Requests for one export, and the folder that keeps their answers. `reference` names the export's weights."""

    folder: Path
    reference: str
    requests: Sequence[Request]


def finish_answers(
    works: Sequence[Work], answer: AnswerBlocks, *, decoding: Decoding, batch_size: int, title: str
) -> list[dict[str, Answer]]:
    """Answer all requests of all works in one go; what lies complete in their folders is read instead.

    A stored batch belongs to its very prompts, pictures, seeds, decoding and weights; any other is asked again. How
    the requests of a work are split does not depend on the works beside it.

    Args:
        answer: called once, with the batches that are still to be done; row ids are unique among all works.
        batch_size: requests decoded together.
        title: what the progress display calls it.

    Returns:
        The answers of each work by row id, every request's exactly once.

    Raises:
        RuntimeError: a request came back without an answer.
    """
    answers: list[dict[str, Answer]] = [{} for _ in works]
    waiting: dict[frozenset[str], tuple[int, Path, str]] = {}
    todo: list[list[Request]] = []
    for place, work in enumerate(works):
        for number, block in enumerate(make_blocks(work.requests, batch_size)):
            path = work.folder / f"{number:05}.json"
            key = _key(work.reference, decoding, block)
            stored: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"key": None}
            if stored["key"] == key:
                answers[place] |= {row: Answer(row, text, tuple(ids)) for row, (text, ids) in stored["answers"].items()}
                continue
            todo.append([replace(request, row_id=f"{place}:{request.row_id}") for request in block])
            waiting[frozenset(request.row_id for request in todo[-1])] = (place, path, key)
    with Progress(sum(len(block) for block in todo), title) as progress:
        for done in answer(todo) if todo else ():
            place, path, key = waiting.pop(frozenset(item.row_id for item in done))
            own = [replace(item, row_id=item.row_id.partition(":")[2]) for item in done]
            write_json(path, {"key": key, "answers": {item.row_id: [item.text, item.token_ids] for item in own}})
            answers[place] |= {item.row_id: item for item in own}
            progress.update(len(own))
    if waiting:
        rows = sorted(row for block in waiting for row in block)
        raise RuntimeError(f"{len(rows)} answers are missing, first {rows[0]}: run the same command again")
    return answers


def _key(reference: str, decoding: Decoding, block: Sequence[Request]) -> str:
    rows = [[r.row_id, r.seed, r.image_sha256, [asdict(turn) for turn in r.messages], r.response_prefix] for r in block]
    return content_hash([reference, asdict(decoding), rows])
