"""Files are complete or absent."""

import pytest

from minivlm.storage import content_hash, file_sha256, new_directory, write_json


def test_content_hash_ignores_key_order():
    assert content_hash({"a": 1, "b": [2]}) == content_hash({"b": [2], "a": 1}) != content_hash({"a": 1, "b": [3]})


def test_file_sha256_of_known_text(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert file_sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_directory_appears_only_when_complete(tmp_path):
    target = tmp_path / "result"
    with pytest.raises(RuntimeError), new_directory(target) as folder:  # noqa: PT012
        (folder / "half").write_text("x")
        assert not target.exists()
        raise RuntimeError("killed")
    assert list(tmp_path.iterdir()) == []
    with new_directory(target) as folder:
        write_json(folder / "value.json", {"zh": "红"})
    assert (target / "value.json").read_text() == '{\n "zh": "红"\n}'


def test_second_writer_keeps_the_first_result(tmp_path):
    target = tmp_path / "result"
    for text in ("first", "second"):
        with new_directory(target) as folder:
            (folder / "f").write_text(text)
    assert (target / "f").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["result"]
