"""Feature caches under fire: killed writers, many writers at once, flipped bytes, and what prune may remove."""

import hashlib
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from minivlm.data.cache_tools import drop, plan_prune, prune, report, verify
from minivlm.data.features import FeatureCache
from minivlm.data.shards import checksum, committed_digests, list_shards

SHAPE = (64, 512)
ROW_BYTES = 2 * 64 * 512
NAMES = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(96)]
FORK = multiprocessing.get_context("fork")
HOUR_S = 3600.0


RIGHT = {  # the one right feature of each picture, made before any fork, so that writers do nothing but write
    name: np.random.default_rng(number).integers(0, 2**16, SHAPE, np.uint16) for number, name in enumerate(NAMES)
}


def bits(digests: Sequence[str]) -> Tensor:
    return torch.from_numpy(np.stack([RIGHT[name] for name in digests])).view(torch.bfloat16)


def same(cache: FeatureCache, digests: Sequence[str]) -> bool:
    got, right = (values.view(torch.uint16).numpy() for values in (cache.get(digests), bits(digests)))
    return np.array_equal(got, right)  # numpy: torch's thread pool does not survive a fork


def encode_missing(root: Path, digests: Sequence[str], per_shard: int) -> None:
    cache = FeatureCache(root, "f", SHAPE)
    for start in range(0, len(digests), per_shard):
        missing = cache.missing(digests[start : start + per_shard])
        if missing:
            cache.append(missing, bits(missing))


def write_and_read(root: Path, seed: int) -> None:
    """A process of its own: overlapping sets of pictures, each read back at once."""
    draw = random.Random(seed)
    cache = FeatureCache(root, "f", SHAPE)
    for _ in range(12):
        asked = draw.sample(NAMES, 16)
        missing = cache.missing(asked)
        if missing:
            cache.append(missing, bits(missing))
        if not same(cache, asked):
            os._exit(3)


def test_a_writer_killed_at_any_moment_leaves_whole_entries_only(tmp_path):
    draw = random.Random(0)
    FeatureCache(tmp_path, "f", SHAPE)
    seen = set()
    for attempt in range(10):
        writer = FORK.Process(target=encode_missing, args=(tmp_path, NAMES, 1 + attempt % 4))
        writer.start()
        time.sleep(draw.uniform(0.001, 0.08))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        readable = committed_digests(tmp_path / "f")
        assert seen <= readable
        seen = readable
        assert not readable or same(FeatureCache.open(tmp_path / "f"), sorted(readable))
        assert verify(tmp_path / "f").damaged == ()
    encode_missing(tmp_path, NAMES, 32)
    assert same(FeatureCache.open(tmp_path / "f"), NAMES)
    found = report(tmp_path / "f")
    assert (found.pictures, found.rows) == (96, 96)  # nothing was encoded twice


