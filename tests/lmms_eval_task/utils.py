"""What minivlm_colours.yaml calls: picture, question and score of a row `{"colour": ...}`."""

from typing import Any

from PIL import Image


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """One picture in the row's colour."""
    return [Image.new("RGB", (40, 30), doc["colour"])]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """The question."""
    return "Which colour is this?"


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 where the answer is the colour."""
    return {"exact_match": float(results[0].strip().lower() == doc["colour"])}
