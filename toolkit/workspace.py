"""A working folder that nothing leaves: what is read and written there is named by ids, never by paths.

<folder>/runs/<id>/     one for each job that keeps something: edit.safetensors, config.json, result.json, pictures
<folder>/edits/         edits of other places, .safetensors files or folders with one, put there by whoever owns the folder
<folder>/models/        models likewise: diffusers folders and .safetensors files
<folder>/cache/         what is on its way to or from a browser
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import UserError
from toolkit.io.files import FILE_NAME
from toolkit.runs import check_writable

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)
PARTS = ("runs", "edits", "models", "cache")


@dataclass(frozen=True)
class Workspace:
    """folder: made when it is not there."""

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", check_writable(self.folder).resolve())
        for part in PARTS:
            check_writable(self.folder / part)

    def path(self, name: str) -> Path:
        """What a name such as "runs/20260101-esd-pistol" or "edits/toy.safetensors" stands for; it need not exist.

        Absolute paths, "..", hidden files, and what a link leads out of the folder are a UserError.
        """
        parts = name.split("/")
        if not (2 <= len(parts) <= 4 and parts[0] in PARTS and all(map(NAME.fullmatch, parts))):
            raise UserError(f"{name[:100]!r} is no name of something in the working folder; choose one from the list")
        path = self.folder.joinpath(*parts)
        if not path.resolve().is_relative_to(self.folder):
            raise UserError(f"{name[:100]!r} is a link out of the working folder; put a copy there instead")
        return path

    def edit_file(self, name: str) -> Path:
        """The file of the edit of this name."""
        return self.path(f"{name}/{FILE_NAME}") if self.path(name).is_dir() else self.path(name)

    def said(self, name: str) -> dict[str, Any]:
        """What the JSON file of this name says; nothing when it is not there or is no JSON object."""
        path = self.path(name)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def name(self, path: Path) -> str:
        """The inverse of `path`."""
        return path.relative_to(self.folder).as_posix()

    def new_run(self, *words: str) -> Path:
        """A new folder in `runs`, named by the time and these words."""
        slug = re.sub(r"[^A-Za-z0-9]+", "-", " ".join(words), flags=re.ASCII).strip("-").lower()[:60].strip("-")
        stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{slug or 'run'}"
        for number in range(1, 1000):
            folder = self.folder / "runs" / (stem if number == 1 else f"{stem}-{number}")
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return folder
        raise UserError(f"a thousand runs are called {stem}; wait a second")

    def published(self, name: str) -> Path:
        """A file of this name for a browser to fetch: in `cache`, which is all that is served, and without a copy where links are had."""
        source = self.path(name)
        if not source.is_file():
            raise UserError(f"no file {name[:100]!r} in the working folder; choose one from the list")
        target = self.folder / "cache" / uuid.uuid4().hex / source.name
        target.parent.mkdir()
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)
        return target

    def runs(self) -> list[str]:
        """The names of all runs, the newest first."""
        return sorted((name for name in self._listed("runs") if self.path(name).is_dir()), reverse=True)

    def edits(self) -> list[str]:
        """The names of everything that holds an edit: runs, the newest first, then the files and folders of `edits`."""
        held = [name for name in (*self.runs(), *self._listed("edits")) if self._holds_edit(self.path(name))]
        return list(dict.fromkeys(held))

    def models(self) -> list[str]:
        """The names of the models in `models`."""
        listed = [(name, self.path(name)) for name in self._listed("models")]
        return [name for name, path in listed if path.suffix == ".safetensors" or (path / "model_index.json").is_file()]

    def _listed(self, part: str) -> list[str]:
        """The names in a part that are not links out of the folder."""
        found = sorted((self.folder / part).iterdir())
        inside = [path for path in found if path.resolve().is_relative_to(self.folder)]
        return [self.name(path) for path in inside if NAME.fullmatch(path.name)]

    def _holds_edit(self, path: Path) -> bool:
        file = path / FILE_NAME if path.is_dir() else path
        return file.suffix == ".safetensors" and file.is_file() and file.resolve().is_relative_to(self.folder)