def test_writers_at_once_give_every_reader_the_right_bits_even_beside_a_prune(tmp_path):
    FeatureCache(tmp_path, "f", SHAPE)
    writers = [FORK.Process(target=write_and_read, args=(tmp_path, seed)) for seed in range(4)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        prune(plan_prune(tmp_path / "f"))
        time.sleep(0.005)
    assert [writer.exitcode for writer in writers] == [0] * 4
    prune(plan_prune(tmp_path / "f"))
    found = report(tmp_path / "f")
    assert found.duplicates == 0
    assert found.torn == {}
    assert same(FeatureCache.open(tmp_path / "f"), sorted(committed_digests(tmp_path / "f")))


@pytest.mark.parametrize("suffix", [".bin", ".json"])
def test_one_flipped_byte_is_found_named_and_can_be_dropped(tmp_path, suffix):
    encode_missing(tmp_path, NAMES[:6], per_shard=3)
    directory = tmp_path / "f"
    shards = list(list_shards(directory, SHAPE))
    path = shards[0].index.with_suffix(suffix)
    content = bytearray(path.read_bytes())
    content[-90] ^= 1  # of the last row's bits; of a digit in the index
    path.write_bytes(content)
    found = verify(directory)
    assert (found.checked, [shard.index for shard in found.damaged]) == (2, [shards[0].index])
    drop(found.damaged[0])
    assert FeatureCache.open(directory).missing(NAMES[:6]) == list(shards[0].digests)
    encode_missing(tmp_path, NAMES[:6], per_shard=6)
    assert same(FeatureCache.open(directory), NAMES[:6])


def test_a_shard_of_an_older_version_is_read_and_counted_as_unverifiable(tmp_path):
    encode_missing(tmp_path, NAMES[:2], per_shard=2)
    (shard,) = list_shards(tmp_path / "f", SHAPE)
    shard.index.write_text(f'{{"digests": ["{NAMES[0]}", "{NAMES[1]}"]}}')
    assert same(FeatureCache.open(tmp_path / "f"), NAMES[:2])
    found = verify(tmp_path / "f")
    assert (found.checked, found.unverifiable, found.damaged) == (0, 1, ())


@pytest.mark.parametrize("index", ["{", "[]", '{"digests": 3}', '{"digests": [3]}', '{"digests": ["a"], "sha256": 3}'])
def test_an_index_that_is_none_is_absent_and_reported(tmp_path, index):
    encode_missing(tmp_path, NAMES[:2], per_shard=2)
    (tmp_path / "f" / "odd.json").write_text(index)
    assert committed_digests(tmp_path / "f") == set(NAMES[:2])
    assert [path.name for path in report(tmp_path / "f").torn] == ["odd.json"]


def test_prune_leaves_what_a_living_writer_may_still_write(tmp_path):
    directory = tmp_path / "f"
    encode_missing(tmp_path, NAMES[:2], per_shard=2)
    for name in ("half.bin", ".x.bin.1.ab.tmp", "torn.json"):
        (directory / name).write_bytes(b"12345")
    assert plan_prune(directory).leftovers == ()
    old = time.time() - HOUR_S - 1
    for name in ("half.bin", ".x.bin.1.ab.tmp"):
        os.utime(directory / name, (old, old))
    plan = plan_prune(directory)
    assert sorted(path.name for path in plan.leftovers) == [".x.bin.1.ab.tmp", "half.bin"]
    assert plan.freed == 10
    prune(plan)
    assert list(report(directory).torn) == [directory / "torn.json"]
    assert same(FeatureCache.open(directory), NAMES[:2])


def test_prune_keeps_one_row_of_each_picture_and_what_is_used(tmp_path):
    directory = tmp_path / "f"
    reader = FeatureCache(tmp_path, "f", SHAPE)
    reader.append(NAMES[:4], bits(NAMES[:4]))
    reader.append(NAMES[2:6], bits(NAMES[2:6]))
    reader.append(NAMES[:2], bits(NAMES[:2]))
    plan = plan_prune(directory)
    assert (plan.dropped_rows, plan.freed) == (4, 4 * ROW_BYTES)
    assert prune(plan) == []
    assert (report(directory).pictures, report(directory).rows) == (6, 6)
    used = plan_prune(directory, used=set(NAMES[3:]))
    assert used.freed == 3 * ROW_BYTES
    prune(used)
    assert committed_digests(directory) == set(NAMES[3:6])
    assert same(FeatureCache.open(directory), NAMES[3:6])
    assert same(reader, NAMES[:6])  # what it has mapped stays


def test_prune_does_not_rewrite_damage_under_a_new_checksum(tmp_path):
    directory = tmp_path / "f"
    encode_missing(tmp_path, NAMES[:4], per_shard=4)
    (shard,) = list_shards(directory, SHAPE)
    content = bytearray(shard.data.read_bytes())
    content[5] ^= 1
    shard.data.write_bytes(content)
    left = prune(plan_prune(directory, used={NAMES[0]}))
    assert [rewrite.shard for rewrite in left] == [shard]
    assert [item.index for item in verify(directory).damaged] == [shard.index]


def test_rows_that_a_prune_keeps_stay_where_their_new_shard_has_the_name_of_one_that_goes(tmp_path):
    directory = tmp_path / "f"
    pairs = ((first, second) for first in NAMES for second in NAMES if first != second)
    both = next(
        [first, second]
        for first, second in pairs
        if checksum([first, second], np.stack([RIGHT[first], RIGHT[second]])) < checksum([first], RIGHT[first][None])
    )
    cache = FeatureCache(tmp_path, "f", SHAPE)
    cache.append(both, bits(both))
    cache.append(both[:1], bits(both[:1]))
    prune(plan_prune(directory, used=set(both[:1])))
    assert committed_digests(directory) == set(both[:1])
    assert report(directory).rows == 1


def test_a_second_prune_of_the_same_plan_finds_its_work_done(tmp_path):
    directory = tmp_path / "f"
    encode_missing(tmp_path, NAMES[:6], per_shard=3)
    plans = [plan_prune(directory, used=set(NAMES[:4])) for _ in range(2)]
    assert [prune(plan) for plan in plans] == [[], []]
    assert committed_digests(directory) == set(NAMES[:4])


def append_and_drop(root: Path) -> None:
    cache = FeatureCache(root, "f", SHAPE)
    for number in range(6):
        for name in NAMES[number * 10 : number * 10 + 10]:
            cache.append([name], bits([name]))
        for shard in list_shards(root / "f", SHAPE):
            drop(shard)


def test_verify_passes_over_shards_that_vanish_meanwhile(tmp_path):
    FeatureCache(tmp_path, "f", SHAPE)
    writer = FORK.Process(target=append_and_drop, args=(tmp_path,))
    writer.start()
    while writer.is_alive():
        assert verify(tmp_path / "f").damaged == ()
    assert writer.exitcode == 0
