"""Files of captions or prompts as the field writes them: plain text, CSV or JSON lines, with columns of many names."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import UserError

COLUMNS = ("prompt", "caption", "text", "prompts", "captions")  # what files call it; the first of these that a file has


@dataclass(frozen=True)
class Captions:
    """texts: the captions in the file's order, none empty. column: where they were found, "line" for plain text."""

    texts: tuple[str, ...]
    column: str


def load_captions(path: str | Path) -> Captions:
    """Captions from a .txt file with one a line, or from the column of a .csv or .jsonl file whose name is one of `COLUMNS`.

    Empty ones are left out. A file that cannot be read, has no such column or no caption is a UserError.
    """
    path = Path(path)
    reader = {".txt": _lines, ".csv": _csv, ".jsonl": _jsonl}.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"caption file {str(path)!r} is no .txt, .csv or .jsonl file; give one of these")
    try:
        found = reader(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read captions from {path} ({error}); give a UTF-8 .txt, .csv or .jsonl file") from error
    texts = tuple(text.strip() for text in found.texts if text.strip())
    if not texts:
        raise UserError(f"no caption in {path}; give a file with at least one")
    return Captions(texts, found.column)


def _lines(text: str) -> Captions:
    return Captions(tuple(text.split("\n")), "line")


def _csv(text: str) -> Captions:
    return _from_rows(list(csv.DictReader(io.StringIO(text), strict=True)))


def _jsonl(text: str) -> Captions:
    rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is no JSON object")
    return _from_rows(rows)


def _from_rows(rows: Sequence[Mapping[str, Any]]) -> Captions:
    """The texts of the first known column of the first row, which every row must have."""
    if not rows:
        return Captions((), "")
    names = {str(name).strip().lower(): name for name in rows[0]}
    column = next((names[known] for known in COLUMNS if known in names), None)
    if column is None:
        raise ValueError(f"its columns are {', '.join(map(repr, names))}, needs one of {', '.join(COLUMNS)}")
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get(column), str):
            raise ValueError(f"row {number} has no text in column {column!r}")
    return Captions(tuple(row[column] for row in rows), str(column))
