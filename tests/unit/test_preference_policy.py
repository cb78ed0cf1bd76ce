"""Whose answers become pairs, and what holds of a folder of pairs once it is there. Plain files, no cluster."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from minivlm.config import ConfigError
from minivlm.data.tokenizer import encode_text, load_tokenizer, train_tokenizer
from minivlm.data.tokens import TokenTable
from minivlm.inference.exports import check_reference, policy_export
from minivlm.layout import pairs_dir, run_dir
from minivlm.model.checkpoint import write_manifest
from minivlm.preferences.files import read_pairs
from minivlm.preferences.reference import add_reference_logps
from minivlm.preferences.sampling import build_pairs
from minivlm.storage import file_sha256
from tests.pair_factory import ALL, BLIND, SEEN, Model, make_checkpoint, make_config, run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def test_a_policy_answers_in_place_of_sft_and_stands_in_every_name(tmp_path: Path, checkpoint: Path) -> None:
    config = make_config(tmp_path / "store", checkpoint, prompt_style="final_answer")
    second = tmp_path / "step=2"
    shutil.copytree(checkpoint, second)
    (second / "export" / "model.safetensors").write_bytes(b"other weights")
    write_manifest(second, {"stage": "mpo", "step": 2})
    again = make_config(tmp_path / "store", checkpoint, policy=second / "export", prompt_style="final_answer")
    assert run_dir(again, "sft") == run_dir(config, "sft")
    assert pairs_dir(again) != pairs_dir(config)
    assert run_dir(again, "mpo") != run_dir(config, "mpo")
    assert policy_export(again).export_dir == second / "export"
    run(again, Model(load_tokenizer(checkpoint / "export")))
    check_reference(pairs_dir(again), policy_export(again))
    with pytest.raises(ConfigError, match="wrong reference"):
        check_reference(pairs_dir(again), policy_export(config))
    before = pairs_dir(again)
    second.rename(tmp_path / "moved")
    moved = make_config(
        tmp_path / "store", checkpoint, policy=tmp_path / "moved" / "export", prompt_style="final_answer"
    )
    assert pairs_dir(moved) == before  # the weights count, not their place
    (tmp_path / "moved" / "export" / "model.safetensors").write_bytes(b"third weights")
    write_manifest(tmp_path / "moved", {"stage": "mpo", "step": 3})
    assert pairs_dir(moved) != before


def test_a_manifest_beside_a_policy_counts_only_if_it_names_its_weights(tmp_path: Path, checkpoint: Path) -> None:
    """A folder of models with a manifest of somebody else's: two models are two models."""
    models = tmp_path / "models"
    for name in ("foo", "bar"):
        shutil.copytree(checkpoint / "export", models / name)
        (models / name / "model.safetensors").write_bytes(name.encode() * 4)
    for manifest in ({"version": 1}, ["foo"], {"files": {"foo/model.safetensors": "0" * 64}}, "not read", None):
        (models / "manifest.json").write_text("{" if manifest is None else json.dumps(manifest))
        given = [make_config(tmp_path / "store", checkpoint, policy=models / name) for name in ("foo", "bar")]
        assert policy_export(given[0]).reference != policy_export(given[1]).reference
        assert pairs_dir(given[0]) != pairs_dir(given[1])
        assert policy_export(given[0]).checkpoint_dir == models / "foo"
    assert (
        policy_export(make_config(tmp_path / "store", checkpoint, policy=checkpoint / "export")).reference
        == (file_sha256(checkpoint / "manifest.json")[:16])
    )


def test_without_their_tokens_pairs_are_scored_again(tmp_path: Path, checkpoint: Path) -> None:
    config = make_config(tmp_path, checkpoint, **ALL)
    expected = run(config, Model(load_tokenizer(checkpoint / "export")))
    for name in ("tokens", "reference.json"):
        path = pairs_dir(config) / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert run(config, Model(load_tokenizer(checkpoint / "export"))) == expected


def test_too_few_pairs_are_refused_after_encoding_too_and_a_lower_limit_goes_on(
    tmp_path: Path, checkpoint: Path
) -> None:
    settings = {"dropout_ntp_filter": True, **ALL}
    config = make_config(tmp_path, checkpoint, min_pairs=8, **settings)
    model = Model(load_tokenizer(checkpoint / "export"))
    build_pairs(config, model)

    def rising(table: Path) -> list[float]:
        return [float(entry) for entry in range(len(TokenTable.open(table)))]

    with pytest.raises(ConfigError, match=r"Only 7 of 8 .*likelier.*min_pairs is 8\..*preferences\.min_pairs=7"):
        add_reference_logps(config, rising)
    lower = make_config(tmp_path, checkpoint, min_pairs=7, **settings)
    assert pairs_dir(lower) == pairs_dir(config)
    assert set(model.asked.values()) == {1}
    build_pairs(lower, model)
    add_reference_logps(lower, rising)
    assert set(model.asked.values()) == {1}
    with pytest.raises(ConfigError, match="Only 7 of 8"):
        add_reference_logps(config, rising)  # finished under the lower limit
    with pytest.raises(ConfigError, match="Only 8 preference pairs came out"):
        build_pairs(make_config(tmp_path, checkpoint, min_pairs=9, **settings), model)


def test_answers_that_ran_into_the_limit_make_no_pair(tmp_path: Path, checkpoint: Path) -> None:
    """An answer of as many tokens as may be written did not end by itself."""
    model = Model(load_tokenizer(checkpoint / "export"))
    longest = len(encode_text(model.tokenizer, "2 of them.\nSo:\nI do not know"))
    config = make_config(tmp_path, checkpoint, max_new_tokens=longest, prompt_style="final_answer")
    run(config, model)
    kinds = Counter(pair.kind for pair in read_pairs(pairs_dir(config) / "pairs.parquet"))
    drops = json.loads((pairs_dir(config) / "summary.json").read_text())["drops"]
    assert kinds == {"correctness": 6}
    assert drops["answer_unfinished"] == 3
    limit = len(encode_text(model.tokenizer, SEEN)) + 1
    captions = make_config(tmp_path / "open", checkpoint, questions=0, max_new_tokens=limit, **ALL)
    message = r"continuation_unfinished': 1.*dropout_ntp_tasks"
    with pytest.raises(ConfigError, match=message) as failed:
        build_pairs(captions, Model(model.tokenizer, f"{BLIND} {BLIND}"))
    assert "No sampled answer was right" not in str(failed.value)


def test_a_policy_that_cannot_answer_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"preferences\.policy=EXPORT"):
        policy_export(make_config(tmp_path, checkpoint, policy=tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"no export \(its `export` folder\?\)"):
        policy_export(make_config(tmp_path, checkpoint, policy=checkpoint))
    foreign = tmp_path / "foreign"
    train_tokenizer(["entirely other words"], 300, foreign)
    (foreign / "config.json").write_text("{}")
    (foreign / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"another tokenizer.*add tokenizer\.path="):
        policy_export(make_config(tmp_path, checkpoint, policy=foreign))
