"""The data path on a real Ray cluster: a folder with every kind of bad row, through to micro-batches on ranks."""

import json
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from PIL import Image, ImageDraw
from transformers import CLIPModel

from minivlm.config import Config, load_config
from minivlm.data.collate import collate, unpack_batch
from minivlm.data.embeddings import embed
from minivlm.data.errors import DataError
from minivlm.data.features import FeatureCache
from minivlm.data.pipeline import (
    build_tokens,
    count_rows,
    draw_rows,
    load_token_counts,
    prepare_features,
    prepare_samples,
    prepare_tokenizer,
)
from minivlm.data.plan import plan_epoch
from minivlm.data.samples import load_pairs, load_samples
from minivlm.data.settings import scoring
from minivlm.data.stream import micro_batch_dataset
from minivlm.data.tokenizer import END_OF_TEXT, load_tokenizer
from minivlm.data.tokens import TokenTable
from minivlm.layout import samples_dir, scores_root
from minivlm.model.clip import build_clip, save_clip
from minivlm.model.vision import VisionTower
from minivlm.schema import IMAGE_PLACEHOLDER
from minivlm.storage import file_sha256
from tests.videos import BLUE, RED, plain, write_film

pytestmark = pytest.mark.cluster
NUM_GOOD = 22
BAD_ROWS: dict[str, dict[str, Any]] = {
    "no file 'nothing.png'": {"image": "nothing.png"},
    "truncated": {"image": "truncated.jpg"},
    "not a readable picture": {"image": "page.jpg"},
    "leaves the image root": {"image": "../../etc/passwd"},
    "not relative to the image root": {"image": "/etc/passwd"},
    "2 <image> placeholder(s) for 1 image(s)": {"question": "<image><image>\nWhat is it?"},
    "an empty answer": {"answer": " "},
    "a side longer than data.max_image_side_px": {"image": "bomb.png"},
}


def llava_row(image: str, answer: str, question: str = "<image>\nWhat is it?") -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": turns}


