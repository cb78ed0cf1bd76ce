"""Files in parts: numbering, memory, and files that are broken as a whole."""

import gzip
import io
import json
import random
import tarfile
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivlm.data import readers
from minivlm.data.errors import DataError, RowError
from minivlm.data.readers import list_parts, read_part, read_rows

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60)
@given(rows=st.lists(VALUES, max_size=8), indent=st.sampled_from([None, 1]), ascii_only=st.booleans())
def test_a_list_is_read_as_json_reads_it_whatever_the_window(tmp_path_factory, rows, indent, ascii_only):
    path = tmp_path_factory.mktemp("list") / "a.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        for chars in (1, 7, 2**20):
            patch.setattr(readers, "TEXT_CHARS", chars)
            found = [json.loads(raw) for _, raw in read_rows(path)]
            assert found == json.loads(path.read_text(encoding="utf-8"))


@settings(max_examples=60)
@given(
    lines=st.lists(st.sampled_from([b"{}", b"", b"  ", b'{"a": 1}' * 3, b"x" * 40]), max_size=30),
    size=st.integers(1, 90),
)
def test_lines_keep_their_numbers_however_the_file_is_cut(tmp_path_factory, lines, size):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    for end in (b"", b"\n"):
        path.write_bytes(b"\n".join(lines) + end)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(readers, "LINES_BYTES", size)
            found = [(number, raw.strip(b"\n")) for number, raw in read_rows(path)]
        assert found == [(i, line) for i, line in enumerate(lines, start=1) if line.strip()]


def test_parts_can_be_read_in_any_order(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(b'{"n": %d}\n' % i for i in range(100)))
    monkeypatch.setattr(readers, "LINES_BYTES", 100)
    parts = list_parts(path)
    assert len(parts) > 5
    found = [row for part in reversed(parts) for row in read_part(part)]
    assert sorted(found) == [(i + 1, b'{"n": %d}\n' % i) for i in range(100)]


def test_memory_does_not_grow_with_a_list(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "TEXT_CHARS", 2**16)
    peaks = []
    for count in (2_000, 20_000):
        path = tmp_path / f"{count}.json"
        row = json.dumps({"id": "x", "conversations": [{"from": "human", "value": "y" * 100}] * 2})
        path.write_text("[" + ",".join([row] * count) + "]")
        tracemalloc.start()
        assert sum(1 for _ in read_rows(path)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", b"x", "the ending says what is inside"),
        ("a.json", b'{"a": 1}', "a list"),
        ("a.json", b"", "a list"),
        ("a.json", b'[{"a": 1},\n {"a": ]', "line 2: not JSON"),
        ("a.json", b'[{"a": 1}\n\n {"a": 2}]', "line 3: not JSON"),
        ("a.json", b'[{"a": 1}', "line 1: not JSON"),
        ("a.json", b'[{"a": 1}] x', "text after the end"),
        ("a.json", b'[{"a": "\xff"}]', "not UTF-8"),
        ("a.json", b"[" + b"[" * 100_000, "nested too deeply"),
        ("a.json", b"[" + b"1" * 5000 + b", 2]", "not JSON"),
        ("a.parquet", b"PAR1 no", "not a parquet file"),
        ("a.tar", b"no tar at all", "cannot be read"),
    ],
)
def test_a_file_that_is_broken_as_a_whole_says_where(tmp_path, name, content, reason):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason) as error:
        list(read_rows(path))
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 600


def test_a_syntax_error_early_in_a_large_list_is_found_without_reading_on(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "TEXT_CHARS", 1000)
    path = tmp_path / "a.json"
    path.write_text("[{'a': 1}" + " " * 10_000_000 + "]")
    tracemalloc.start()
    with pytest.raises(DataError, match="line 1"):
        list(read_rows(path))
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_a_row_without_an_end_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_ROW_CHARS", 10_000)
    monkeypatch.setattr(readers, "TEXT_CHARS", 1000)
    (tmp_path / "a.json").write_text('["' + "x" * 100_000)
    with pytest.raises(DataError, match="a row of more than 10000 characters"):
        list(read_rows(tmp_path / "a.json"))
    (tmp_path / "a.jsonl").write_text("x" * 100_000 + "\n{}\n")
    (_, first), (number, second) = read_rows(tmp_path / "a.jsonl")
    assert isinstance(first, RowError)
    assert (number, second) == (2, b"{}\n")


def test_a_large_member_costs_its_row_only(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_MEMBER_BYTES", 100)
    for name, size in (("a.jpg", 200), ("a.txt", 5), ("b.txt", 5)):
        (tmp_path / name).write_bytes(b"x" * size)
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name in ("a.jpg", "a.txt", "b.txt"):
            archive.add(tmp_path / name, f"folder.d/{name}")
    (_, first), (_, second) = read_rows(tmp_path / "s.tar")
    assert isinstance(first, RowError)
    assert second == {"__key__": "folder.d/b", "txt": b"xxxxx"}


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_members_that_do_not_stand_together_cost_their_rows(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"3"), ("b.txt", b"4")])
    kinds = [type(raw) for _, raw in read_rows(path)]
    assert kinds == [dict, dict, RowError, RowError]


def test_links_and_doubles_cost_their_row_and_macos_files_nothing(tmp_path):
    path = write_tar(
        tmp_path / "a.tar", [("._a.jpg", b"x"), ("a.jpg", b"1"), ("._a.txt", b"x"), ("a.txt", b"2"), ("b.jpg", b"3")]
    )
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("b.txt")
        link.type, link.linkname = tarfile.LNKTYPE, "a.txt"
        archive.addfile(link)
    (_, first), (_, second) = read_rows(path)
    assert first == {"__key__": "a", "jpg": b"1", "txt": b"2"}
    assert isinstance(second, RowError)
    ((_, double),) = read_rows(write_tar(tmp_path / "b.tar", [("a.jpg", b"1"), ("a.jpg", b"2")]))
    assert isinstance(double, RowError)


def test_a_cell_beyond_pythons_dates_costs_its_row(tmp_path):
    dates = pa.array([0, 2**40, 1], pa.int64()).cast(pa.timestamp("s"))
    pq.write_table(pa.table({"n": [1, 2, 3], "date": dates}), tmp_path / "a.parquet")
    rows = [raw for _, raw in read_rows(tmp_path / "a.parquet")]
    assert [raw["n"] for raw in rows if isinstance(raw, dict)] == [1, 3]
    assert isinstance(rows[1], RowError)


def test_damaged_archives_are_one_error(tmp_path):
    noise = bytes(random.Random(0).randbytes(20_000))
    whole = gzip.compress(write_tar(tmp_path / "a.tar", [("a.txt", noise)]).read_bytes())
    for size in (3, 20, len(whole) // 2):
        (tmp_path / "b.tar").write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"b\.tar"):
            list(read_rows(tmp_path / "b.tar"))


def test_a_missing_file_names_the_setting(tmp_path: Path):
    with pytest.raises(DataError, match="Correct `path`"):
        list_parts(tmp_path / "nothing.json")
