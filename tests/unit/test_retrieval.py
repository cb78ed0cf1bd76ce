"""Retrieval and zero-shot classification: hand-made rankings, COCO's rule, files with bad rows, embeddings once."""

import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from minivlm.config import Config, ConfigError
from minivlm.data.captions import read_captions, read_classes
from minivlm.data.embedder import Embedder, EmbeddingCache
from minivlm.data.errors import DataError
from minivlm.data.images import ImageLimits
from minivlm.data.miniworld.classes import TEMPLATES, draw_classes
from minivlm.data.scorer import Scoring
from minivlm.evaluation.retrieval import retrieval_figures, retrieval_metrics, retrieval_table, zero_shot_figures
from minivlm.scoring.retrieval import chance_recall, class_embeds, num_ahead
from minivlm.workflow.retrieval import Asked, describe
from tests.tiny_export import build_export


def unit(*degrees: float) -> list[np.ndarray]:
    """Directions in a plane."""
    return [np.array([np.cos(np.radians(d)), np.sin(np.radians(d))], np.float32) for d in degrees]


def rows(*degrees: float) -> torch.Tensor:
    return torch.from_numpy(np.stack(unit(*degrees)))


def test_any_of_several_right_targets_answers_a_query():
    # from 0 degrees the targets come in the order 1 (5), 3 (20), 0 (30), 2 (50)
    targets = rows(30, 5, 50, 20)
    assert num_ahead(rows(0), targets, [[0, 2]]).tolist() == [2]
    assert num_ahead(rows(0), targets, [[0, 3]]).tolist() == [1]
    assert num_ahead(rows(0), targets, [[1, 2]]).tolist() == [0]


def test_ranks_are_those_of_sorted_cosines():
    generator = torch.Generator().manual_seed(0)
    queries, targets = torch.randn(600, 8, generator=generator), torch.randn(1500, 8, generator=generator)
    positives = [[row, row + 600, (7 * row) % 1500] for row in range(600)]  # more queries than fit one comparison
    order = (normalize(queries, dim=-1) @ normalize(targets, dim=-1).T).argsort(dim=1, descending=True).tolist()
    first = [min(ranking.index(right) for right in own) for ranking, own in zip(order, positives, strict=True)]
    assert num_ahead(queries, targets, positives).tolist() == first


def test_wrong_targets_that_are_as_similar_stand_before_the_right_one():
    assert num_ahead(torch.ones(1, 3), torch.ones(5, 3), [[2]]).tolist() == [4]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_embedding_that_is_no_number_is_refused(bad):
    broken = torch.tensor([[1.0, bad]])
    for queries, targets in ((broken, rows(0)), (rows(0), broken)):
        with pytest.raises(ValueError, match="not finite"):
            num_ahead(queries, targets, [[0]])


def test_a_query_without_a_right_target_is_refused():
    with pytest.raises(ValueError, match="none of them empty"):
        num_ahead(rows(0, 90), rows(0), [[0], []])


def test_chance_is_that_of_a_random_ranking():
    assert chance_recall(10, [1], 5) == pytest.approx(0.5)
    assert chance_recall(5, [2, 1], 1) == pytest.approx((0.4 + 0.2) / 2)
    assert chance_recall(4, [2], 2) == pytest.approx(1 - 1 / 6)  # one of six pairs misses both
    assert chance_recall(3, [1], 10) == 1.0


def test_class_embeddings_average_directions_not_lengths():
    prompts = torch.stack([torch.stack([rows(0)[0] * 100, rows(90)[0]])])
    assert torch.allclose(class_embeds(prompts), rows(45))


def test_recall_both_ways_with_several_captions():
    captions = {"p": ["p one", "p two"], "q": ["q one", "q two"]}
    images = dict(zip("pq", unit(0, 90), strict=True))
    texts = dict(zip(["p one", "p two", "q one", "q two"], unit(10, 60, 95, 20), strict=True))
    figures = retrieval_figures(captions, images, texts)
    assert figures["image_to_text"]["recall@1"]["mean"] == 1.0
    assert figures["text_to_image"]["recall@1"]["mean"] == 0.5  # 60 degrees is nearer to q, 20 nearer to p
    assert figures["text_to_image"]["recall@5"]["mean"] == 1.0
    assert figures["text_to_image"]["recall@1"]["chance"] == 0.5
    assert (figures["num_pictures"], figures["num_captions"], figures["num_shared"]) == (2, 4, 0)


