"""Collation: packing moves samples about but never changes what one contains."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minivlm.data.collate import collate, pack_batch, unpack_batch
from minivlm.data.plan import plan_epoch
from minivlm.data.tokens import EncodedSample, TokenTable

IMAGE, PAD, P, D = 7, 0, 3, 2
SHAS = [f"{i:064x}" for i in range(4)]


def features(digests: tuple[str, ...]) -> Tensor:
    """Each picture's features are its number."""
    values = torch.tensor([int(digest, 16) for digest in digests], dtype=torch.bfloat16)
    return values.view(-1, 1, 1).expand(-1, P, D).contiguous()


def make_sample(index: int, pictures: list[int], answer: int) -> EncodedSample:
    ids = [1] + [IMAGE] * (P * len(pictures)) + [10 + index] * answer
    labels = [-100] * (len(ids) - answer) + ids[len(ids) - answer :]
    return EncodedSample(str(index), np.array(ids), np.array(labels), tuple(SHAS[i] for i in pictures))


SAMPLES = st.lists(st.tuples(st.lists(st.integers(0, 3), max_size=2), st.integers(1, 9)), min_size=1, max_size=12)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SAMPLES, st.integers(0, 3))
def test_packing_never_changes_what_a_sample_contains(tmp_path_factory, rows, seed):
    samples = [make_sample(i, pictures, answer) for i, (pictures, answer) in enumerate(rows)]
    table = TokenTable.write(tmp_path_factory.mktemp("t") / "table", samples)
    (step,) = plan_epoch(
        table.lengths, seed=seed, epoch=0, global_batch_size=99, world_size=2, micro_batch_tokens=64, pack_length=32
    )
    seen = []
    for micro_batch in step.micro_batches:
        batch = collate(table, micro_batch, features, image_token_id=IMAGE, pad_token_id=PAD)
        picture_of_run = [int(v) for v in batch["image_features"][batch["image_index"], 0, 0]]
        order = [entry for row in micro_batch for entry in row]
        for segment, entry in enumerate(order, start=1):
            place = batch["segment_ids"] == segment
            original = table[entry]
            assert batch["input_ids"][place].tolist() == original.input_ids.tolist()
            assert batch["labels"][place].tolist() == original.labels.tolist()
            assert batch["position_ids"][place].tolist() == list(range(len(original.input_ids)))
            count = len(original.image_sha256)
            assert [f"{v:064x}" for v in picture_of_run[:count]] == list(original.image_sha256)
            picture_of_run = picture_of_run[count:]
            seen.append(entry)
        padding = batch["segment_ids"] == 0
        assert (batch["labels"][padding] == -100).all()
        assert (batch["input_ids"][padding] == PAD).all()
    assert sorted(seen) == list(range(len(samples)))


def test_rows_are_padded_to_the_longest_rounded_up_to_eight(tmp_path):
    table = TokenTable.write(tmp_path / "t", [make_sample(0, [], 8), make_sample(1, [], 3)])
    batch = collate(table, ((0,), (1,)), features, image_token_id=IMAGE, pad_token_id=PAD)
    assert batch["input_ids"].shape == (2, 16)  # 1 + 8 = 9 tokens


def test_a_picture_used_twice_is_carried_once(tmp_path):
    table = TokenTable.write(tmp_path / "t", [make_sample(0, [2], 1), make_sample(1, [1, 2], 1)])
    batch = collate(table, ((0, 1),), features, image_token_id=IMAGE, pad_token_id=PAD)
    assert batch["image_features"][:, 0, 0].tolist() == [2, 1]
    assert batch["image_index"].tolist() == [0, 1, 0]


def test_rows_of_text_alone_carry_no_picture(tmp_path):
    asked = []

    def no_features(digests: tuple[str, ...]) -> Tensor:
        asked.append(digests)
        return features(digests) if digests else torch.zeros(0, P, D, dtype=torch.bfloat16)

    table = TokenTable.write(tmp_path / "t", [make_sample(0, [], 3), make_sample(1, [], 2)])
    batch = collate(table, ((0, 1),), no_features, image_token_id=IMAGE, pad_token_id=PAD)
    assert asked == [()]
    assert (batch["image_features"].shape, batch["image_index"].shape) == ((0, P, D), (0,))
    assert int((batch["labels"] != -100).sum()) == 5


def test_the_zero_weight_batch_is_one_row_of_padding(tmp_path):
    table = TokenTable.write(tmp_path / "t", [make_sample(0, [1], 1)], reference_logps=[-1.0])
    batch = collate(table, (), features, image_token_id=IMAGE, pad_token_id=PAD)
    assert batch["input_ids"].tolist() == [[PAD] * 8]
    assert batch["segment_ids"].sum() == 0
    assert (batch["labels"] == -100).all()
    assert batch["image_features"].shape == (0, P, D)
    assert batch["image_index"].shape == (0,)
    assert batch["reference_logps"].shape == (0,)


def test_reference_log_probabilities_follow_their_segments(tmp_path):
    samples = [make_sample(i, [], 2) for i in range(4)]
    table = TokenTable.write(tmp_path / "t", samples, group_size=2, reference_logps=[-1.0, -2.0, -3.0, -4.0])
    batch = collate(table, ((2, 3), (0, 1)), features, image_token_id=IMAGE, pad_token_id=PAD)
    assert batch["reference_logps"].tolist() == [-3.0, -4.0, -1.0, -2.0]


@pytest.mark.parametrize(("placeholders", "pictures"), [(2, 1), (3, 2), (3, 0)])
def test_pictures_of_another_number_of_tokens_are_refused(tmp_path, placeholders, pictures):
    ids = np.array([1] + [IMAGE] * placeholders)
    odd = EncodedSample("a", ids, np.full(len(ids), -100), tuple(SHAS[:pictures]))
    table = TokenTable.write(tmp_path / "t", [make_sample(0, [0], 1), odd])
    with pytest.raises(ValueError, match=f"sample a has {placeholders} placeholder tokens for {pictures} picture"):
        collate(table, ((0, 1),), features, image_token_id=IMAGE, pad_token_id=PAD)


def test_a_picture_may_have_fewer_tokens_than_features(tmp_path):
    ids = np.array([1, IMAGE, IMAGE, 9])  # P = 3 features, 2 tokens
    table = TokenTable.write(tmp_path / "t", [EncodedSample("a", ids, np.array([-100, -100, -100, 9]), (SHAS[1],))])
    batch = collate(table, ((0,),), features, image_token_id=IMAGE, pad_token_id=PAD)
    assert batch["image_features"].shape == (1, P, D)
    assert batch["image_index"].tolist() == [0]


def test_bytes_round_trip_keeps_types_and_bits(tmp_path):
    table = TokenTable.write(tmp_path / "t", [make_sample(0, [1, 3], 4)], reference_logps=[-0.1])
    batch = collate(table, ((0,),), features, image_token_id=IMAGE, pad_token_id=PAD)
    back = unpack_batch(pack_batch(batch))
    assert back.keys() == batch.keys()
    assert all(torch.equal(back[key], batch[key]) and back[key].dtype == batch[key].dtype for key in batch)
