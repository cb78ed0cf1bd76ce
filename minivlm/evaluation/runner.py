"""Ask a stage's checkpoint the held-out questions, with the right and with shuffled pictures, in one Ray Data job.

Called by the evaluate job and the pipeline. Several stages share one job, so the actors start once. What it writes:

    evaluations/STAGE-H/samples.jsonl   one line per question: prompt, truth, answers, scores
    evaluations/STAGE-H/results.json    the figures; written last, so that it exists only when all is complete
"""

import time
from collections.abc import Sequence
from pathlib import Path

from minivlm.config import Config, StageName
from minivlm.data.errors import DataError
from minivlm.data.pipeline import prepare_features
from minivlm.data.samples import load_samples
from minivlm.evaluation.results import is_evaluated, write_results
from minivlm.evaluation.summary import Reply, ScoredRow, score_question, summarize
from minivlm.evaluation.tasks import Question, select_questions
from minivlm.inference.actors import Decoding
from minivlm.inference.exports import StageExport, stage_export
from minivlm.inference.jobs import Request, answer_blocks, make_blocks
from minivlm.layout import evaluation_dir, samples_dir, tower_path
from minivlm.log import Progress, get_logger
from minivlm.model.tokenizer import encode_text, load_tokenizer
from minivlm.storage import content_hash

_log = get_logger(__name__)


def evaluate(config: Config, stage: StageName) -> Path:
    """`evaluate_all` for one stage."""
    return evaluate_all(config, [stage])[0]


def evaluate_all(config: Config, stages: Sequence[StageName]) -> list[Path]:
    """Evaluate finished stages that were not evaluated yet; greedy, so the same result every time.

    Returns:
        The evaluation folder of each stage, in the order asked.

    Raises:
        FileNotFoundError: a stage has no finished run.
        DataError: no test question.
        RuntimeError: a question came back without an answer (nothing is scored then).
    """
    pending = [stage for stage in stages if not is_evaluated(evaluation_dir(config, stage))]
    if pending:
        exports = [stage_export(config, stage) for stage in pending]
        questions = _questions(config)
        started = time.monotonic()
        replies = _run(config, exports, questions)
        seconds = time.monotonic() - started
        for export in exports:
            _write(config, export, questions, replies)
        _log.info("%d answers of %d checkpoint(s) in %.1f s", len(replies), len(exports), seconds)
    return [evaluation_dir(config, stage) for stage in stages]


def _questions(config: Config) -> list[Question]:
    samples = load_samples(samples_dir(config), split="test")
    limit = config.evaluation.max_questions_per_task
    questions = select_questions(samples, max_per_task=limit, seed=config.seed)
    if not questions:
        raise DataError(
            f"{samples_dir(config)} has no test question. Give a source of data.sft `split: test`, or raise "
            "data.test_fraction so that `split: auto` keeps pictures for the test"
        )
    return questions


def _run(config: Config, exports: Sequence[StageExport], questions: Sequence[Question]) -> dict[str, Reply]:
    """Replies by row id STAGE/VARIANT/NUMBER."""
    requests = [request for export in exports for request in _requests(export, questions)]
    blocks = make_blocks(requests, config.evaluation.batch_size)
    decoding = Decoding(max_new_tokens=config.evaluation.max_new_tokens)
    shown = {digest for request in requests for digest in request.image_sha256}
    features = prepare_features(config, tower_path(config), shown).directory
    replies: dict[str, Reply] = {}
    with Progress(len(requests), "evaluate") as progress:
        for answers in answer_blocks(blocks, features_dir=features, decoding=decoding, pool=config.evaluation):
            replies |= {answer.row_id: Reply(answer.text, answer.token_ids) for answer in answers}
            progress.update(len(answers))
    missing = [request.row_id for request in requests if request.row_id not in replies]
    if missing:
        raise RuntimeError(f"{len(missing)} of {len(requests)} answers are missing, first {missing[0]}: run again")
    return replies


def _requests(export: StageExport, questions: Sequence[Question]) -> list[Request]:
    requests = []
    for number, question in enumerate(questions):
        pictures = {"real": question.image_sha256, "shuffled": question.wrong_sha256}
        requests += [
            Request(
                row_id=f"{export.stage}/{variant}/{number}",
                export_dir=export.export_dir,
                messages=question.messages,
                image_sha256=digests,
                weight=len(question.reference) // 16,
            )
            for variant, digests in pictures.items()
            if digests is not None
        ]
    return requests


def _write(config: Config, export: StageExport, questions: Sequence[Question], replies: dict[str, Reply]) -> None:
    tokenizer = load_tokenizer(str(export.export_dir))
    rows: list[ScoredRow] = [
        score_question(
            question,
            replies[f"{export.stage}/real/{number}"],
            replies.get(f"{export.stage}/shuffled/{number}"),
            encode=lambda text: encode_text(tokenizer, text),
            max_new_tokens=config.evaluation.max_new_tokens,
        )
        for number, question in enumerate(questions)
    ]
    results = {
        "name": export.stage,
        "stage": export.stage,
        "checkpoint": str(export.checkpoint_dir),
        "reference": export.reference,
        "questions": content_hash([[vars(question) for question in questions], config.evaluation.max_new_tokens]),
        "num_questions": len(questions),
    }
    write_results(evaluation_dir(config, export.stage), rows, results | summarize(rows))