def test_a_caption_that_pictures_share_is_right_for_each_of_them():
    captions = {"p": ["same"], "q": ["same"], "r": ["other"]}
    figures = retrieval_figures(
        captions,
        dict(zip("pqr", unit(0, 30, 90), strict=True)),
        dict(zip(("same", "other"), unit(10, 80), strict=True)),
    )
    assert figures["num_shared"] == 2
    assert figures["image_to_text"]["recall@1"]["mean"] == figures["text_to_image"]["recall@1"]["mean"] == 1.0


def test_zero_shot_accuracy_by_class():
    names, prompts = ["a", "b", "c"], [unit(0, 20), unit(80, 100), unit(170, 190)]
    figures = zero_shot_figures(names, prompts, unit(5, 85, 60, 120), [0, 1, 0, 2])
    assert figures["accuracy@1"]["mean"] == 0.5  # 60 degrees is nearer to 90, 120 nearer to 90 than to 180
    assert "accuracy@5" not in figures
    assert figures["per_class"] == {
        "a": {"n": 2, "accuracy": 0.5}, "b": {"n": 1, "accuracy": 1.0}, "c": {"n": 1, "accuracy": 0.0}
    }  # fmt: skip
    assert figures["mean_per_class"] == pytest.approx(0.5)
    results = {"clip": "x", "fingerprint": "f", "embedded": 3, "zero_shot": figures | {"templates": ["{}"]}, "bad": []}
    assert retrieval_metrics(results) == {"zero_shot/accuracy_at_1": 0.5}
    assert "lowest classes    c 0 (n 1), a 50 (n 2), b 100 (n 1)" in retrieval_table(results)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name in ("one", "two", "three"):
        Image.new("RGB", (8, 8), (len(name) * 40, 0, 0)).save(tmp_path / f"{name}.png")
    return tmp_path


def test_a_coco_file_gives_pictures_with_their_captions_and_its_bad_rows(pictures):
    images = [
        {"id": 1, "file_name": "one.png"}, {"id": 2, "file_name": "two.png"}, {"id": 2, "file_name": "three.png"},
        {"id": 3, "file_name": "gone.png"}, {"id": 4, "file_name": "../x.png"}, {"file_name": "three.png"},
        {"id": 5, "file_name": "three.png"},
    ]  # fmt: skip
    notes = [{"image_id": 1, "caption": "first "}, {"image_id": 2, "caption": "second"}]
    notes += [{"image_id": 1, "caption": "again"}, {"image_id": 1, "caption": " "}, {"image_id": 9, "caption": "x"}]
    notes += [{"image_id": 3, "caption": "x"}, {"image_id": 4, "caption": "x"}]
    (pictures / "coco.json").write_text(json.dumps({"images": images, "annotations": notes}))
    found = read_captions(pictures / "coco.json", pictures)
    assert [path.name for path in found.pictures] == ["one.png", "two.png"]
    assert found.captions == (("first", "again"), ("second",))
    assert [(row.row, row.reason.split(",")[0]) for row in found.bad] == [
        (2, "id 2 a second time"),
        (3, f"no file 'gone.png' under {pictures}"),
        (4, "'../x.png' leaves the image root"),
        (5, "a picture without `id`"),
        (6, "no caption with text"),
        (4, "an annotation of picture 9"),
    ]


def test_of_karpathys_splits_the_test_rows_count(pictures):
    images = [
        {"filename": f"{name}.png", "split": split, "sentences": [{"raw": name}, {"raw": "a picture"}]}
        for name, split in (("one", "train"), ("two", "test"), ("three", "val"))
    ]
    (pictures / "k.json").write_text(json.dumps({"images": images}))
    found = read_captions(pictures / "k.json", pictures)
    assert [path.name for path in found.pictures] == ["two.png"]
    assert found.captions == (("two", "a picture"),)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"images": 3}', "[" * 100_000, '{"images": [7], "annotations": 1}'])
