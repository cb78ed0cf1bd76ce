"""CLIP scores of rows: the cosine of plain transformers, computed once, and errors for towers without a text side."""

from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity
from transformers import CLIPModel, CLIPVisionModel

from minivlm.data.images import ImageLimits
from minivlm.data.samples import DrawColumns, SampleWriter, sample_columns
from minivlm.data.scorer import ScoreCache, Scorer, Scoring, Wanted
from minivlm.data.tokenizer import END_OF_TEXT, encode_text, load_tokenizer, token_id, train_tokenizer
from minivlm.model.clip import build_clip, clip_image_processor, save_clip
from minivlm.model.clip_score import ClipScorer
from minivlm.schema import Message, Sample

COLOURS = ("red", "blue", "green")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP with its tokenizer apart, and three pictures."""
    path = tmp_path_factory.mktemp("clip")
    tokenizer = train_tokenizer(["a red square", "a blue square"] * 3, 300, path / "tokenizer")
    end = token_id(tokenizer, END_OF_TEXT)
    model = build_clip(
        image_size=16, patch_size=8, vision_hidden_size=16, vision_layers=1, vision_heads=1, text_hidden_size=8,
        text_layers=1, text_heads=1, max_text_tokens=12, projection_dim=8, vocab_size=len(tokenizer), bos_token_id=end,
        eos_token_id=end, pad_token_id=end, seed=0,
    )  # fmt: skip
    save_clip(model, path / "clip")
    for colour in COLOURS:
        Image.new("RGB", (20, 16), colour).save(path / f"{colour}.png")
    return path


def scoring(folder: Path, store: Path) -> Scoring:
    limits = ImageLimits(10**7, 10**7, 10**4, 20.0)
    return Scoring(
        str(folder / "clip"),
        str(folder / "tokenizer"),
        "float32",
        4,
        1,
        1.0,
        0.0,
        torch.get_num_threads(),
        store,
        limits,
    )


def row(folder: Path, colours: tuple[str, ...], answer: str, *, source: int = 0, split: str = "train") -> dict:
    paths = tuple(str(folder / f"{colour}.png") for colour in colours)
    digests = tuple(sha256(Path(path).read_bytes()).hexdigest() for path in paths)
    turns = (Message("user", "<image>" * len(paths) + "?"), Message("assistant", answer))
    sample = Sample("s", paths, digests, turns, "sft", split, "t")
    return sample_columns(sample, "f", 1, DrawColumns(source=source))


def expected(folder: Path, colours: tuple[str, ...], text: str) -> float:
    """By the parts of transformers' CLIPModel, one picture at a time and without padding."""
    model, processor = CLIPModel.from_pretrained(folder / "clip"), clip_image_processor(16)
    tokenizer = load_tokenizer(folder / "tokenizer")
    ids = torch.tensor([[*encode_text(tokenizer, text)[:11], token_id(tokenizer, END_OF_TEXT)]])
    with torch.no_grad():
        words = model.text_projection(model.text_model(input_ids=ids).pooler_output)
        found = []
        for colour in colours:
            pixels = processor(images=[Image.open(folder / f"{colour}.png")], return_tensors="pt")["pixel_values"]
            image = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
            found.append(float(cosine_similarity(image, words)))
    return float(np.mean(found))


def score(scorer: Scorer) -> tuple[np.ndarray, str]:
    found = scorer({"group": np.array([0])})
    return np.frombuffer(found["scores"][0], np.float32), found["error"][0]


def test_scores_are_clips_cosines_and_only_wanted_rows_have_one(folder, tmp_path):
    texts = ["a red square", "a blue square " * 20]
    with SampleWriter(tmp_path) as writer:
        writer.add([
            row(folder, ("red",), texts[0]),
            row(folder, ("red", "blue"), texts[1]),
            row(folder, ("green",), texts[0], source=1),
            row(folder, ("green",), texts[0], split="val"),
            row(folder, (), texts[0]),
        ])  # fmt: skip
    given = scoring(folder, tmp_path / "scores")
    fingerprint = given.load("cpu").fingerprint
    wanted = Wanted(tmp_path / "samples.parquet", "sft", (0,))
    scores, error = score(Scorer(wanted, given, fingerprint))
    assert error == ""
    assert np.isnan(scores).tolist() == [False, False, True, True, True]
    assert scores[0] == pytest.approx(expected(folder, ("red",), texts[0]), abs=1e-5)
    assert scores[1] == pytest.approx(expected(folder, ("red", "blue"), texts[1]), abs=1e-5)
    [file] = (tmp_path / "scores" / fingerprint).iterdir()
    entries = np.load(file)
    entries["score"] = 0.5
    np.save(file, entries)
    assert score(Scorer(wanted, given, fingerprint))[0][:2].tolist() == [0.5, 0.5]  # read, not computed


def test_a_picture_that_changed_since_validation_is_refused(folder, tmp_path):
    changed = row(folder, ("green",), "x")
    changed["image_sha256"] = ("0" * 64,)
    with SampleWriter(tmp_path) as writer:
        writer.add([changed])
    given = scoring(folder, tmp_path / "scores")
    wanted = Wanted(tmp_path / "samples.parquet", "sft", (0,))
    _, error = score(Scorer(wanted, given, given.load("cpu").fingerprint))
    assert "green.png changed since the rows were validated" in error


def test_a_score_does_not_depend_on_what_it_is_computed_with(folder):
    clip = ClipScorer.load(
        str(folder / "clip"), str(folder / "tokenizer"), precision="float32", batch_size=4, device="cpu"
    )
    texts = ["a red square", "x", "a longer text with many words in it"]
    assert torch.equal(clip.embed_texts(texts)[:1], clip.embed_texts(texts[:1]))
    images = [Image.open(folder / f"{colour}.png") for colour in COLOURS]
    assert torch.equal(clip.embed_images(images)[2:], clip.embed_images(images[2:]))


def test_a_tower_without_text_or_tokenizer_says_what_to_type(folder, tmp_path):
    vision = CLIPVisionModel.from_pretrained(folder / "clip")
    vision.save_pretrained(tmp_path / "vision")
    clip_image_processor(16).save_pretrained(tmp_path / "vision")
    numerics = {"precision": "float32", "batch_size": 4, "device": "cpu"}
    with pytest.raises(ValueError, match=r"min_clip_score.*without CLIP's text side.*clip\.path=openai") as caught:
        ClipScorer.load(str(tmp_path / "vision"), None, **numerics)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no tokenizer"):
        ClipScorer.load(str(folder / "clip"), None, **numerics)
    with pytest.raises(ValueError, match="cannot be computed with"):
        ClipScorer.load(str(tmp_path / "nothing"), None, **numerics)


def test_a_cache_gives_what_was_committed_and_nothing_else(tmp_path):
    keys = np.array([9, 3, 2**63 + 1], np.uint64)
    ScoreCache(tmp_path).append(keys, np.array([0.9, 0.3, 0.1], np.float32))
    found = ScoreCache(tmp_path).get(np.array([3, 4, 2**63 + 1, 2**64 - 1], np.uint64))
    assert np.nan_to_num(found, nan=-1).tolist() == pytest.approx([0.3, -1, 0.1, -1])
