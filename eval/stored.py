"""How results are stored: JSON files, where they are looked for, and how an image is written without its pixels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from eval.prompts import Prompt
from eval.rates import Shown
from toolkit.runs import write_atomic
from toolkit.world.oracle import NONE, Reading
from toolkit.world.scenes import PLACES, Scene

RESULTS = Path(__file__).parent / "results"  # those that the project keeps


def found(file: Path) -> Path | None:
    """A file of results, or the one of its name that the project keeps; None when there is neither."""
    return next((path for path in (file, RESULTS / file.name) if path.is_file()), None)


def read(file: Path, empty: dict[str, Any]) -> dict[str, Any]:
    """What `found` holds, or else this."""
    path = found(file)
    return json.loads(path.read_text(encoding="utf-8")) if path else empty


def write(file: Path, held: Mapping[str, Any]) -> None:
    """Write a file of results. It may be committed, so it is short."""
    write_atomic(file, json.dumps(held, ensure_ascii=False, separators=(",", ":")))


def reading_to_json(reading: Reading) -> dict[str, Any]:
    """What the oracle reads."""
    return {"objects": reading.present(), "styles": reading.styles, "background": reading.background}


def reading_of(shows: Mapping[str, Any]) -> Reading:
    """The inverse of `reading_to_json`."""
    return Reading(dict.fromkeys(PLACES, NONE) | shows["objects"], shows["styles"], shows["background"])


def to_json(before: Shown, after: Shown) -> list[dict[str, Any]]:
    """Two images by `row_of`; of the second what differs from the first."""
    first, second = row_of(before), row_of(after)
    return [first, {key: value for key, value in second.items() if value != first[key]}]


def from_json(rows: list[dict[str, Any]]) -> tuple[Shown, Shown]:
    """The inverse of `to_json`; without pixels."""
    first, second = rows
    return shown_of(first), shown_of({**first, **second})


def row_of(shown: Shown) -> dict[str, Any]:
    """An image without its pixels: what was asked for and what the oracle reads."""
    prompt = shown.prompt
    asked: dict[str, Any] = {"background": prompt.scene.background, "items": prompt.scene.items}
    if prompt.scene.style:
        asked["style"] = prompt.scene.style
    if prompt.words != prompt.names:
        asked["words"] = prompt.words
    return {"prompt": prompt.text, "seed": prompt.seed, "asked": asked, "shows": reading_to_json(shown.reading)}


def shown_of(row: Mapping[str, Any]) -> Shown:
    """The inverse of `row_of`; without pixels."""
    asked = row["asked"]
    scene = Scene(asked["background"], asked.get("style", ""), tuple((place, name) for place, name in asked["items"]))
    words = tuple(asked.get("words", (name for _, name in scene.items)))
    return Shown(Prompt(row["prompt"], row["seed"], scene, words), reading_of(row["shows"]), torch.empty(0))
