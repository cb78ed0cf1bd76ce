"""Ask models the held-out questions, as they are and in the variants, in one Ray Data job.

Called by the evaluate job, the pipeline and the ablation. Several models share one job, so the actors start once. What
it writes:

    evaluations/NAME-H/answers/00000.json   one decoding batch; a killed job continues behind the finished ones
    evaluations/NAME-H/samples.jsonl        one line per question: prompt, truth, answers, scores
    evaluations/NAME-H/results.json         the figures; written last, so that it exists only when all is complete
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from minivlm.config import Config, StageName
from minivlm.data.chat import encode_prompt
from minivlm.data.errors import DataError
from minivlm.data.pipeline import iter_training_rows
from minivlm.data.samples import load_samples
from minivlm.data.settings import image_limits, num_image_tokens
from minivlm.evaluation.benchmarks.load import BenchmarkAccount, load_benchmarks
from minivlm.evaluation.compare import check_names, choose_baseline, write_comparisons
from minivlm.evaluation.heatmap import choose_questions, describe
from minivlm.evaluation.pictures import prepare_pictures
from minivlm.evaluation.results import is_evaluated, write_results
from minivlm.evaluation.robustness import transform_pictures
from minivlm.evaluation.shots import Pools, check_context, example_pools
from minivlm.evaluation.summary import Reply, ScoredRow, score_question, summarize
from minivlm.evaluation.tasks import CAPTION, Question, select_questions
from minivlm.evaluation.variants import REAL, ROBUSTNESS, Material, Variants, ask_all
from minivlm.inference.actors import Decoding
from minivlm.inference.attention import Answered, look
from minivlm.inference.committed import Work, finish_answers
from minivlm.inference.exports import StageExport, check_tower, stage_export
from minivlm.inference.jobs import Answer, Request, answer_blocks
from minivlm.layout import SCORING, evaluation_dir, samples_dir, tokenizer_path
from minivlm.log import get_logger
from minivlm.model.tokenizer import encode_text, load_tokenizer
from minivlm.storage import content_hash

_log = get_logger(__name__)


def evaluate(config: Config, stage: StageName) -> Path:
    """`evaluate_exports` for one stage."""
    return evaluate_exports(config, [stage_export(config, stage)])[0]


def evaluate_exports(config: Config, exports: Sequence[StageExport]) -> list[Path]:
    """Evaluate those that were not evaluated yet, side by side; greedy, so the same result every time.

    Several are then compared with evaluation.baseline, question by question.

    Returns:
        The evaluation folder of each export, in the order given.

    Raises:
        ConfigError: two exports of one name, a baseline that is none of them, or one that sees through another vision
            tower.
        DataError: no test question.
        RuntimeError: a question came back without an answer (nothing is scored then).
    """
    names = check_names([export.name for export in exports])
    baseline = choose_baseline(names, config.evaluation.baseline) if len(names) > 1 else None
    folders = [evaluation_dir(config, export.name, export.reference) for export in exports]
    pending = [(export, folder) for export, folder in zip(exports, folders, strict=True) if not is_evaluated(folder)]
    if pending:
        questions, benchmarks = held_out_questions(config)
        variants, elsewhere = _variants(config, questions)
        for export, _ in pending:
            _check_shots(config, export, questions, variants)
        started = time.monotonic()
        found = _answer(config, pending, questions, variants, elsewhere)
        seconds = time.monotonic() - started
        maps = _look(config, [export for export, _ in pending], questions, found)
        for (export, folder), answers, own in zip(pending, found, maps, strict=True):
            _write(config, export, folder, questions, variants, answers, benchmarks, own)
        total = sum(len(answers) for answers in found)
        _log.info("%d answers of %d checkpoint(s) in %.1f s", total, len(pending), seconds)
    if baseline is not None:
        write_comparisons(folders, baseline)
    return folders


def questions_key(questions: Sequence[Question], max_new_tokens: int) -> str:
    """Stands for the questions and how answers to them are scored; scores are comparable only where it is equal."""
    return content_hash([SCORING, [vars(question) for question in questions], max_new_tokens])


def held_out_questions(config: Config) -> tuple[list[Question], BenchmarkAccount]:
    """Of the test split, then of the benchmarks; and what became of the benchmarks' rows.

    What is too long to ask says the configuration's tokenizer, so that every model is asked the same.
    """
    samples = load_samples(samples_dir(config), split="test")
    limit = config.evaluation.max_questions_per_task
    questions = select_questions(samples, max_per_task=limit, seed=config.seed)
    if not questions:
        raise DataError(
            f"{samples_dir(config)} has no test question. Give a source of data.sft `split: test`, or raise "
            "data.test_fraction so that `split: auto` keeps pictures for the test"
        )
    if not config.evaluation.benchmarks:
        return questions, {}
    tokenizer, places = load_tokenizer(tokenizer_path(config)), num_image_tokens(config)
    more, account = load_benchmarks(
        config,
        taken={question.task for question in questions},
        count_tokens=lambda messages: len(encode_prompt(tokenizer, messages, places)),
    )
    return [*questions, *more], account


def _variants(config: Config, questions: Sequence[Question]) -> tuple[Variants, dict[str, str]]:
    """How everything is asked, and where the pictures lie that no prepared row has (digest -> path)."""
    settings = config.evaluation
    pictures = dict(pair for q in questions for pair in zip(q.image_sha256, q.images, strict=True))
    kinds = [kind for kind in ROBUSTNESS if kind in settings.variants]
    made = transform_pictures(config, pictures, kinds)
    worse = {kind: {digest: new for digest, (new, _) in kept.items()} for kind, kept in made.items()}
    elsewhere = dict(pair for kept in made.values() for pair in kept.values())
    for question in questions:
        if question.source:
            elsewhere |= dict(zip(question.image_sha256, question.images, strict=True))
    pools: Pools = {}
    if "few_shot" in settings.variants:
        stages = ("sft", "pretrain") if any(question.task == CAPTION for question in questions) else ("sft",)
        rows = (sample for stage in stages for sample, _, _ in iter_training_rows(config, stage, once=True))
        pools = example_pools(rows, questions, config.seed)
    material = Material(worse, pools, settings.num_shots, config.seed)
    return ask_all(questions, settings.variants, material), elsewhere


def _check_shots(config: Config, export: StageExport, questions: Sequence[Question], variants: Variants) -> None:
    settings = config.evaluation
    if ways := variants.asked.get("few_shot"):
        named = {f"{questions[number].task}/{questions[number].question_id}": ways[number].messages for number in ways}
        check_context(export, named, num_shots=settings.num_shots, max_new_tokens=settings.max_new_tokens)


def _answer(
    config: Config,
    pending: Sequence[tuple[StageExport, Path]],
    questions: Sequence[Question],
    variants: Variants,
    elsewhere: Mapping[str, str],
) -> list[dict[str, Answer]]:
    """Answers of each pending export by row id VARIANT/NUMBER."""
    decoding = Decoding(max_new_tokens=config.evaluation.max_new_tokens)
    works = [
        Work(folder / "answers", export.reference, _requests(export, questions, variants)) for export, folder in pending
    ]

    def answer(blocks: Sequence[Sequence[Request]]) -> Iterator[list[Answer]]:
        shown = {digest for block in blocks for request in block for digest in request.image_sha256}
        features = prepare_pictures(config, elsewhere, shown)
        for export, _ in pending:
            check_tower(export, features.fingerprint, config.clip.encode_precision, config.clip.encode_batch_size)
        return answer_blocks(blocks, features_dir=features.directory, decoding=decoding, pool=config.evaluation)

    size = config.evaluation.batch_size
    return finish_answers(works, answer, decoding=decoding, batch_size=size, title="evaluate")


def _requests(export: StageExport, questions: Sequence[Question], variants: Variants) -> list[Request]:
    return [
        Request(
            row_id=f"{variant}/{number}",
            export_dir=export.export_dir,
            messages=way.messages,
            image_sha256=way.image_sha256,
            weight=len(questions[number].reference) // 16,
        )
        for variant, ways in variants.asked.items()
        for number, way in ways.items()
    ]


def _look(
    config: Config, exports: Sequence[StageExport], questions: Sequence[Question], found: Sequence[Mapping[str, Answer]]
) -> list[dict[int, dict[str, Any]]]:
    """Where the answers to a few questions looked: for each export, by the question's number."""
    chosen = choose_questions(questions, config.evaluation.heat_maps)
    if not chosen:
        return [{} for _ in exports]
    asked = []
    for export, answers in zip(exports, found, strict=True):
        own = [(questions[number], answers[f"{REAL}/{number}"].text) for number in chosen]
        asked.append((export.export_dir, [Answered(q.messages, q.images, q.image_sha256, text) for q, text in own]))
    looked = look(asked, image_limits(config), config.evaluation)
    maps = [
        {n: describe(seen.seen, seen.grids, seen.share) for n, seen in zip(chosen, own, strict=True) if seen}
        for own in looked
    ]
    return [{number: told for number, told in own.items() if told} for own in maps]


def _write(
    config: Config,
    export: StageExport,
    folder: Path,
    questions: Sequence[Question],
    variants: Variants,
    answers: Mapping[str, Answer],
    benchmarks: BenchmarkAccount,
    attention: Mapping[int, Mapping[str, Any]],
) -> None:
    tokenizer = load_tokenizer(str(export.export_dir))
    replies = {row_id: Reply(answer.text, answer.token_ids) for row_id, answer in answers.items()}
    rows: list[ScoredRow] = [
        score_question(
            question,
            replies[f"{REAL}/{number}"],
            {name: replies[f"{name}/{number}"] for name in variants.skipped if number in variants.asked[name]},
            encode=lambda text: encode_text(tokenizer, text),
            max_new_tokens=config.evaluation.max_new_tokens,
        )
        for number, question in enumerate(questions)
    ]
    results = {
        "name": export.name,
        "stage": export.stage,
        "checkpoint": str(export.checkpoint_dir),
        "reference": export.reference,
        "questions": questions_key(questions, config.evaluation.max_new_tokens),
        "num_questions": len(questions),
        "benchmarks": benchmarks,
        "comparisons": {},
    }
    write_results(folder, rows, results | summarize(rows, variants.skipped), attention=attention)
