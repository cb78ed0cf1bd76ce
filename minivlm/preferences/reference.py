"""Reference log-probabilities of the pairs, computed once by the SFT model: MPO then trains with one model in memory.

    pairs/H/tokens            token table for training: entries 2i, 2i+1 are chosen, rejected of pair i, with the values
    pairs/H/reference.json    which checkpoint computed them; written last

Called by the preferences job after `build_pairs`.
"""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from minivlm.config import Config, ConfigError
from minivlm.data.chat import encode_chat
from minivlm.data.errors import DataError
from minivlm.data.pipeline import prepare_features
from minivlm.data.settings import num_image_tokens
from minivlm.data.tokens import EncodedSample, TokenTable
from minivlm.inference.exports import StageExport, stage_export
from minivlm.inference.jobs import score_table
from minivlm.layout import pairs_dir, tower_path
from minivlm.log import get_logger
from minivlm.model.tokenizer import load_tokenizer
from minivlm.preferences.files import read_pairs, write_pairs
from minivlm.schema import Message, PreferencePair
from minivlm.storage import write_json

_log = get_logger(__name__)


def add_reference_logps(config: Config) -> Path:
    """Encode the pairs and add each answer's log-probability under the SFT checkpoint, also as columns of the parquet.

    Pairs that cannot be encoded or are longer than model.max_length_tokens are left out, counted and logged.

    Returns:
        The token table's folder.

    Raises:
        FileNotFoundError: no pairs or no finished SFT run.
        ConfigError: the values there are of another checkpoint, or no pair fits.
    """
    folder = pairs_dir(config)
    export = stage_export(config, "sft")
    tokens_dir = folder / "tokens"
    if (folder / "reference.json").exists():
        check_reference(folder, export)
        return tokens_dir
    pairs = read_pairs(folder / "pairs.parquet")
    shown = {digest for pair in pairs for digest in pair.image_sha256}
    cache = prepare_features(config, tower_path(config), shown)
    tokenizer = load_tokenizer(export.export_dir)
    encoded, kept, dropped = encode_pairs(
        pairs, tokenizer, num_image_tokens(config), max_length=config.model.max_length_tokens
    )
    if dropped:
        _log.warning("%d of %d pairs left out: %s", dropped.total(), len(pairs), dict(dropped))
    if not encoded:
        raise ConfigError(f"None of {len(pairs)} pairs can be used ({dict(dropped)}): add model.max_length_tokens=1024")
    for stale in (tokens_dir, folder / "tokens-unscored"):
        shutil.rmtree(stale, ignore_errors=True)
    unscored = TokenTable.write(folder / "tokens-unscored", encoded, group_size=2)
    logps = score_table(
        unscored.directory,
        export_dir=export.export_dir,
        features_dir=cache.directory,
        micro_batch_tokens=config.train.micro_batch_tokens,
        pack_length=config.train.pack_length_tokens,
        pool=config.evaluation,
    )
    if not np.isfinite(logps).all():
        raise DataError(f"{export.export_dir} gives log-probabilities that are not finite: train sft again")
    TokenTable.write(tokens_dir, encoded, group_size=2, reference_logps=logps)
    write_pairs(folder / "pairs.parquet", _with_columns(pairs, kept, logps, export.reference))
    shutil.rmtree(unscored.directory)
    write_json(
        folder / "reference.json",
        {
            "reference": export.reference,
            "checkpoint": str(export.checkpoint_dir),
            "num_pairs": len(encoded) // 2,
            "dropped": dict(dropped),
        },
    )
    return tokens_dir


def check_reference(folder: Path, export: StageExport) -> None:
    """Refuse reference values that another checkpoint computed.

    Raises:
        ConfigError: they are stale.
    """
    stored = json.loads((folder / "reference.json").read_text())["reference"]
    if stored != export.reference:
        raise ConfigError(
            f"{folder} holds reference log-probabilities of checkpoint {stored}, but sft is now {export.reference} "
            f"({export.checkpoint_dir}): MPO would start from a wrong reference. Delete {folder} and run: "
            "python -m jobs.preferences"
        )


def encode_pairs(
    pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerFast, num_image_tokens: int, *, max_length: int
) -> tuple[list[EncodedSample], list[int], Counter[str]]:
    """Token ids of chosen and rejected of each pair, one after the other; the question is not learned.

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
        else:
            encoded += both
            kept.append(position)
    return encoded, kept, dropped


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
