"""Reference log-probabilities of the pairs, computed once by the model that MPO starts from (SFT's, or
preferences.policy): MPO then trains with one model in memory.

    pairs/H/tokens            token table for training: entries 2i, 2i+1 are chosen, rejected of pair i, with the values
    pairs/H/card.md           counts, reasons, lengths and examples for people
    pairs/H/reference.json    which checkpoint computed them; written last

Called by the preferences job after `build_pairs`.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from minivlm.config import Config, ConfigError
from minivlm.data.chat import encode_chat
from minivlm.data.errors import DataError
from minivlm.data.pipeline import prepare_features
from minivlm.data.settings import num_image_tokens
from minivlm.data.tokens import IGNORE, EncodedSample, TokenTable
from minivlm.inference.exports import StageExport, check_reference, policy_export
from minivlm.inference.jobs import score_table
from minivlm.layout import pairs_dir, tower_path
from minivlm.log import get_logger
from minivlm.model.export import load_export_tower
from minivlm.model.tokenizer import load_tokenizer
from minivlm.preferences.card import CARD_FILE, pairs_card
from minivlm.preferences.dropout_ntp import KIND as BLIND_KIND
from minivlm.preferences.files import read_pairs, write_mmpr, write_pairs
from minivlm.schema import CORRECTNESS_KIND, Message, PreferencePair
from minivlm.storage import write_bytes, write_json

ScoreTable = Callable[[Path], Sequence[float]]
"""Folder of a token table -> the log-probability of each entry, in nats."""

_log = get_logger(__name__)


def add_reference_logps(config: Config, score: ScoreTable | None = None) -> Path:
    """Encode the pairs and add each answer's log-probability under the model that MPO starts from, also as columns of
    the parquet file; then write card.md.

    Pairs that cannot be encoded or are longer than model.max_length_tokens are left out, counted and logged; so are,
    with preferences.dropout_ntp_filter, blindly continued answers that are likelier than the seen one.

    Args:
        score: how a token table is scored. Default: by the cluster's actors.

    Returns:
        The token table's folder.

    Raises:
        FileNotFoundError: no pairs, no finished SFT run or no such policy.
        ConfigError: the values there are of another checkpoint, or fewer than preferences.min_pairs are left of pairs
            that were sampled.
    """
    folder = pairs_dir(config)
    export = policy_export(config)
    tokens_dir = folder / "tokens"
    summary = json.loads((folder / "summary.json").read_text())
    if (folder / "reference.json").exists() and tokens_dir.is_dir():
        check_reference(folder, export)
        stored = json.loads((folder / "reference.json").read_text())
        _check_enough(config, summary, stored["num_pairs"], stored["dropped"])
        return tokens_dir
    (folder / "reference.json").unlink(missing_ok=True)
    pairs = read_pairs(folder / "pairs.parquet")
    tokenizer = load_tokenizer(export.export_dir)
    encoded, kept, dropped = encode_pairs(
        pairs,
        tokenizer,
        num_image_tokens(config),
        max_length=config.model.max_length_tokens,
        cut_rejected=config.preferences.cut_rejected,
    )
    if not encoded:
        raise ConfigError(f"None of {len(pairs)} pairs can be used ({dict(dropped)}): add model.max_length_tokens=1024")
    _check_enough(config, summary, len(kept), dropped)
    for stale in (tokens_dir, folder / "tokens-unscored"):
        shutil.rmtree(stale, ignore_errors=True)
    unscored = TokenTable.write(folder / "tokens-unscored", encoded, group_size=2)
    logps = (score or _score_on_cluster(config, export, pairs))(unscored.directory)
    if not np.isfinite(logps).all():
        raise DataError(f"{export.export_dir} gives log-probabilities that are not finite: train sft again")
    if config.preferences.dropout_ntp_filter:
        encoded, kept, logps = _filter_blind(pairs, encoded, kept, logps, dropped)
        _check_enough(config, summary, len(kept), dropped)
    if dropped:
        _log.warning("%d of %d pairs left out: %s", dropped.total(), len(pairs), dict(dropped))
    scored = _with_columns(pairs, kept, logps, export.reference)
    TokenTable.write(tokens_dir, encoded, group_size=2, reference_logps=logps)
    write_pairs(folder / "pairs.parquet", scored)
    if (folder / "mmpr_meta.json").exists():
        write_mmpr(folder, [scored[position] for position in kept])
    shutil.rmtree(unscored.directory)
    reference = {
        "reference": export.reference,
        "checkpoint": str(export.checkpoint_dir),
        "num_pairs": len(encoded) // 2,
        "dropped": dict(dropped),
        "cut_rejected": config.preferences.cut_rejected,
    }
    card = pairs_card(folder, summary | reference, [scored[position] for position in kept])
    write_bytes(folder / CARD_FILE, card.encode())
    write_json(folder / "reference.json", reference)
    return tokens_dir


def _check_enough(config: Config, summary: Mapping[str, Any], num_pairs: int, dropped: Mapping[str, int]) -> None:
    least = config.preferences.min_pairs
    if summary["source"] == "sampled" and num_pairs < least:
        lower = f", or accept so few with preferences.min_pairs={num_pairs}" if num_pairs else ""
        raise ConfigError(
            f"Only {num_pairs} of {summary['num_pairs']} preference pairs can be used ({dict(dropped)}), "
            f"preferences.min_pairs is {least}. Add model.max_length_tokens=1024 for pairs that are too long, "
            f"preferences.dropout_ntp_filter=false for those that were filtered{lower}"
        )


def _score_on_cluster(config: Config, export: StageExport, pairs: Sequence[PreferencePair]) -> ScoreTable:
    def score(table: Path) -> list[float]:
        cache = prepare_features(config, tower_path(config), {digest for pair in pairs for digest in pair.image_sha256})
        check_tower(config, export, cache.fingerprint)
        return score_table(
            table,
            export_dir=export.export_dir,
            features_dir=cache.directory,
            micro_batch_tokens=config.train.micro_batch_tokens,
            pack_length=config.train.pack_length_tokens,
            pool=config.evaluation,
        )

    return score


def _filter_blind(
    pairs: Sequence[PreferencePair],
    encoded: Sequence[EncodedSample],
    kept: Sequence[int],
    logps: Sequence[float],
    dropped: Counter[str],
) -> tuple[list[EncodedSample], list[int], list[float]]:
    """Without open pairs whose rejected answer is at least as likely as the chosen one, seen with the picture."""
    units = [
        unit
        for unit, position in enumerate(kept)
        if pairs[position].kind != BLIND_KIND or logps[2 * unit] > logps[2 * unit + 1]
    ]
    if len(units) < len(kept):
        dropped["rejected likelier than chosen"] += len(kept) - len(units)
    places = [place for unit in units for place in (2 * unit, 2 * unit + 1)]
    return [encoded[place] for place in places], [kept[unit] for unit in units], [logps[place] for place in places]


def check_tower(config: Config, export: StageExport, fingerprint: str) -> None:
    """Refuse a preferences.policy that was trained behind another tower: our features would mean nothing to it.

    Args:
        fingerprint: of the tower that made the features.

    Raises:
        ConfigError: it was.
    """
    if config.preferences.policy is None:
        return
    clip = config.clip
    tower = load_export_tower(export.export_dir, precision=clip.encode_precision, batch_size=clip.encode_batch_size)
    if tower.fingerprint != fingerprint:
        raise ConfigError(
            f"preferences.policy={export.export_dir} was trained behind another vision tower than "
            f"{tower_path(config)}: type clip.path=FOLDER of the CLIP that it was trained with"
        )


def encode_pairs(
    pairs: Sequence[PreferencePair],
    tokenizer: PreTrainedTokenizerFast,
    num_image_tokens: int,
    *,
    max_length: int,
    cut_rejected: bool,
) -> tuple[list[EncodedSample], list[int], Counter[str]]:
    """Token ids of chosen and rejected of each pair, one after the other; the question is not learned.

    Args:
        max_length: longest chosen or rejected sequence, before any cut.
        cut_rejected: wrong answers of "correctness" pairs end where `cut_at_first_difference` says.

    Returns:
        Two entries per usable pair, named PAIR_ID/chosen and PAIR_ID/rejected; the positions of these pairs; and why
        others were left out.
    """
    encoded: list[EncodedSample] = []
    kept: list[int] = []
    dropped: Counter[str] = Counter()
    for position, pair in enumerate(pairs):
        both = []
        try:
            for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
                messages = (Message("user", pair.question), Message("assistant", answer))
                ids, labels = encode_chat(tokenizer, messages, num_image_tokens, num_images=len(pair.image_sha256))
                arrays = np.asarray(ids, np.int32), np.asarray(labels, np.int32)
                both.append(EncodedSample(f"{pair.pair_id}/{name}", *arrays, pair.image_sha256))
        except ValueError as error:
            dropped[str(error)] += 1
            continue
        if max(len(entry.input_ids) for entry in both) > max_length:
            dropped["longer than model.max_length_tokens"] += 1
            continue
        if cut_rejected and pair.kind == CORRECTNESS_KIND:
            both[1] = cut_at_first_difference(both[0], both[1], tokenizer)
        encoded += both
        kept.append(position)
    return encoded, kept, dropped


def cut_at_first_difference(
    chosen: EncodedSample, rejected: EncodedSample, tokenizer: PreTrainedTokenizerFast
) -> EncodedSample:
    """The rejected conversation up to the end of the answer's first line that differs from the chosen one.

    Without the end of turn, which was not wrong either; whole where that line is the last one.
    """
    ours, theirs = (entry.labels[entry.labels != IGNORE] for entry in (chosen, rejected))
    size = min(len(ours), len(theirs))
    first = int(np.append(np.flatnonzero(ours[:size] != theirs[:size]), size)[0])
    places = np.flatnonzero(rejected.labels != IGNORE)
    for place in places[first:]:
        if "\n" in tokenizer.decode([int(rejected.input_ids[place])]):
            end = int(place) + 1
            return replace(rejected, input_ids=rejected.input_ids[:end], labels=rejected.labels[:end])
    return rejected


def _with_columns(
    pairs: Sequence[PreferencePair], kept: Sequence[int], logps: Sequence[float], reference: str
) -> list[PreferencePair]:
    """All pairs, the kept ones with their values; those that were left out hold None."""
    scored = [replace(pair, ref_chosen_logps=None, ref_rejected_logps=None, reference=None) for pair in pairs]
    for unit, position in enumerate(kept):
        chosen, rejected = logps[2 * unit : 2 * unit + 2]
        scored[position] = replace(
            scored[position], ref_chosen_logps=chosen, ref_rejected_logps=rejected, reference=reference
        )
    return scored
