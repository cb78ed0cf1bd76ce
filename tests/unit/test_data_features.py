"""Feature cache: complete shards or nothing, the same bits back, every picture counted once."""

import pytest
import torch
from torch import Tensor

from minivlm.data.errors import DataError
from minivlm.data.features import FeatureCache

SHAS = [f"{i:064x}" for i in range(6)]


def make(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 4, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def test_bits_come_back_in_the_order_asked(tmp_path):
    cache = FeatureCache(tmp_path, "f", (3, 4))
    first, second = make(2), make(3, 1)
    cache.append(SHAS[:2], first)
    cache.append(SHAS[2:5], second)
    got = FeatureCache.open(tmp_path / "f").get([SHAS[4], SHAS[0], SHAS[4]])
    assert torch.equal(got, torch.stack([second[2], first[0], second[2]]))
    assert got.dtype == torch.bfloat16


def test_no_pictures_give_an_empty_tensor_of_the_right_shape(tmp_path):
    assert FeatureCache(tmp_path, "f", (3, 4)).get(()).shape == (0, 3, 4)


def test_missing_lists_each_picture_once_and_sees_other_writers(tmp_path):
    mine, other = FeatureCache(tmp_path, "f", (3, 4)), FeatureCache(tmp_path, "f", (3, 4))
    other.append(SHAS[:1], make(1))
    assert mine.missing([SHAS[1], SHAS[0], SHAS[1]]) == [SHAS[1]]
    assert torch.equal(mine.get(SHAS[:1]), make(1))


def test_a_truncated_shard_is_never_read(tmp_path):
    FeatureCache(tmp_path, "f", (3, 4)).append(SHAS[:2], make(2))
    (shard,) = (tmp_path / "f").glob("*.bin")
    shard.write_bytes(shard.read_bytes()[:-1])
    cache = FeatureCache.open(tmp_path / "f")
    assert cache.missing(SHAS[:2]) == SHAS[:2]
    cache.append(SHAS[:2], make(2))
    assert torch.equal(cache.get(SHAS[:2]), make(2))


def test_a_shard_without_its_index_does_not_exist(tmp_path):
    cache = FeatureCache(tmp_path, "f", (3, 4))
    (tmp_path / "f" / "half.bin").write_bytes(b"x" * 48)
    assert cache.stat().distinct == 0


def test_stat_shows_a_picture_encoded_twice(tmp_path):
    cache = FeatureCache(tmp_path, "f", (3, 4))
    cache.append(SHAS[:2], make(2))
    assert (cache.stat().distinct, cache.stat().encoded, cache.stat().num_bytes) == (2, 2, 48)
    cache.append(SHAS[1:3], make(2))
    assert (cache.stat().distinct, cache.stat().encoded) == (3, 4)


def test_an_absent_picture_is_named(tmp_path):
    cache = FeatureCache(tmp_path, "f", (3, 4))
    with pytest.raises(DataError, match=f"1 of 1 pictures have no features .*{SHAS[0]}"):
        cache.get(SHAS[:1])


def test_another_shape_under_the_same_fingerprint_is_refused(tmp_path):
    FeatureCache(tmp_path, "f", (3, 4))
    with pytest.raises(DataError, match=r"shape \(3, 4\), the tower gives \(3, 5\)"):
        FeatureCache(tmp_path, "f", (3, 5))
