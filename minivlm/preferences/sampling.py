"""Preference pairs for the MPO stage: a model answers training questions, a verifier says which answers are right.

Called by the preferences job. What `build_pairs` writes:

    pairs/H/answers/00000.json     answers of one decoding batch; a killed job continues behind the finished ones
    pairs/H/open/.., blind/..      the same for open questions, and for their answers continued without the picture
    pairs/H/*_rules.jsonl, minivlm_dropout_ntp.jsonl, mmpr_meta.json   the pairs in MMPR's own format, by their kind
    pairs/H/unsolved.jsonl, unsolved_meta.json   questions that no answer was right for, as data.prompts reads them
    pairs/H/pairs.parquet          PreferencePair rows
    pairs/H/summary.json           counts and reasons; written last, so that it exists only when all is complete

Pairs that the user brings (data.mpo) are taken over as they are.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minivlm.config import Config, ConfigError
from minivlm.data.draw import drawn_pairs
from minivlm.data.pipeline import draw_rows, prepare_features
from minivlm.data.tokenizer import load_tokenizer
from minivlm.inference.actors import Decoding
from minivlm.inference.committed import AnswerBlocks, Work, finish_answers
from minivlm.inference.exports import StageExport, policy_export
from minivlm.inference.jobs import Answer, Request, answer_blocks
from minivlm.layout import pairs_dir, samples_dir, tower_path
from minivlm.log import get_logger
from minivlm.preferences.dropout_ntp import KIND, blind_messages, cut_answer, judge_continuation
from minivlm.preferences.files import write_mmpr, write_pairs, write_unsolved
from minivlm.preferences.pairs import choose_pairs, keep_minority
from minivlm.preferences.questions import Prompt, select_questions, stable_number
from minivlm.preferences.reference import check_tower
from minivlm.schema import PreferencePair
from minivlm.storage import write_json

_log = get_logger(__name__)


def build_pairs(config: Config, answer: AnswerBlocks | None = None) -> Path:
    """Build or take over the pairs of this configuration, once.

    Args:
        answer: how decoding batches are answered. Default: by the cluster's generation actors.

    Returns:
        The pairs folder.

    Raises:
        FileNotFoundError: no finished SFT run, or no such policy.
        DataError: no question that can be asked.
        ConfigError: fewer than preferences.min_pairs came out.
    """
    folder = pairs_dir(config)
    if (folder / "summary.json").exists():
        summary = json.loads((folder / "summary.json").read_text())
        _check_enough(config, summary)
        return folder
    if config.data.mpo:
        pairs = drawn_pairs(samples_dir(config), draw_rows(config, "mpo"))
        write_pairs(folder / "pairs.parquet", pairs)
        write_json(folder / "summary.json", {"source": "data.mpo", "num_pairs": len(pairs), **_lengths(pairs)})
        return folder
    export = policy_export(config)
    questions = select_questions(config)
    answer = answer or _answer_on_cluster(config, export)
    texts = _sample_answers(config, export, questions.known, answer)
    pairs, unsolved, summary = make_pairs(config, questions.known, texts)
    blind, blind_drops = _dropout_pairs(config, export, questions.open, answer)
    pairs += blind
    summary["drops"] |= blind_drops
    summary |= {
        "num_pairs": len(pairs),
        "kinds": dict(Counter(pair.kind for pair in pairs)),
        "num_open_questions": len(questions.open),
        "source": "sampled",
        "prompts_skipped": dict(questions.skipped),
        "sampled_by": export.reference,
        **_lengths(pairs),
    }
    _check_enough(config, summary)
    write_mmpr(folder, pairs)
    write_unsolved(folder, [prompt.sample for prompt in unsolved])
    write_pairs(folder / "pairs.parquet", pairs)
    write_json(folder / "summary.json", summary)
    _log.info(
        "%d pairs from %d questions, %.1f %% of the sampled answers right, and from %d open questions",
        *(len(pairs), len(questions.known), 100 * summary["accuracy"], len(questions.open)),
    )
    return folder


def make_pairs(
    config: Config, prompts: Sequence[Prompt], texts: Sequence[Sequence[str | None]]
) -> tuple[list[PreferencePair], list[Prompt], dict[str, Any]]:
    """Apply the pair rules to all questions with a known answer.

    Args:
        texts: sampled answers of each prompt; None = one that ran into preferences.max_new_tokens.

    Returns:
        Pairs in the order of the prompts, questions that no answer was right for, and the counts for summary.json.
    """
    settings = config.preferences
    pairs: list[PreferencePair] = []
    unsolved: list[Prompt] = []
    drops: Counter[str] = Counter()
    verdicts: Counter[str] = Counter()
    sampled = Counter(prompt.file for prompt in prompts)
    for prompt, answers in zip(prompts, texts, strict=True):
        sample = prompt.sample
        assert prompt.asked is not None
        max_pairs = settings.max_pairs_per_question
        if sampled[prompt.file] * settings.num_samples > settings.large_source_answers:
            max_pairs = min(max_pairs, settings.max_pairs_per_large_source_question)
        made = choose_pairs(
            answers,
            prompt.asked,
            max_pairs=max_pairs,
            max_format_pairs=settings.max_format_pairs_per_question,
            seed=f"{config.seed}/{sample.sample_id}",
        )
        drops += made.drops
        verdicts += made.verdicts
        unsolved += [prompt] if made.is_unsolved else []
        for number, choice in enumerate(made.pairs):
            pairs.append(_pair(prompt, number, choice.chosen, choice.rejected, choice.kind))
    kept = keep_minority([pair.kind for pair in pairs], seed=config.seed)
    drops["format_over_minority"] += len(pairs) - len(kept)
    pairs = [pairs[i] for i in kept]
    total = verdicts.total()
    summary = {
        "num_questions": len(prompts),
        "num_unsolved": len(unsolved),
        "num_samples": total,
        "accuracy": verdicts["right"] / max(total, 1),
        "malformed": verdicts["malformed"] / max(total, 1),
        "drops": {reason: count for reason, count in sorted(drops.items()) if count},
    }
    return pairs, unsolved, summary


def _dropout_pairs(
    config: Config, export: StageExport, prompts: Sequence[Prompt], answer: AnswerBlocks
) -> tuple[list[PreferencePair], dict[str, int]]:
    """Pairs of open questions: the answer with the picture against its first part, continued without."""
    settings = config.preferences
    if not prompts:
        return [], {}
    tokenizer = load_tokenizer(export.export_dir)
    shown = _finish(config, export, "open", [_request(config, export, i, p) for i, p in enumerate(prompts)], answer)
    drops: Counter[str] = Counter()
    prefixes: dict[int, tuple[int, ...]] = {}
    for index in range(len(prompts)):
        seen = shown[f"{index}/0"]
        if len(seen.token_ids) >= settings.max_new_tokens:
            drops["open_answer_unfinished"] += 1
        elif prefix := cut_answer(seen.token_ids, tokenizer, ratio=settings.dropout_ntp_ratio):
            prefixes[index] = prefix
        else:
            drops["open_answer_too_short"] += 1
    requests = [
        Request(
            row_id=f"{index}/0",
            export_dir=export.export_dir,
            messages=blind_messages(prompts[index].messages),
            image_sha256=(),
            seed=stable_number(f"{config.seed}/{prompts[index].sample.sample_id}/blind"),
            response_prefix=prefix,
        )
        for index, prefix in prefixes.items()
    ]
    blind = _finish(config, export, "blind", requests, answer)
    pairs = []
    for index, prefix in prefixes.items():
        seen, unseen = shown[f"{index}/0"], blind[f"{index}/0"]
        if len(unseen.token_ids) >= settings.max_new_tokens:
            drops["continuation_unfinished"] += 1
            continue
        rejected, reason = judge_continuation(seen.token_ids, prefix, unseen.token_ids, tokenizer)
        if rejected is None:
            drops[reason] += 1
        else:
            pairs.append(_pair(prompts[index], 0, seen.text, rejected, KIND))
    return pairs, dict(drops)


def _pair(prompt: Prompt, number: int, chosen: str, rejected: str, kind: str) -> PreferencePair:
    return PreferencePair(
        pair_id=f"{prompt.sample.sample_id}-{number}",
        images=prompt.sample.images,
        image_sha256=prompt.sample.image_sha256,
        question=prompt.question,
        chosen=chosen,
        rejected=rejected,
        answer=prompt.asked.truth if prompt.asked else None,
        kind=kind,
    )


def _sample_answers(
    config: Config, export: StageExport, prompts: Sequence[Prompt], answer: AnswerBlocks
) -> list[list[str | None]]:
    """Answers of each prompt, in the order of their number; None where the length limit cut one off.

    Finished batches are read, the others asked for.
    """
    numbers = range(config.preferences.num_samples)
    requests = [_request(config, export, i, prompt, n) for i, prompt in enumerate(prompts) for n in numbers]
    found = _finish(config, export, "answers", requests, answer)
    limit = config.preferences.max_new_tokens

    def finished(answer: Answer) -> str | None:
        return answer.text if len(answer.token_ids) < limit else None

    return [[finished(found[f"{i}/{number}"]) for number in numbers] for i in range(len(prompts))]


def _request(config: Config, export: StageExport, index: int, prompt: Prompt, number: int = 0) -> Request:
    return Request(
        row_id=f"{index}/{number}",
        export_dir=export.export_dir,
        messages=prompt.messages,
        image_sha256=prompt.sample.image_sha256,
        seed=stable_number(f"{config.seed}/{prompt.sample.sample_id}/{number}"),
    )


def _finish(
    config: Config, export: StageExport, name: str, requests: Sequence[Request], answer: AnswerBlocks
) -> dict[str, Answer]:
    [found] = finish_answers(
        [Work(pairs_dir(config) / name, export.reference, requests)],
        answer,
        decoding=_decoding(config),
        batch_size=config.preferences.batch_size,
        title=f"sample {name}",
    )
    return found


def _answer_on_cluster(config: Config, export: StageExport) -> AnswerBlocks:
    def answer(blocks: Sequence[Sequence[Request]]) -> Iterator[list[Answer]]:
        shown = {digest for block in blocks for request in block for digest in request.image_sha256}
        cache = prepare_features(config, tower_path(config), shown)
        check_tower(config, export, cache.fingerprint)
        return answer_blocks(blocks, features_dir=cache.directory, decoding=_decoding(config), pool=config.evaluation)

    return answer


def _decoding(config: Config) -> Decoding:
    settings = config.preferences
    return Decoding(settings.max_new_tokens, settings.temperature, settings.top_k)


def _lengths(pairs: Sequence[PreferencePair]) -> dict[str, float]:
    """Mean length of chosen and rejected answers, in characters: a large gap would teach length instead of truth."""
    count = max(len(pairs), 1)
    return {
        "mean_chosen_characters": sum(len(pair.chosen) for pair in pairs) / count,
        "mean_rejected_characters": sum(len(pair.rejected) for pair in pairs) / count,
    }


def _check_enough(config: Config, summary: dict[str, Any]) -> None:
    settings = config.preferences
    if summary["source"] == "sampled" and summary["num_pairs"] < settings.min_pairs:
        raise ConfigError(
            f"Only {summary['num_pairs']} preference pairs came out of {summary['num_questions']} questions x "
            f"{settings.num_samples} answers and {summary['num_open_questions']} open questions, "
            f"preferences.min_pairs is {settings.min_pairs}. {_advice(summary)}"
        )


def _advice(summary: dict[str, Any]) -> str:
    if not summary["num_questions"]:
        return (
            f"Left out: {summary['drops']}. Add preferences.max_new_tokens=512 for answers that are cut, more rows of "
            "the tasks in preferences.dropout_ntp_tasks, or questions with a known answer"
        )
    if summary["accuracy"] == 0:
        return "No sampled answer was right: train SFT longer (train.sft.epochs=4) or ask easier questions"
    return "Add preferences.num_samples=16, preferences.temperature=1.2 or more questions with a known answer"
