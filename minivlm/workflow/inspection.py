"""What a source is, before anything is trained on it: formats, counts, lengths, bad rows, what one row teaches.

Called by `python -m jobs.inspect`. Reads in this process and needs no cluster and no model.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image
from transformers import PreTrainedTokenizerFast

from minivlm import layout
from minivlm.config import Config
from minivlm.data.catalog import AnnotationFile, find_files
from minivlm.data.chat import IGNORE, encode_chat
from minivlm.data.clips import Clip
from minivlm.data.errors import RowError
from minivlm.data.formats import format_name
from minivlm.data.images import read_image
from minivlm.data.readers import read_rows
from minivlm.data.settings import image_limits, num_image_tokens, rules
from minivlm.data.sources import decode_row
from minivlm.data.tokenizer import load_tokenizer
from minivlm.data.validate import Checked, Source, check_rows
from minivlm.schema import Message

REASONS_SHOWN = 10
PREVIEW_COLUMNS = 32
SUPERVISED, PLAIN = ("\033[32m", "\033[0m")


def inspect_source(config: Config, path: str, *, stage: str, image_root: Path | None, subset: str | None,
                   max_rows: int, preview: bool, colour: bool) -> list[str]:  # fmt: skip
    """The report's lines on the first `max_rows` rows of every file.

    Args:
        stage: what the rows would be used for: pretrain, sft, prompts or mpo.
        preview: draw the first pictures as coloured half blocks.
        colour: mark supervised tokens by colour instead of brackets.

    Raises:
        DataError: nothing to read there.
    """
    files = find_files(path, image_root, subset)
    formats: Counter[str] = Counter()
    checked = Checked()
    for file in files:
        rows = list(islice(read_rows(file.path), max_rows))
        formats.update(_format(raw, file) for _, raw in rows)
        own = (tuple(file.columns.items()), 1.0)
        source = Source(str(file.path), str(file.image_root), stage, "auto", "caption", *own)
        found = check_rows(rows, source, rules(config))
        checked.samples.extend(found.samples)
        checked.pairs.extend(found.pairs)
        checked.bad.extend(found.bad)
        checked.videos.extend(found.videos)
    good: list[dict[str, Any]] = [*checked.samples, *checked.pairs]
    lines = [f"{path}: {len(files)} file(s), the first {max_rows} rows of each", *_table("format", formats)]
    lines.append(f"{'usable':<12}{len(good)} rows as {stage}, {len(checked.bad)} bad")
    lines += _table("bad", Counter(bad.reason for bad in checked.bad), REASONS_SHOWN)
    if checked.bad:
        first = checked.bad[0]
        lines.append(f"{'first bad':<12}{first.file}, row {first.row}: {first.reason}")
    if good:
        lines += [
            *_counts(checked),
            *_videos(config, checked.videos, preview),
            *_pictures(config, good, preview),
            *_tokens(config, good, colour),
        ]
    return lines


def _format(raw: Any, file: AnnotationFile) -> str:
    try:
        return format_name({file.columns.get(key, key): value for key, value in decode_row(raw).items()})
    except RowError:
        return "unknown"


def _table(name: str, counts: Counter[str], most: int | None = None) -> list[str]:
    return [f"{name:<12}{count:>7}  {key}" for key, count in counts.most_common(most)]


def _counts(checked: Checked) -> list[str]:
    lines = []
    for key in ("language", "split", "task"):
        lines += _table(key, Counter(sample[key] for sample in checked.samples), REASONS_SHOWN)
    turns = [turn for sample in checked.samples for turn in sample["messages"]]
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    answers += [pair[key] for pair in checked.pairs for key in ("chosen", "rejected")]
    return [*lines, _spread("turns", [len(sample["messages"]) for sample in checked.samples], "per conversation"),
            _spread("answers", [len(text) for text in answers], "characters")]  # fmt: skip


def _spread(name: str, values: Sequence[int], unit: str) -> str:
    if not values:
        return f"{name:<12}none"
    return f"{name:<12}{min(values)} to {max(values)}, median {median(values):g} {unit}"


def _pictures(config: Config, rows: list[dict[str, Any]], preview: bool) -> list[str]:
    paths = {digest: path for row in rows for digest, path in zip(row["image_sha256"], row["images"], strict=True)}
    uses = sum(len(row["images"]) for row in rows)
    lines = [f"{'pictures':<12}{uses} in rows, {len(paths)} distinct",
             _spread("per row", [len(row["images"]) for row in rows], "pictures")]  # fmt: skip
    for path in islice(paths.values(), 3):
        lines += _picture(config, "picture", path, preview)
    return lines


def _picture(config: Config, name: str, path: str, preview: bool) -> list[str]:
    picture, _ = read_image(Path(path), image_limits(config))
    line = f"{name:<12}{picture.width} x {picture.height} px, {path}"
    return [line, *half_blocks(picture)] if preview else [line]


def _videos(config: Config, videos: list[tuple[str, Clip]], preview: bool) -> list[str]:
    """The first of them with the times of their frames; the first one's frames are drawn."""
    if not videos:
        return []
    distinct = {clip.digest: (name, clip) for name, clip in videos}
    asked = f"{config.data.video_rule}, at most {config.data.video_frames} frames"
    lines = [f"{'videos':<12}{len(videos)} in rows, {len(distinct)} distinct; {asked}"]
    for name, clip in islice(distinct.values(), 3):
        times = " ".join(f"{seconds:.2f}" for seconds in clip.seconds)
        lines.append(f"{'video':<12}{name}: {len(clip.frames)} frames, at {times} s")
    first = videos[0][1].frames if preview else ()
    return [*lines, *(line for frame in first for line in _picture(config, "frame", frame.path, preview))]


