"""Small benchmarks in the file formats of their authors; every picture is a drawn square."""

import base64
import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

YES_NO = "Please answer yes or no."


def picture(colour: str = "red") -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (12, 10), colour).save(buffer, "PNG")
    return buffer.getvalue()


def save(path: Path, colour: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), colour).save(path)


def write(path: Path, tree: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


def vqav2(root: Path) -> dict[str, Any]:
    save(root / "val2014" / "COCO_val2014_000000000042.jpg")
    head = {"info": {}, "license": {}, "data_subtype": "val2014", "task_type": "Open-Ended", "data_type": "mscoco"}
    asked = [{"image_id": 42, "question": "How many dogs?", "question_id": 42000}]
    answers = [
        {"answer": "2" if i < 8 else "two dogs", "answer_confidence": "yes", "answer_id": i + 1} for i in range(10)
    ]
    found = [{"question_id": 42000, "image_id": 42, "answers": answers, "multiple_choice_answer": "2",
              "answer_type": "number", "question_type": "how many"}]  # fmt: skip
    path = write(root / "v2_OpenEnded_mscoco_val2014_questions.json", head | {"questions": asked})
    annotations = write(root / "v2_mscoco_val2014_annotations.json", head | {"annotations": found})
    return {"path": path, "annotations": annotations, "images": root / "val2014"}


def textvqa(root: Path) -> dict[str, Any]:
    save(root / "train_images" / "003a8ae2ef43b901.jpg")
    row = {"question": "what is the brand?", "image_id": "003a8ae2ef43b901", "image_classes": ["Phone"],
           "answers": ["nokia"] * 9 + ["toshiba"], "question_tokens": ["what"], "question_id": 34602,
           "set_name": "val"}  # fmt: skip
    path = write(root / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "dataset_name": "textvqa", "data": [row]})
    return {"path": path, "images": root / "train_images"}


def scienceqa(root: Path) -> dict[str, Any]:
    save(root / "images" / "test" / "4" / "image.png")
    row = {"question": "Which is the largest?", "choices": ["cat", "whale"], "answer": 1, "hint": "", "image": None,
           "task": "closed choice", "grade": "grade2", "subject": "natural science", "topic": "biology",
           "category": "Animals", "skill": "Compare", "lecture": "", "solution": "", "split": "test"}  # fmt: skip
    shown = row | {"hint": "Look at the picture.", "image": "image.png", "answer": 0}
    path = write(root / "problems.json", {"1": row | {"split": "train"}, "4": shown, "5": row})
    return {"path": path, "images": root / "images"}


def chartqa(root: Path) -> dict[str, Any]:
    save(root / "png" / "two_col_1365.png")
    rows = [{"imgname": "two_col_1365.png", "query": "What share?", "label": "25%"}]
    return {"path": write(root / "test_human.json", rows), "images": root / "png"}


def chartqa_parquet(root: Path) -> dict[str, Any]:
    """As lmms-lab publishes it: no names of pictures, and one question asked of two charts."""
    shared = {"type": "human_test", "question": "What share?"}
    rows = [shared | {"answer": answer, "image": {"bytes": picture(colour), "path": None}}
            for answer, colour in (("25%", "red"), ("40%", "blue"))]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), root / "test-00000-of-00001.parquet")
    return {"path": root}


def docvqa(root: Path) -> dict[str, Any]:
    save(root / "documents" / "pybv0228_81.png")
    row = {"questionId": 49153, "question": "What is the value?", "question_types": ["figure/diagram"],
           "image": "documents/pybv0228_81.png", "docId": 14465, "ucsf_document_id": "pybv0228",
           "ucsf_document_page_no": "81", "answers": ["0.28", ".28"], "data_split": "val"}  # fmt: skip
    head = {"dataset_name": "SP-DocVQA Task 1", "dataset_version": "1.0", "dataset_split": "val"}
    return {"path": write(root / "val_v1.0.json", head | {"data": [row]})}


def infovqa(root: Path) -> dict[str, Any]:
    save(root / "images" / "38979.jpeg")
    row = {"questionId": 98313, "question": "Which app?", "image_local_name": "38979.jpeg", "image_url": "http://x",
           "ocr_output_file": "38979.json", "answers": ["instagram"], "data_split": "val"}  # fmt: skip
    head = {"dataset_name": "infographicVQA", "dataset_version": "1.0", "dataset_split": "val"}
    return {"path": write(root / "infographicsVQA_val_v1.0.json", head | {"data": [row]}), "images": root / "images"}


def ocrbench(root: Path) -> dict[str, Any]:
    rows = []
    for number, (name, kind, truths) in enumerate(
        [("IIIT5K", "Regular Text Recognition", "CENTRE"),
         ("HME100k", "Handwritten Mathematical Expression Recognition", ["X ^ 2"])]
    ):  # fmt: skip
        save(root / "OCRBench_Images" / name / f"{number}.png")
        rows.append({"dataset_name": name, "question": "what is written in the image?", "id": number, "type": kind,
                     "answers": truths, "image_path": f"{name}/{number}.png"})  # fmt: skip
    return {"path": write(root / "OCRBench.json", rows), "images": root / "OCRBench_Images"}