def test_what_is_no_captions_file_is_refused_in_one_line(pictures, text):
    (pictures / "bad.json").write_text(text)
    with pytest.raises(DataError, match=r"no captions file|no usable row") as caught:
        read_captions(pictures / "bad.json", pictures)
    assert "\n" not in str(caught.value)


def test_a_folder_per_class(pictures):
    for name in ("red_ring", "blue"):
        (pictures / name).mkdir()
        (pictures / "one.png").rename(pictures / name / "a.png")
        Image.new("RGB", (8, 8)).save(pictures / "one.png")
    (pictures / "empty").mkdir()
    found = read_classes(pictures)
    assert (found.names, found.labels) == (("blue", "red ring"), (0, 1))
    assert [row.reason for row in found.bad] == ["a class without pictures"]
    with pytest.raises(DataError, match="two classes"):
        read_classes(pictures / "blue")


def test_drawn_classes_hold_their_number_of_pictures(tmp_path):
    draw_classes(tmp_path, seed=0, per_class=12, image_size_px=36)
    found = read_classes(tmp_path)
    assert len(found.names) == 16
    assert len({sha256(path.read_bytes()).digest() for path in found.pictures}) == 16 * 12
    assert TEMPLATES[0].format("red ring") == "a1 small red ring"


def test_content_is_embedded_once_and_a_bad_picture_is_named(pictures):
    build_export(pictures / "model")
    limits = ImageLimits(10**6, 10**6, 10**4, 20.0)
    folders = (str(pictures / "model" / "clip"), str(pictures / "model" / "tokenizer"))
    given = Scoring(*folders, "float32", 4, 1, 1.0, 0.0, torch.get_num_threads(), pictures / "store", limits)
    clip = given.load("cpu")
    embedder = Embedder(given, clip.fingerprint)
    good, bad = pictures / "one.png", pictures / "bad.png"
    bad.write_bytes(b"no picture")
    keys = [sha256(path.read_bytes()).hexdigest() for path in (good, bad)]
    found = embedder({"kind": np.array(["image"] * 2), "key": np.array(keys), "value": np.array([str(good), str(bad)])})
    assert found["key"] == keys
    assert found["error"][0] == ""
    assert "not a readable picture" in found["error"][1]
    cache = EmbeddingCache(pictures / "store" / clip.fingerprint / "image")
    assert np.array_equal(cache.get(keys[0]), clip.embed_images([Image.open(good).convert("RGB")])[0].numpy())
    assert cache.get(keys[1]) is None
    embedder({"kind": np.array(["text"]), "key": np.array(["k" * 64]), "value": np.array(["a red circle"])})
    text = EmbeddingCache(pictures / "store" / clip.fingerprint / "text").get("k" * 64)
    assert np.linalg.norm(text) == pytest.approx(1.0)


def test_the_dry_run_counts_and_a_template_without_a_place_is_refused(pictures):
    for name in ("red_ring", "blue"):
        (pictures / "classes" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(pictures / "classes" / name / "a.png")
    config = Config(storage_path=pictures / "home")
    text = describe(config, Asked(classes=pictures / "classes", templates=("a {}.", "the {}.")))
    assert "zero-shot   2 pictures, 2 classes (blue, red ring, ..), 2 templates ('a {}.')" in text
    assert not (pictures / "home").exists()
    for asked in (Asked(image_root=pictures), Asked(captions=pictures, templates=("a {}",))):
        with pytest.raises(ConfigError, match="or leave it out"):
            describe(config, asked)
    for template in ("a thing", "{} and {}", "{0.__class__} {}", "a {x} {}"):
        with pytest.raises(ConfigError, match="must hold"):
            describe(config, Asked(classes=pictures / "classes", templates=(template,)))
