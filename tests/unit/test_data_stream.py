"""Stream mode without a cluster: each picture is encoded once, before it is shown; batches equal cached ones."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minivlm.data.batches import BatchRow, first_uses, make_batches, payload_block, plan_blocks
from minivlm.data.collate import unpack_batch
from minivlm.data.encoder import ENCODE_COLUMN, BlockEncoder, Encoders, Encoding, PictureEncoder, Tower, cut_shards
from minivlm.data.errors import DataError
from minivlm.data.features import FeatureCache
from minivlm.data.images import ImageLimits
from minivlm.data.pictures import PicturePaths
from minivlm.data.plan import plan_epoch
from minivlm.data.tokens import IGNORE, EncodedSample, TokenTable
from minivlm.model.clip import build_clip, save_clip
from minivlm.storage import file_sha256

IMAGE, PAD, NUM_IMAGE_TOKENS = 9, 0, 5
ENCODE_BATCH = 4


def sample(number: int, digests: tuple[str, ...]) -> EncodedSample:
    ids = np.asarray([1] + [IMAGE] * NUM_IMAGE_TOKENS * len(digests) + [2] * (1 + number % 3), np.int32)
    labels = np.where(ids == 2, ids, IGNORE).astype(np.int32)
    return EncodedSample(f"s{number}", ids, labels, digests)


def digest_of(number: int) -> str:
    return f"{number:064x}"


def block_rows(micro_batches: list[list[int]]) -> list[list[BatchRow]]:
    return [[BatchRow(step, True, 1, 1, tuple((entry,) for entry in rows))] for step, rows in enumerate(micro_batches)]


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, 11), max_size=3), min_size=1, max_size=12),
    st.lists(st.lists(st.integers(0, 11), max_size=6), min_size=1, max_size=8),
    st.sets(st.integers(0, 11)),
    st.integers(1, 5),
)
def test_each_missing_picture_is_encoded_once_and_not_after_its_first_use(
    tmp_path_factory, pictures, order, known, batch_size
):
    shown = [tuple(digest_of(i) for i in row) for row in pictures]
    table = TokenTable.write(
        tmp_path_factory.mktemp("t") / "table", [sample(number, row) for number, row in enumerate(shown)]
    )
    blocks = block_rows([[entry % len(shown) for entry in rows] for rows in order])
    encoded = {digest_of(i) for i in known}
    uses = first_uses(table, blocks, encoded=encoded, batch_size=batch_size)
    needed = [[digest for entry in rows for digest in shown[entry % len(shown)]] for rows in order]
    flat = [digest for use in uses for digest in use]
    assert len(flat) == len(set(flat))
    assert set(flat) == {digest for row in needed for digest in row} - encoded
    for block, row in enumerate(needed):
        assert set(row) - encoded <= {digest for use in uses[: block + 1] for digest in use}
    forwards = sum(-(-len(use) // batch_size) for use in uses)
    assert forwards == -(-len(flat) // batch_size)  # no forward but the last is padded


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 different pictures, where they lie, a tower of 5 image tokens, and a table: repeats, pairs, text alone."""
    folder = tmp_path_factory.mktemp("drawn")
    paths = {}
    for number in range(22):
        noise = np.random.default_rng(number).integers(0, 256, (24 + number, 30, 3), np.uint8)
        path = folder / f"{number}.png"
        Image.fromarray(noise).save(path)
        paths[file_sha256(path)] = str(path)
    PicturePaths.write(folder / "pictures", paths)
    text = {"text_hidden_size": 8, "text_layers": 1, "text_heads": 1, "max_text_tokens": 8, "vocab_size": 320}
    sizes = {"image_size": 32, "patch_size": 16, "vision_hidden_size": 16, "vision_layers": 2, "vision_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    save_clip(build_clip(**sizes, **text, **ids, projection_dim=8, seed=0), folder / "clip")
    digests = list(paths)
    rows = [(digests[i % 22],) for i in range(30)] + [(digests[i], digests[21 - i]) for i in range(5)] + [()] * 6
    TokenTable.write(folder / "table", [sample(number, row) for number, row in enumerate(rows)])
    return folder


def encoding(folder: Path, cache: Path) -> Encoding:
    """Encoders of one thread on a new cache."""
    tower = Tower(str(folder / "clip"), "float32", -1, ENCODE_BATCH)
    loaded = tower.load("cpu")
    FeatureCache(cache, loaded.fingerprint, (loaded.num_features, loaded.hidden_size))
    limits = ImageLimits(10**6, 10**6, 10**3, 20.0)
    return Encoding(tower, Encoders(1, 1.0, 0.0, 1), limits, folder / "pictures", cache / loaded.fingerprint)


def blocks_of(folder: Path) -> list[list[BatchRow]]:
    """Two epochs of small steps, one micro-batch per block: each shows fewer pictures than one forward takes."""
    table = TokenTable.open(folder / "table")
    layout = {"seed": 3, "global_batch_size": 6, "world_size": 2, "micro_batch_tokens": 10, "pack_length": 10}
    steps = [step for epoch in (0, 1) for step in plan_epoch(table.lengths, epoch=epoch, **layout)]
    return [[row] for block in plan_blocks(folder / "table", steps, world_size=2) for row in block]


def batches(folder: Path, cache: Path, block: pa.Table) -> list[dict[str, torch.Tensor]]:
    made = make_batches(str(folder / "table"), str(cache), IMAGE, PAD, 0.0, block)
    return [unpack_batch(payload) for payload in made["payload"].to_pylist()]


def test_streamed_batches_are_those_of_the_cache_to_the_bit(drawn, tmp_path):
    blocks = blocks_of(drawn)
    cached, streamed = encoding(drawn, tmp_path / "cached"), encoding(drawn, tmp_path / "streamed")
    assert PictureEncoder(cached).encode(PicturePaths(drawn / "pictures").digests()) == 22
    uses = first_uses(TokenTable.open(drawn / "table"), blocks, encoded=set(), batch_size=ENCODE_BATCH)
    encoder = BlockEncoder(streamed)
    num_pictures = set()
    for block, use in zip(blocks, uses, strict=True):
        table = payload_block(block)
        passed = encoder(table.append_column(ENCODE_COLUMN, pa.array([use], pa.list_(pa.string()))))
        assert passed.equals(table)
        expected, got = batches(drawn, cached.cache, table), batches(drawn, streamed.cache, passed)
        assert [batch.keys() for batch in got] == [batch.keys() for batch in expected]
        for mine, other in zip(got, expected, strict=True):
            assert all(torch.equal(mine[key], other[key]) for key in other)
        num_pictures.add(len(got[0]["image_features"]))
    assert {0, 1, 2} <= num_pictures  # also micro-batches of text alone
    assert max(num_pictures) < ENCODE_BATCH
    stat = FeatureCache.open(streamed.cache).stat()
    assert (stat.distinct, stat.encoded) == (22, 22)


def test_a_batch_waits_for_what_another_actor_has_in_work_and_then_names_what_is_missing(drawn, tmp_path):
    work = encoding(drawn, tmp_path)
    cache = FeatureCache.open(work.cache)
    digests = PicturePaths(drawn / "pictures").digests()
    with pytest.raises(DataError, match=digests[0]):
        cache.get(digests[:1], wait_s=0.1)
    PictureEncoder(work).encode(digests[:1])
    assert cache.get(digests[:1], wait_s=0.1).shape == (1, NUM_IMAGE_TOKENS, 16)


def test_paths_come_back_by_digest_and_in_the_order_of_the_rows(tmp_path):
    given_paths = {digest_of(7): "b/ü.png", digest_of(3): "", digest_of(5): "a/1.png"}
    paths = PicturePaths.write(tmp_path / "pictures", given_paths)
    assert {digest: paths[digest] for digest in paths.digests()} == given_paths
    assert paths.digests() == list(given_paths)
    with pytest.raises(DataError, match="is in no prepared row"):
        paths[digest_of(4)]
    with pytest.raises(DataError, match="is in no prepared row"):
        paths[digest_of(8)]
    assert PicturePaths.write(tmp_path / "none", {}).digests() == []
    (tmp_path / "pictures" / "order.bin").unlink()
    with pytest.raises(DataError, match=r"order\.bin cannot be read"):
        PicturePaths(tmp_path / "pictures")


@pytest.mark.parametrize(
    ("pictures", "actors", "batch_size", "shards"),
    [
        (1, 1, 16, 1),
        (512, 1, 16, 1),
        (513, 1, 16, 2),
        (600, 2, 16, 2),
        (100, 2, 16, 2),
        (16, 2, 16, 1),
        (3, 4, 1, 3),
        (2000, 2, 16, 4),
        (1100, 2, 64, 4),
        (2560, 4, 256, 5),  # 8 shards would take 16 forwards instead of 10
        (4096, 8, 1024, 8),
    ],
)
def test_actors_share_pictures_evenly(pictures, actors, batch_size, shards):
    digests = [digest_of(index) for index in range(pictures)]
    found = cut_shards(digests, actors, batch_size)
    assert len(found) == shards
    assert [digest for shard in found for digest in shard] == digests
    assert all(len(shard) % min(batch_size, 512) == 0 for shard in found[:-1])
    assert max(map(len, found)) <= 512