def pope(root: Path) -> dict[str, Any]:
    """Lines, though the file is called .json."""
    save(root / "val2014" / "COCO_val2014_000000310196.jpg")
    lines = [
        {"question_id": number, "image": "COCO_val2014_000000310196.jpg", "text": f"Is there a {what} in the image?",
         "label": label}
        for number, (what, label) in enumerate([("snowboard", "yes"), ("car", "no")], 1)
    ]  # fmt: skip
    path = root / "coco_pope_random.json"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return {"path": path, "images": root / "val2014"}


def pope_parquet(root: Path) -> dict[str, Any]:
    """As lmms-lab publishes it: three lists in one, ids repeat within each."""
    rows = [
        {"id": str(number), "question_id": "1", "question": "Is there a dog in the image?", "answer": "no",
         "image_source": "COCO_val2014_1", "image": {"bytes": picture(), "path": None}, "category": category}
        for number, category in enumerate(("adversarial", "popular"))
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), root / "test-00000-of-00001.parquet")
    return {"path": root}


def mme(root: Path) -> dict[str, Any]:
    for folder, text, image in (("color", "color", "color"),
                                ("posters", "posters/questions_answers_YN", "posters/images")):  # fmt: skip
        save(root / image / "000000006723.jpg", "blue" if folder == "color" else "green")
        lines = [f"Is it {word}? {YES_NO}\t{answer}" for word, answer in (("blue", "Yes"), ("red", "No"))]
        (root / text).mkdir(parents=True, exist_ok=True)
        (root / text / "000000006723.txt").write_text("\n".join(lines) + "\n")
    return {"path": root}


def mmstar(root: Path) -> dict[str, Any]:
    row = {"index": 0, "question": "What is shown?\nOptions: A: a cat, B: a dog, C: two birds, D: nothing",
           "image": picture(), "answer": "B", "category": "coarse perception", "l2_category": "biology & chemistry",
           "meta_info": {"source": "MMBench", "split": "val"}}  # fmt: skip
    pq.write_table(pa.Table.from_pylist([row]), root / "mmstar.parquet")
    return {"path": root / "mmstar.parquet"}


def mmmu(root: Path) -> dict[str, Any]:
    shown, none = {"bytes": picture(), "path": "1.png"}, None
    first = {"id": "validation_Accounting_1", "question": "<image 1> Which of <image 2>?", "image_1": shown,
             "options": "['$6', '$7']", "image_2": {"bytes": picture("blue"), "path": "2.png"}, "image_3": none,
             "answer": "A", "question_type": "multiple-choice"}  # fmt: skip
    second = first | {"id": "validation_Art_Theory_2", "question": "<image 1> How many?", "image_2": none,
                      "options": "[]", "answer": "['4', 'four']", "question_type": "open"}  # fmt: skip
    pq.write_table(pa.Table.from_pylist([first, second]), root / "validation.parquet")
    return {"path": root / "validation.parquet"}


def table(root: Path) -> dict[str, Any]:
    """VLMEvalKit's layout; the picture in a cell as base64, a quoted cell over two lines."""
    image = base64.b64encode(picture() + b"\0" * 512).decode()
    header = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "l2-category"]
    cells = ["241", '"What is\nit?"', "", "cat", "dog", "bird", "", "C", "fine", image, "recognition"]
    path = root / "bench.tsv"
    path.write_text("\t".join(header) + "\n" + "\t".join(cells) + "\n")
    return {"path": path}


def mathvista(root: Path) -> dict[str, Any]:
    save(root / "images" / "1.jpg")
    row = {"pid": "1", "question": "How long?", "image": "images/1.jpg", "choices": None, "unit": "cm",
           "precision": 1.0, "answer": "1.2", "question_type": "free_form", "answer_type": "float",
           "metadata": {"task": "geometry problem solving", "split": "testmini"}, "query": ""}  # fmt: skip
    other = row | {"choices": ["35°", "145°"], "unit": None, "answer": "145°", "question_type": "multi_choice"}
    return {"path": write(root / "testmini.json", {"1": row, "2": other | {"pid": "2"}})}


def coco_captions(root: Path) -> dict[str, Any]:
    save(root / "val2014" / "COCO_val2014_000000391895.jpg")
    sentences = [{"tokens": [], "raw": f"A man {what}. ", "imgid": 0, "sentid": i} for i, what in enumerate("ab")]
    row = {"filepath": "val2014", "sentids": [0, 1], "filename": "COCO_val2014_000000391895.jpg", "imgid": 0,
           "split": "test", "sentences": sentences, "cocoid": 391895}  # fmt: skip
    other = row | {"split": "restval", "cocoid": 2, "filename": "gone.jpg"}
    return {"path": write(root / "dataset_coco.json", {"images": [row, other], "dataset": "coco"})}


BUILDERS: dict[str, tuple[str, Callable[[Path], dict[str, Any]]]] = {
    "vqav2": ("vqav2", vqav2), "textvqa": ("textvqa", textvqa), "scienceqa": ("scienceqa", scienceqa),
    "chartqa": ("chartqa", chartqa), "chartqa_parquet": ("chartqa", chartqa_parquet),
    "docvqa": ("docvqa", docvqa), "infovqa": ("infovqa", infovqa),
    "ocrbench": ("ocrbench", ocrbench), "pope": ("pope", pope), "pope_parquet": ("pope", pope_parquet),
    "mme": ("mme", mme), "mmstar": ("multiple_choice", mmstar), "mmmu": ("multiple_choice", mmmu),
    "table": ("multiple_choice", table), "mathvista": ("mathvista", mathvista),
    "coco_captions": ("coco_captions", coco_captions),
}  # fmt: skip
