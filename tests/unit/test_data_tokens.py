"""Token table: what was written is read back, and a damaged table is refused."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minivlm.data.errors import DataError
from minivlm.data.tokens import EncodedSample, TokenTable

DIGESTS = st.lists(st.integers(0, 3).map(lambda i: f"{i:064x}"), max_size=3).map(tuple)


def sample(name: str, ids: list[int], digests: tuple[str, ...] = ()) -> EncodedSample:
    labels = [-100, *ids[1:]]
    return EncodedSample(name, np.array(ids, np.int32), np.array(labels, np.int32), digests)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.text(max_size=5), st.lists(st.integers(0, 99), min_size=1, max_size=9), DIGESTS), max_size=8)
)
def test_round_trip(tmp_path_factory, rows):
    written = [sample(*row) for row in rows]
    table = TokenTable.write(tmp_path_factory.mktemp("t") / "table", written)
    assert [table[i].sample_id for i in range(len(table))] == [row[0] for row in rows]
    assert [table[i].input_ids.tolist() for i in range(len(table))] == [row[1] for row in rows]
    assert [table[i].labels.tolist() for i in range(len(table))] == [[-100, *row[1][1:]] for row in rows]
    assert [table[i].image_sha256 for i in range(len(table))] == [row[2] for row in rows]
    assert table.lengths.tolist() == [len(row[1]) for row in rows]
    assert table.num_labels.tolist() == [len(row[1]) - 1 for row in rows]
    assert set(table.digests) == {digest for row in rows for digest in row[2]}


def test_pairs_keep_their_reference_log_probabilities(tmp_path):
    TokenTable.write(
        tmp_path / "t", [sample("c", [1, 2]), sample("r", [1, 3])], group_size=2, reference_logps=[-1.5, -2.0]
    )
    table = TokenTable.open(tmp_path / "t")
    assert table.group_size == 2
    assert table.reference_logps.tolist() == [-1.5, -2.0]


def test_an_odd_number_of_pair_entries_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="1 entries do not form groups of 2"):
        TokenTable.write(tmp_path / "t", [sample("c", [1, 2])], group_size=2)
    assert list(tmp_path.iterdir()) == []


def test_a_supervised_first_token_is_refused(tmp_path):
    bad = EncodedSample("x", np.array([1, 2], np.int32), np.array([1, 2], np.int32), ())
    with pytest.raises(ValueError, match=r"sample x: labels\[0\] is 1"):
        TokenTable.write(tmp_path / "t", [bad])


def test_a_truncated_table_is_refused(tmp_path):
    TokenTable.write(tmp_path / "t", [sample("a", [1, 2, 3])])
    path = tmp_path / "t" / "input_ids.bin"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"input_ids\.bin has 8 bytes instead of 12"):
        TokenTable.open(tmp_path / "t")


def test_a_missing_table_says_what_to_run(tmp_path):
    with pytest.raises(DataError, match=r"python -m jobs\.prepare"):
        TokenTable.open(tmp_path / "nothing")
