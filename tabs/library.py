"""The library: every saved edit with a picture, who made it, what it is about, its size and date."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageOps

from tabs.base import App

SIDE = 160  # of a picture
DATED = re.compile(r"^\d{8}-\d{6}-")  # how names of runs begin
CELL = 64  # largest side of a part of a grid that is one picture


@dataclass(frozen=True)
class Saved:
    """An edit as it is listed. about: its new words, or what it erases."""

    name: str
    picture: Image.Image
    method: str
    about: str
    bytes: int
    made: float

    @property
    def caption(self) -> str:
        """What stands below its picture."""
        from tabs.checkpoints import size

        date = time.strftime("%d %b %Y, %H:%M", time.localtime(self.made))
        return " · ".join(filter(None, (self.about, self.method, size(self.bytes), date)))


def saved(app: App) -> list[Saved]:
    """All of the working folder, the newest first, then those of the command line."""
    names = app.workspace.edits()
    return [_of_file(app, name) for name in names] + [_given(app, name) for name in app.shelf.given]


def _of_file(app: App, name: str) -> Saved:
    from toolkit.errors import PalimpsestError
    from toolkit.io.describe import fitted_on

    file = app.workspace.edit_file(name)
    folder, status = file.parent, file.stat()
    own, config, method = name.startswith("runs/"), {}, "damaged"
    with suppress(PalimpsestError):
        config = app.workspace.said(f"{name}/config.json") if own else {}
        method = fitted_on(file)[0]
    about = _about(config) if config else name.partition("/")[2]
    found = sorted(path for path in folder.glob("*.png") if path.resolve().is_relative_to(app.workspace.folder)) if own else []
    return Saved(name, _picture(found[0]) if found else _tile(about), method, about, status.st_size, status.st_mtime)


def _given(app: App, name: str) -> Saved:
    edit = app.shelf.given[name][0]
    count = sum(tensor.numel() * tensor.element_size() for tensor in edit.tensors().values())
    about = ", ".join(edit.info.triggers) or name.partition("/")[2]
    return Saved(name, _tile(about), edit.info.method, about, count, time.time())


def _about(config: dict[str, Any]) -> str:
    """What a run's edit is about, by what was asked for."""
    task = config.get("task") or {}
    learnt = [subject["token"] for subject in task.get("subjects", ())]
    erased = [concept["name"] for concept in task.get("concepts", ())]
    composed = [DATED.sub("", str(name).partition("/")[2]).partition("@")[0] for name in config.get("edits", ())]
    names = learnt or [f"without {name}" for name in erased] or composed
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _picture(path: Path) -> Image.Image:
    """The upper left part of a grid of pictures."""
    with Image.open(path) as sheet:
        side = min(sheet.size) if min(sheet.size) < 2 * CELL else min(sheet.size) // 2
        cell = sheet.convert("RGB").crop((0, 0, side, side))
    return ImageOps.contain(cell, (SIDE, SIDE), Image.Resampling.NEAREST)


def _tile(words: str) -> Image.Image:
    """For an edit without a picture."""
    tile = Image.new("RGB", (SIDE, SIDE), "#d6d3d1")
    ImageDraw.Draw(tile).multiline_text((SIDE / 2, SIDE / 2), "\n".join(words.split(", ")[:4])[:60], "#292524", anchor="mm", align="center")
    return tile
