"""Rows as one self-contained HTML table. Everything in a row is hostile text, except pictures of known types."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

PICTURE = re.compile(r"data:image/(?:png|jpeg|webp|gif);base64,[A-Za-z0-9+/=]+")
STYLE = "body{font:14px sans-serif}td,th{border:1px solid #ccc;padding:4px;vertical-align:top}img{max-width:160px}"


def panel_html(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A table with one column per key, in order of appearance; `data:image/..;base64,` values, or
    lists of them, become pictures."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "\n".join("<tr>" + "".join(f"<td>{_cell(row.get(c, ''))}</td>" for c in columns) + "</tr>" for row in rows)
    name = html.escape(title)
    return (
        f"<!doctype html><meta charset=utf-8><title>{name}</title><style>{STYLE}</style>"
        f"<h1>{name}</h1><table><tr>{head}</tr>\n{body}</table>\n"
    )


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "".join(_cell(item) for item in value)
    text = str(value)
    return f'<img src="{text}" alt="">' if PICTURE.fullmatch(text) else html.escape(text)