def write_folder(folder: Path) -> None:
    """30 LLaVA rows (22 good, on 11 pictures, one too long for the model) and 6 MMPR lines (4 good, one on a video)."""
    images = folder / "images"
    images.mkdir()
    for i in range(NUM_GOOD // 2):
        picture = Image.new("RGB", (40, 32), (20 * i, 255 - 20 * i, 90))
        ImageDraw.Draw(picture).ellipse((i, i, i + 16, i + 16), fill="white")
        picture.save(images / f"{i}.png")
    buffer = BytesIO()
    Image.effect_noise((64, 64), 80).save(buffer, "JPEG")
    (images / "truncated.jpg").write_bytes(buffer.getvalue()[:700])
    (images / "page.jpg").write_text("<!DOCTYPE html><html>404</html>")
    Image.new("1", (9000, 600)).save(images / "bomb.png")
    answers = ["a disc " + "very " * i + "white" for i in range(NUM_GOOD - 1)] + ["word " * 200]
    rows = [llava_row(f"{i % (NUM_GOOD // 2)}.png", answers[i]) for i in range(NUM_GOOD)]
    rows += [llava_row(**({"image": "0.png", "answer": "x"} | change)) for change in BAD_ROWS.values()]
    (folder / "sft.json").write_text(json.dumps(rows))
    pair = {"image": "1.png", "question": "Is it round?", "chosen": "Yes.", "rejected": "No."}
    lines = [
        pair,
        pair | {"image": ""} | {"question": "2+2?"},
        pair | {"image": ["1.png", "2.png"]},
        pair | {"chosen": ""},
        {"video": "film.mp4", "question": "<video>?", "chosen": "Red.", "rejected": "Blue."},
    ]
    write_film(images / "film.mp4", plain([RED, BLUE]))
    (folder / "mpo.jsonl").write_text("\n".join([*map(json.dumps, lines), '{"image": "1.p']))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=128 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def config(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Settings over a fresh folder, with a tiny random CLIP of 5 image tokens."""
    root = tmp_path_factory.mktemp("data")
    write_folder(root)
    text = {"text_hidden_size": 8, "text_layers": 1, "text_heads": 1, "max_text_tokens": 8, "vocab_size": 320}
    sizes = {"image_size": 32, "patch_size": 16, "vision_hidden_size": 16, "vision_layers": 1, "vision_heads": 1}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    save_clip(build_clip(**sizes, **text, **ids, projection_dim=8, seed=0), root / "clip")
    (root / "empty.yaml").write_text("")
    source = f"path: {root / 'sft.json'}, image_root: {root / 'images'}, split: train"
    pairs = f"path: {root / 'mpo.jsonl'}, image_root: {root / 'images'}"
    settings = [f"data.pretrain=[{{{source}}}]", f"data.sft=[{{{source}}}]", f"data.mpo=[{{{pairs}}}]"]
    settings += [f"storage_path={root / 'store'}", f"clip.path={root / 'clip'}", "clip.encode_batch_size=4"]
    settings += ["data.max_bad_fraction=0.5", "model.max_length_tokens=128", "tokenizer.vocab_size=320"]
    return load_config(root / "empty.yaml", [*settings, "evaluation.threads_per_actor=1"])


@pytest.fixture(scope="module")
def folder(config: Config) -> Path:
    return prepare_samples(config)


def test_every_bad_row_is_quarantined_with_file_row_and_reason(config, folder):
    lines = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    sft = [line for line in lines if line["file"].endswith("sft.json")]
    assert [line["row"] for line in sft] == 2 * list(range(NUM_GOOD + 1, 31))  # as pretrain and as sft source
    for line, reason in zip(sft, 2 * list(BAD_ROWS), strict=True):
        assert reason in line["reason"]
    mpo = [(line["row"], line["reason"]) for line in lines if line["file"].endswith("mpo.jsonl")]
    assert [row for row, _ in mpo] == [4, 6]
    assert mpo[0][1] == "an empty answer (`chosen`)"
    assert mpo[1][1].startswith("not JSON")
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["rows"], summary["bad"]) == (66, 18)


def test_good_rows_come_back_in_file_order_with_digests(config, folder):
    samples = load_samples(folder, stage="sft", split="train")
    assert [sample.sample_id for sample in samples] == [f"sft-{i + 1}" for i in range(NUM_GOOD)]
    assert len({sample.image_sha256 for sample in samples}) == NUM_GOOD // 2
    assert [pair.question.count(IMAGE_PLACEHOLDER) for pair in load_pairs(folder)] == [1, 0, 2, 2]
    assert count_rows(config) == {"pretrain": NUM_GOOD, "sft": NUM_GOOD, "mpo": 4}


def test_too_many_bad_rows_fail_with_one_clear_error(config):
    strict = config.model_copy(update={"data": config.data.model_copy(update={"max_bad_fraction": 0.1})})
    with pytest.raises(DataError, match=r"18 of 66 rows are bad.*sft\.json, row 23: .*nothing\.png") as caught:
        prepare_samples(strict)
    assert not samples_dir(strict).exists()
    kept = Path(str(samples_dir(strict)) + ".rejected") / "quarantine.jsonl"
    assert str(kept) in str(caught.value)
    assert len(kept.read_text().splitlines()) == 18


def test_a_row_that_is_too_long_is_counted_and_not_cut(config, folder):
    table_dir = build_tokens(config, "sft", "train")
    table = TokenTable.open(table_dir)
    assert len(table) == NUM_GOOD - 1
    line = json.loads(Path(f"{table_dir}.quarantine.jsonl").read_text())
    assert (Path(line["file"]).name, line["row"]) == ("sft.json", NUM_GOOD)
    assert load_token_counts(config) == {"sft": int(table.lengths.sum())}
    tokenizer = load_tokenizer(prepare_tokenizer(config))
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
    assert table[0].input_ids.tolist().count(image_id) == 5


def test_rows_are_scored_by_actors_drawn_and_tokenized(config, folder, tmp_path):
    tokenizer = load_tokenizer(prepare_tokenizer(config))
    tokenizer.bos_token = END_OF_TEXT
    save_clip(CLIPModel.from_pretrained(config.clip.path), tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    [source] = config.data.sft
    scored = source.model_copy(update={"min_clip_score": -1.0, "repeat": 2.0})
    data = config.data.model_copy(update={"sft": (scored,)})
    clip = config.clip.model_copy(update={"path": str(tmp_path / "clip")})
    changed = config.model_copy(update={"data": data, "clip": clip})
    [report] = json.loads((draw_rows(changed, "sft") / "mixture.json").read_text())["sources"]
    assert (report["rows"], report["bad"], report["drawn"], report["draws"]) == (30, 8, NUM_GOOD, 2 * NUM_GOOD)
    assert -1 < report["scores"]["1%"] < report["scores"]["50%"] < report["scores"]["99%"] < 1
    [stored] = scores_root(config).rglob("*.npy")
    assert len(np.load(stored)) == NUM_GOOD
    assert len(TokenTable.open(build_tokens(changed, "sft", "train"))) == 2 * (NUM_GOOD - 1)
    assert samples_dir(changed) == folder
    given = replace(scoring(changed, ""), store=tmp_path / "embeddings")
    fingerprint = given.load("cpu").fingerprint
    picture, page = Path(load_samples(folder, stage="sft")[0].images[0]), tmp_path / "page.png"
    page.write_text("no picture")
    images = {file_sha256(path): str(path) for path in (picture, page)}
    first = embed(images, {"t" * 64: "a disc"}, given, fingerprint)
    assert (first.computed, list(first.images), list(first.texts)) == (3, [file_sha256(picture)], ["t" * 64])
    assert "not a readable picture" in first.errors[file_sha256(page)]
    again = embed({file_sha256(picture): "gone"}, {"t" * 64: "a disc"}, given, fingerprint)
    assert (again.computed, again.errors) == (0, {})
    assert np.array_equal(again.images[file_sha256(picture)], first.images[file_sha256(picture)])


def test_each_distinct_picture_is_encoded_once_across_runs(config, folder):
    cache = prepare_features(config, config.clip.path)
    assert cache.stat().distinct == cache.stat().encoded == NUM_GOOD // 2 + 2  # and the frames of the video
    again = prepare_features(config, config.clip.path)
    assert again.stat() == cache.stat()


def test_cached_features_equal_the_tower_run_directly(config, folder):
    cache = prepare_features(config, config.clip.path)
    sample = load_samples(folder, stage="sft")[3]
    tower = VisionTower.load(config.clip.path, batch_size=4)
    with Image.open(sample.images[0]) as picture:
        direct = tower.encode(tower.preprocess([picture.convert("RGB")]))
    torch.testing.assert_close(cache.get(sample.image_sha256), direct, rtol=0.02, atol=0.02)


def test_a_picture_that_changed_after_validation_is_refused(config, folder, tmp_path):
    samples = load_samples(folder, stage="sft")
    path = Path(samples[0].images[0])
    before = path.read_bytes()
    elsewhere = config.model_copy(update={"clip": config.clip.model_copy(update={"encode_batch_size": 3})})
    try:
        Image.new("RGB", (9, 9)).save(path)
        with pytest.raises(DataError, match=r"0\.png changed since the rows were validated"):
            prepare_features(elsewhere, config.clip.path)
    finally:
        path.write_bytes(before)


@ray.remote(num_cpus=0)
class Rank:
    """Reads its share of a split dataset, as a training worker does."""

    def read(self, shard: Any) -> list[dict[str, Any]]:
        return list(shard.iter_rows())


def test_ragged_micro_batches_reach_their_rank_in_order(config, folder):
    table_dir, cache = build_tokens(config, "sft", "train"), prepare_features(config, config.clip.path)
    table = TokenTable.open(table_dir)
    image_id = load_tokenizer(prepare_tokenizer(config)).convert_tokens_to_ids(IMAGE_PLACEHOLDER)
    plan = plan_epoch(
        table.lengths,
        seed=1,
        epoch=0,
        global_batch_size=5,
        world_size=2,
        micro_batch_tokens=64,
        pack_length=64,
    )
    assert len({len(step.micro_batches) for step in plan}) > 1  # steps of different depth
    settings = ray.data.DataContext.get_current()
    before = (settings.target_max_block_size, settings.execution_options.preserve_order, settings.enable_progress_bars)
    dataset = micro_batch_dataset(
        table_dir, cache.directory, plan[1:], world_size=2, image_token_id=image_id, pad_token_id=0, first_step=1
    )
    after = (settings.target_max_block_size, settings.execution_options.preserve_order, settings.enable_progress_bars)
    assert before == after
    shards = dataset.streaming_split(2, equal=True)
    got = ray.get([Rank.remote().read.remote(shard) for shard in shards])
    for rank in range(2):
        wanted = [
            (number, j >= len(step.micro_batches) - 2, len(step.units), rows)
            for number, step in enumerate(plan)
            if number >= 1
            for j, rows in enumerate(step.micro_batches)
            if j % 2 == rank
        ]
        assert [(row["step"], row["is_last"], row["num_units"]) for row in got[rank]] == [item[:3] for item in wanted]
        for row, (number, _, _, rows) in zip(got[rank], wanted, strict=True):
            expected = collate(
                table, rows, FeatureCache.open(cache.directory).get, image_token_id=image_id, pad_token_id=0
            )
            batch = unpack_batch(row["payload"])
            assert all(torch.equal(batch[key], expected[key]) for key in expected)
            assert row["num_tokens"] == sum(int(table.num_labels[unit]) for unit in plan[number].units)
