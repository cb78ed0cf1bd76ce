"""Preference pairs for the MPO stage: the SFT model answers training questions, a verifier says which are right.

Called by the preferences job. What `build_pairs` writes:

    pairs/H/answers/00000.json   answers of one decoding batch; a killed job continues behind the finished ones
    pairs/H/mmpr.jsonl, mmpr_meta.json   the pairs in MMPR's own format
    pairs/H/pairs.parquet        PreferencePair rows
    pairs/H/summary.json         counts and reasons; written last, so that it exists only when all is complete

Pairs that the user brings (data.mpo) are taken over as they are.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minivlm.config import Config, ConfigError
from minivlm.data.draw import drawn_pairs
from minivlm.data.errors import DataError
from minivlm.data.pipeline import draw_rows, iter_training_rows, prepare_features
from minivlm.inference.actors import Decoding
from minivlm.inference.committed import Work, finish_answers
from minivlm.inference.exports import StageExport, stage_export
from minivlm.inference.jobs import Answer, Request, answer_blocks
from minivlm.layout import pairs_dir, samples_dir, tower_path
from minivlm.log import get_logger
from minivlm.preferences.files import write_mmpr, write_pairs
from minivlm.preferences.pairs import choose_pairs, keep_minority
from minivlm.schema import PreferencePair, Sample
from minivlm.scoring.answers import MARKER
from minivlm.storage import write_json

_log = get_logger(__name__)


@dataclass(frozen=True)
class Prompt:
    """A single-turn question with a known truth. `reasoned` = the answer must end in `Final answer: ..`."""

    sample: Sample
    truth: str
    reasoned: bool


def build_pairs(config: Config) -> Path:
    """Build or take over the pairs of this configuration, once.

    Returns:
        The pairs folder.

    Raises:
        FileNotFoundError: no finished SFT run.
        DataError: no question with a known answer.
        ConfigError: fewer than preferences.min_pairs came out.
    """
    folder = pairs_dir(config)
    if (folder / "summary.json").exists():
        return folder
    if config.data.mpo:
        pairs = drawn_pairs(samples_dir(config), draw_rows(config, "mpo"))
        write_pairs(folder / "pairs.parquet", pairs)
        write_json(folder / "summary.json", {"source": "data.mpo", "num_pairs": len(pairs), **_lengths(pairs)})
        return folder
    export = stage_export(config, "sft")
    prompts, skipped = select_prompts(config)
    texts = _sample_answers(config, export, prompts)
    pairs, summary = make_pairs(config, prompts, texts)
    summary |= {"source": "sampled", "prompts_skipped": dict(skipped), "sampled_by": export.reference}
    if len(pairs) < config.preferences.min_pairs:
        raise ConfigError(
            f"Only {len(pairs)} preference pairs came out of {len(prompts)} questions x "
            f"{config.preferences.num_samples} answers, preferences.min_pairs is {config.preferences.min_pairs}. "
            f"{_advice(summary)}"
        )
    write_mmpr(folder, pairs)
    write_pairs(folder / "pairs.parquet", pairs)
    write_json(folder / "summary.json", summary)
    right = 100 * summary["accuracy"]
    _log.info("%d pairs from %d questions, %.1f %% of the sampled answers right", len(pairs), len(prompts), right)
    return folder


def select_prompts(config: Config) -> tuple[list[Prompt], Counter[str]]:
    """Questions to sample answers for: training rows of `prompts`, else of SFT; only those with a known answer.

    Returns:
        Prompts by id, at most preferences.max_questions (a seeded choice), and why others were left out.

    Raises:
        DataError: none is left.
    """
    stages = ("prompts", "sft")
    samples = next((rows for stage in stages if (rows := [*iter_training_rows(config, stage, once=True)])), [])
    skipped: Counter[str] = Counter()
    prompts: dict[tuple[Any, ...], Prompt] = {}
    for sample in sorted((row[0] for row in samples), key=lambda s: _stable(f"{config.seed}/{s.sample_id}")):
        turns = [message for message in sample.messages if message.role == "user"]
        if sample.answer is None:
            skipped["no_known_answer"] += 1
        elif len(turns) != 1 or sample.messages[0].role != "user":
            skipped["not_single_turn"] += 1
        elif (sample.image_sha256, turns[0]) in prompts:
            skipped["asked_twice"] += 1
        elif config.preferences.max_questions is not None and len(prompts) >= config.preferences.max_questions:
            skipped["over_max_questions"] += 1
        else:
            reasoned = any(MARKER.search(message.content) for message in sample.messages)
            prompts[sample.image_sha256, turns[0]] = Prompt(sample, sample.answer, reasoned)
    if not prompts:
        raise DataError(
            f"None of the {len(samples)} training questions in {samples_dir(config)} can be verified "
            f"({dict(skipped)}). Give rows an `answer`, list a source under data.prompts, or bring pairs under data.mpo"
        )
    return sorted(prompts.values(), key=lambda prompt: prompt.sample.sample_id), skipped


def make_pairs(
    config: Config, prompts: Sequence[Prompt], texts: Sequence[Sequence[str]]
) -> tuple[list[PreferencePair], dict[str, Any]]:
    """Apply the pair rules to all questions.

    Args:
        texts: sampled answers of each prompt.

    Returns:
        Pairs in the order of the prompts, and the counts for summary.json.
    """
    pairs: list[PreferencePair] = []
    drops: Counter[str] = Counter()
    verdicts: Counter[str] = Counter()
    for prompt, answers in zip(prompts, texts, strict=True):
        sample = prompt.sample
        made = choose_pairs(
            answers,
            prompt.truth,
            reasoned=prompt.reasoned,
            max_pairs=config.preferences.max_pairs_per_question,
            seed=f"{config.seed}/{sample.sample_id}",
        )
        drops += made.drops
        verdicts += made.verdicts
        question = next(message.content for message in sample.messages if message.role == "user")
        for number, choice in enumerate(made.pairs):
            pairs.append(
                PreferencePair(
                    pair_id=f"{sample.sample_id}-{number}",
                    images=sample.images,
                    image_sha256=sample.image_sha256,
                    question=question,
                    chosen=choice.chosen,
                    rejected=choice.rejected,
                    answer=prompt.truth,
                    kind=choice.kind,
                )
            )
    kept = keep_minority([pair.kind for pair in pairs], seed=config.seed)
    drops["format_over_minority"] += len(pairs) - len(kept)
    pairs = [pairs[i] for i in kept]
    total = verdicts.total()
    summary = {
        "num_pairs": len(pairs),
        "kinds": dict(Counter(pair.kind for pair in pairs)),
        "num_questions": len(prompts),
        "num_samples": total,
        "accuracy": verdicts["right"] / total,
        "malformed": verdicts["malformed"] / total,
        "drops": {reason: count for reason, count in sorted(drops.items()) if count},
    }
    return pairs, summary | _lengths(pairs)


def _sample_answers(config: Config, export: StageExport, prompts: Sequence[Prompt]) -> list[list[str]]:
    """Answers of each prompt, in the order of their number; finished batches are read, the others asked for."""
    settings = config.preferences
    decoding = Decoding(settings.max_new_tokens, settings.temperature, settings.top_k)

    def answer(blocks: Sequence[Sequence[Request]]) -> Iterator[list[Answer]]:
        shown = {digest for block in blocks for request in block for digest in request.image_sha256}
        features = prepare_features(config, tower_path(config), shown).directory
        return answer_blocks(blocks, features_dir=features, decoding=decoding, pool=config.evaluation)

    work = Work(pairs_dir(config) / "answers", export.reference, _requests(config, export, prompts))
    [found] = finish_answers([work], answer, decoding=decoding, batch_size=settings.batch_size, title="sample answers")
    return [[found[f"{i}/{number}"].text for number in range(settings.num_samples)] for i in range(len(prompts))]


def _requests(config: Config, export: StageExport, prompts: Sequence[Prompt]) -> list[Request]:
    return [
        Request(
            row_id=f"{index}/{number}",
            export_dir=export.export_dir,
            messages=tuple(message for message in prompt.sample.messages if message.role == "user"),
            image_sha256=prompt.sample.image_sha256,
            seed=_stable(f"{config.seed}/{prompt.sample.sample_id}/{number}"),
        )
        for index, prompt in enumerate(prompts)
        for number in range(config.preferences.num_samples)
    ]


def _stable(text: str) -> int:
    """A 31-bit number that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def _lengths(pairs: Sequence[PreferencePair]) -> dict[str, float]:
    """Mean length of chosen and rejected answers, in characters: a large gap would teach length instead of truth."""
    count = max(len(pairs), 1)
    return {
        "mean_chosen_characters": sum(len(pair.chosen) for pair in pairs) / count,
        "mean_rejected_characters": sum(len(pair.rejected) for pair in pairs) / count,
    }


def _advice(summary: dict[str, Any]) -> str:
    if summary["accuracy"] == 0:
        return "No sampled answer was right: train SFT longer (train.sft.epochs=4) or ask easier questions"
    return "Add preferences.num_samples=16, preferences.temperature=1.2 or more questions with a known answer"
