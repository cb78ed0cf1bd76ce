"""Writes the same rows in every format that is read: two pictures, one text; conversations and preferences."""

import io
import json
import tarfile
from base64 import b64encode
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}
CAPTIONS = [("red", "<image>\nWhat colour?", "It is red."), ("blue", "<image>\n什么颜色？", "蓝色。")]
TEXT = ("Say hello.", "Hello.")
PREFERENCES = [("red", "What colour?", "Red.", "Green."), ("blue", "什么颜色？", "蓝。", "红。")]

CONVERSATIONS = ("llava.json", "minimind.parquet", "swift.jsonl", "finevision.parquet", "shards.tar")
PAIRS = ("mmpr.jsonl", "mmpr_meta.json", "trl.parquet", "swift_pairs.jsonl", "dataset_info.json")


def write_all(folder: Path) -> None:
    """Every file of CONVERSATIONS and PAIRS, and the pictures beside them."""
    for name, colour in COLOURS.items():
        Image.new("RGB", (16, 16), colour).save(folder / f"{name}.jpg")
    _write_conversations(folder, {name: (folder / f"{name}.jpg").read_bytes() for name in COLOURS})
    _write_preferences(folder, {name: (folder / f"{name}.jpg").read_bytes() for name in COLOURS})


def _turns(question: str, answer: str, names: tuple[str, str] = ("role", "content")) -> list[dict[str, str]]:
    speaker, text = names
    roles = ("user", "assistant") if speaker == "role" else ("human", "gpt")
    return [{speaker: roles[0], text: question}, {speaker: roles[1], text: answer}]


def _write_conversations(folder: Path, data: dict[str, bytes]) -> None:
    llava: list[dict[str, Any]] = [
        {"id": name, "image": f"{name}.jpg", "conversations": _turns(question, answer, ("from", "value"))}
        for name, question, answer in CAPTIONS
    ]
    llava.append({"id": "text", "conversations": _turns(*TEXT, ("from", "value"))})
    (folder / "llava.json").write_text(json.dumps(llava, ensure_ascii=False, indent=1))

    black = io.BytesIO()
    Image.new("RGB", (8, 8)).save(black, "JPEG")  # beside rows of text, as MiniMind-V has it
    rows: list[dict[str, Any]] = [
        {"conversations": json.dumps(_turns(question, answer), ensure_ascii=False), "image_bytes": data[name]}
        for name, question, answer in CAPTIONS
    ]
    rows.append({"conversations": json.dumps(_turns(*TEXT)), "image_bytes": black.getvalue()})
    pq.write_table(pa.Table.from_pylist(rows), folder / "minimind.parquet", row_group_size=2)

    swift: list[dict[str, Any]] = [
        {"messages": _turns(CAPTIONS[0][1], CAPTIONS[0][2]), "images": ["red.jpg"]},
        {
            "messages": _turns(CAPTIONS[1][1], CAPTIONS[1][2]),
            "images": [f"data:image/jpeg;base64,{b64encode(data['blue']).decode()}"],
        },
        {"messages": _turns(*TEXT)},
    ]
    (folder / "swift.jsonl").write_text("".join(json.dumps(row) + "\n" for row in swift))

    fine = [
        {
            "images": [{"bytes": data[name], "path": None}],
            "texts": [{"user": question.removeprefix("<image>\n"), "assistant": answer}],
            "relevance_ratings": [4],
        }
        for name, question, answer in CAPTIONS
    ]
    fine.append({"images": [], "texts": [{"user": TEXT[0], "assistant": TEXT[1]}], "relevance_ratings": [5]})
    pq.write_table(pa.Table.from_pylist(fine), folder / "finevision.parquet")

    with tarfile.open(folder / "shards.tar", "w") as archive:
        for row in llava:
            _add(archive, f"{row['id']}.json", json.dumps({**row, "image": None}).encode())
            if "image" in row:
                _add(archive, f"{row['id']}.jpg", data[row["id"]])


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _write_preferences(folder: Path, data: dict[str, bytes]) -> None:
    keys = ("image", "question", "chosen", "rejected")
    mmpr = [dict(zip(keys, (f"{name}.jpg", *texts), strict=True)) for name, *texts in PREFERENCES]
    (folder / "mmpr.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in mmpr))
    entry = {"root": ".", "annotation": "mmpr.jsonl", "data_augment": False, "repeat_time": 1, "length": 2}
    (folder / "mmpr_meta.json").write_text(json.dumps({"toy": entry}))

    trl = [
        {
            "images": [{"bytes": data[name], "path": None}],
            "prompt": [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": asked}]}],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": better}]}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": worse}]}],
        }
        for name, asked, better, worse in PREFERENCES
    ]
    pq.write_table(pa.Table.from_pylist(trl), folder / "trl.parquet")

    swift = [
        {"messages": _turns(f"<image>{asked}", better), "rejected_response": worse, "images": [f"{name}.jpg"]}
        for name, asked, better, worse in PREFERENCES
    ]
    (folder / "swift_pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in swift))

    sharegpt = [
        {
            "dialogue": [{"from": "human", "value": f"<image>{asked}"}],
            "chosen": {"from": "gpt", "value": better},
            "rejected": {"from": "gpt", "value": worse},
            "pictures": [f"{name}.jpg"],
        }
        for name, asked, better, worse in PREFERENCES
    ]
    (folder / "sharegpt.json").write_text(json.dumps(sharegpt, ensure_ascii=False))
    columns = {"messages": "dialogue", "images": "pictures", "chosen": "chosen", "rejected": "rejected"}
    info = {"file_name": "sharegpt.json", "formatting": "sharegpt", "ranking": True, "columns": columns}
    (folder / "dataset_info.json").write_text(json.dumps({"toy": info}))