def half_blocks(picture: Image.Image) -> Iterable[str]:
    """The picture in a terminal of 24-bit colours: two pixels per character, one above the other."""
    rows = max(1, round(PREVIEW_COLUMNS * picture.height / picture.width / 2))
    small = picture.convert("RGB").resize((PREVIEW_COLUMNS, 2 * min(rows, PREVIEW_COLUMNS)))
    for y in range(0, small.height, 2):
        pairs = [(small.getpixel((x, y)), small.getpixel((x, y + 1))) for x in range(small.width)]
        cells = (f"\033[38;2;{_rgb(above)};48;2;{_rgb(below)}m\u2580" for above, below in pairs)
        yield "".join(cells) + PLAIN


def _rgb(pixel: Any) -> str:
    return ";".join(str(value) for value in pixel)


def _tokens(config: Config, rows: list[dict[str, Any]], colour: bool) -> list[str]:
    path = layout.tokenizer_path(config)
    if not config.tokenizer.path and not Path(path).is_dir():
        return [f"{'tokens':<12}not counted: the tokenizer of these settings is trained by python -m jobs.tokenizer"]
    tokenizer, width = load_tokenizer(path), num_image_tokens(config)
    encoded = [encode_chat(tokenizer, messages, width) for row in rows if (messages := _conversation(row))]
    if not encoded:
        return []
    lengths = [len(ids) for ids, _ in encoded]
    ids, labels = encoded[0]
    long = sum(length > config.model.max_length_tokens for length in lengths)
    learned = sum(label != IGNORE for label in labels)
    return [
        _spread("tokens", lengths, f"with {width} per picture; {long} over model.max_length_tokens"),
        _spread("supervised", [sum(label != IGNORE for label in row) for _, row in encoded], "tokens"),
        f"{'first row':<12}{learned} of {len(ids)} tokens are learned, {'green' if colour else 'in brackets'}:",
        marked_tokens(tokenizer, ids, labels, colour=colour),
    ]


def _conversation(row: dict[str, Any]) -> list[Message]:
    """The turns that are learned from; of a pair, its chosen answer. Empty for a prompt."""
    if "chosen" in row:
        return [Message("user", row["question"]), Message("assistant", row["chosen"])]
    messages = [Message(turn["role"], turn["content"]) for turn in row["messages"]]
    return messages if any(message.role == "assistant" for message in messages) else []


def marked_tokens(
    tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], labels: Sequence[int], *, colour: bool
) -> str:
    """One row as text, token by token: learned ones in green or brackets, runs of one token with their number."""
    parts, place = [], 0
    while place < len(ids):
        run = place + 1
        while run < len(ids) and ids[run] == ids[place] and labels[run] == IGNORE == labels[place]:
            run += 1
        text = tokenizer.decode([ids[place]]) + (f" x {run - place} " if run - place > 1 else "")
        if labels[place] != IGNORE:
            text = f"{SUPERVISED}{text}{PLAIN}" if colour else f"[{text}]"
        parts.append(text)
        place = run
    return "".join(parts)
