"""A finished SFT run made without Ray: coloured pictures, and a model that says red or blue whatever it sees."""

import json
import random
from pathlib import Path

import torch
from PIL import Image

from minivlm.config import Config, load_config
from minivlm.data.chat import encode_chat
from minivlm.data.collate import collate
from minivlm.data.features import FeatureCache
from minivlm.data.samples import SampleWriter, sample_columns
from minivlm.data.tokenizer import train_tokenizer
from minivlm.data.tokens import EncodedSample, TokenTable
from minivlm.layout import features_root, run_dir, samples_dir
from minivlm.model.checkpoint import write_manifest
from minivlm.model.clip import build_clip, save_clip
from minivlm.model.export import save_export
from minivlm.model.language import build_language_model
from minivlm.model.projector import build_projector
from minivlm.model.vision import VisionTower
from minivlm.model.vlm import MiniVLM
from minivlm.schema import Message, Sample
from minivlm.storage import file_sha256, write_json

NUM_PICTURES = 24
NUM_CAPTIONS = 12
"""Training captions: so many open questions."""

SETTINGS = [
    "clip.image_size_px=16", "clip.patch_size_px=8", "clip.encode_batch_size=8",
    "evaluation.max_new_tokens=8", "evaluation.batch_size=16", "evaluation.threads_per_actor=1",
    "evaluation.heat_maps=2",
    "preferences.max_new_tokens=8", "preferences.num_samples=6", "preferences.batch_size=32", "preferences.min_pairs=4",
]  # fmt: skip


def make_toy_run(root: Path) -> Config:
    """Write prepared rows, features and the run under `root`.

    Returns:
        Settings whose storage holds them; one benchmark, POPE, of which one question of three has no picture.
    """
    (root / "empty.yaml").write_text("")
    overrides = [f"storage_path={root / 'store'}", f"clip.path={root / 'clip'}", *SETTINGS]
    overrides.append(f"tokenizer.path={root / 'tokenizer'}")
    overrides += [
        f"evaluation.benchmarks=[{{kind: pope, path: {_write_pope(root)}}}]",
        "evaluation.max_bad_fraction=0.5",
    ]
    config = load_config(root / "empty.yaml", overrides)
    samples = _draw_samples(root)
    samples_dir(config).mkdir(parents=True)
    with SampleWriter(samples_dir(config)) as writer:
        writer.add(samples=[sample_columns(sample, "toy.json", i) for i, sample in enumerate(samples)])
    write_json(samples_dir(config) / "summary.json", {"rows": len(samples), "sources": {}})
    tokenizer = train_tokenizer((m.content for s in samples for m in s.messages), 300, root / "tokenizer")
    size = {"image_size": 16, "patch_size": 8, "vision_hidden_size": 32, "vision_layers": 1, "vision_heads": 1}
    text = {"text_hidden_size": 32, "text_layers": 1, "text_heads": 1, "max_text_tokens": 16, "projection_dim": 16}
    end = tokenizer.pad_token_id
    ids = {"vocab_size": 320, "bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    save_clip(build_clip(**size, **text, **ids, seed=0), root / "clip")
    cache = _encode(config, samples)
    vlm = _train(samples, tokenizer, cache, root / "table")
    checkpoint = run_dir(config, "sft") / "checkpoints" / "step=00000060"
    save_export(checkpoint / "export", vlm, tower_path=str(root / "clip"), tokenizer_dir=root / "tokenizer")
    write_manifest(checkpoint, {"stage": "sft", "step": 60})
    result = {"checkpoint_dir": str(checkpoint), "export_dir": str(checkpoint / "export")}
    write_json(run_dir(config, "sft") / "result.json", result)
    return config


def _write_pope(root: Path) -> Path:
    """Two questions about pictures that no prepared row shows, and one whose picture is missing."""
    rows = []
    for number, colour in enumerate(("white", "black", None)):
        if colour:
            Image.new("RGB", (16, 16), colour).save(root / f"pope-{number}.png")
        text = "Is there a dog in the image?"
        rows.append({"question_id": number, "image": f"pope-{number}.png", "text": text, "label": "yes"})
    path = root / "pope.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _draw_samples(root: Path) -> list[Sample]:
    random.seed(0)
    samples = []
    for number in range(NUM_PICTURES):
        path = root / f"{number}.png"
        colour = (number * 10, 255 - number * 10, number)
        Image.new("RGB", (16, 16), colour).save(path)
        place = ((str(path),), (file_sha256(path),))
        word = random.choice(["red", "blue"])
        for stage, split in (("sft", "train"), ("sft", "test"), ("prompts", "train")):
            turns = (Message("user", "<image>\nWhich colour?"), Message("assistant", word))
            samples.append(Sample(f"{stage}-{split}-{number}", *place, turns, stage, split, "colour", "en", word))
        turns = (Message("user", "<image>\nDescribe it."), Message("assistant", f"It is {word}."))
        splits = ("train", "test") if number < NUM_CAPTIONS else ("test",)
        samples += [
            Sample(f"caption-{split}-{number}", *place, turns, "pretrain", split, "caption") for split in splits
        ]
    return samples


def _encode(config: Config, samples: list[Sample]) -> FeatureCache:
    """What the encoder actors do, without starting them."""
    tower = VisionTower.load(str(config.clip.path), precision="float32", batch_size=config.clip.encode_batch_size)
    cache = FeatureCache(features_root(config), tower.fingerprint, (tower.num_features, tower.hidden_size))
    paths = {sample.image_sha256[0]: sample.images[0] for sample in samples}
    cache.append(list(paths), tower.encode(tower.preprocess([Image.open(path) for path in paths.values()])))
    return cache


def _train(samples: list[Sample], tokenizer, cache: FeatureCache, table_dir: Path) -> MiniVLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    sizes |= {"head_dim": 32, "intermediate_size": 64, "tie_word_embeddings": True, "rope_theta": 1e4}
    sizes |= {"max_position_embeddings": 128}
    language_model = build_language_model(path=None, architecture="llama", sizes=sizes, vocab_size=320, seed=0)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    vlm = MiniVLM(build_projector("linear", 32, 32), language_model, image_token)
    encoded = []
    for sample in samples:
        arrays = (torch.tensor(x, dtype=torch.int32).numpy() for x in encode_chat(tokenizer, sample.messages, 5))
        encoded.append(EncodedSample(sample.sample_id, *arrays, sample.image_sha256))
    table = TokenTable.write(table_dir, encoded)
    rows = [(entry,) for entry in range(len(table))]
    batch = collate(table, rows, cache.get, image_token_id=image_token, pad_token_id=tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(vlm.parameters(), lr=1e-2)
    for _ in range(60):
        loss = -vlm(batch).logps.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return vlm
