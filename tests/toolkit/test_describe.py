"""What a checkpoint is, and a folder as one file."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from safetensors.torch import save_file

from toolkit import registry
from toolkit.concepts import Concept, EraseTask
from toolkit.errors import UserError
from toolkit.io.describe import MERGED, fitted_on, in_memory, on_disk
from toolkit.io.files import save_edit
from toolkit.io.pack import pack
from toolkit.model import Model
from toolkit.runs import watched, write_json


def test_a_folder_is_what_was_saved_there(tiny: Model, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model")
    (folder / "unet" / "old.bin").touch()
    write_json(folder / MERGED, [{"edit": "runs/x", "strength": 1.0}])
    found, loaded = on_disk(folder), in_memory(tiny)
    assert found.components == loaded.components and found.fingerprint == loaded.fingerprint == tiny.fingerprint
    assert (found.architecture, found.predicts, found.dtypes.keys()) == ("sd", "epsilon", {"F32"})
    assert found.merged == ({"edit": "runs/x", "strength": 1.0},) and found.pickles == ("unet/old.bin",)
    assert sum(found.components.values()) <= found.bytes / 4


def test_an_edit_says_what_it_was_fitted_on(tiny: Model, tmp_path: Path) -> None:
    edit = registry.load("method", "uce")().fit(tiny, EraseTask((Concept("cat", anchor="dog"),)))
    assert fitted_on(save_edit(edit, tmp_path / "edit.safetensors")) == ("uce", tiny.fingerprint)
    save_file({"x": edit.delta(edit.sites()[0])}, tmp_path / "damaged.safetensors", {"palimpsest": "[]"})
    with pytest.raises(UserError, match="damaged header"):
        fitted_on(tmp_path / "damaged.safetensors")


def test_a_folder_becomes_one_file(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "inner" / "x").write_bytes(b"12345")

    def stop(*_: object) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), watched(stop):
        pack(tmp_path / "folder", tmp_path / "held.zip")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"], "stopped, it leaves all as it was"
    with zipfile.ZipFile(pack(tmp_path / "folder", tmp_path / "held.zip")) as archive:
        assert archive.read("inner/x") == b"12345"
    assert [path.name for path in tmp_path.iterdir()] == ["held.zip"]
