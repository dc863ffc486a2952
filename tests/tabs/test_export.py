"""What Checkpoints writes."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tabs.checkpoints import exported
from tabs.shelf import Shelf
from toolkit import registry
from toolkit.concepts import Concept, EraseTask
from toolkit.io.describe import on_disk
from toolkit.model import Model
from toolkit.workspace import Workspace


@pytest.mark.parametrize("format", ["checkpoint", "diffusers-lora", "delta"])
def test_an_export_is_one_file(tiny: Model, tmp_path: Path, format: str) -> None:
    edit = registry.load("method", "uce")().fit(tiny, EraseTask((Concept("cat", anchor="dog"),)))
    tiny.source = "models/tiny"
    shelf = Shelf(Workspace(tmp_path / "app"), tiny, {"given/1-cat": (edit, 0.5)}, {})
    tiny.save(shelf.workspace.folder / "models" / "tiny")
    out = shelf.workspace.new_run("export")
    made = exported(shelf, "models/tiny", {"given/1-cat": 0.5}, format, out)
    assert {path.name for path in out.iterdir()} == {made.file.name, "config.json"} and not made.said
    if format == "checkpoint":
        with zipfile.ZipFile(made.file) as archive:
            archive.extractall(tmp_path / "again")
        assert on_disk(tmp_path / "again").merged[0]["method"] == "uce"
        with tiny.attached(edit, scale=0.5):
            assert on_disk(tmp_path / "again").fingerprint == Model(tiny.arch).fingerprint
