"""The working folder: names lead to what is in it and to nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolkit.errors import UserError
from toolkit.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "app")


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "runs/../../secret.safetensors",
        "runs/..",
        "/etc/passwd",
        "runs//etc/passwd",
        "runs/.hidden",
        "runs",
        "",
        "elsewhere/x",
        "runs/a\x00b",
        "runs/a\\..\\b",
        "runs/~root",
        "runs/" + "a" * 200,
        "edits/a/b/c/d",
        "edits/ａ",
        "edits/x\n",
    ],
)
def test_no_name_leads_out(workspace: Workspace, name: str) -> None:
    with pytest.raises(UserError, match="is no name of something in the working folder"):
        workspace.path(name)


def test_links_out_of_the_folder_are_not_followed(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "edit.safetensors").write_bytes(b"secret")
    (workspace.folder / "edits" / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (workspace.folder / "runs" / "link").symlink_to(tmp_path / "folder")
    assert workspace.edits() == [] and workspace.runs() == []
    for name in ("edits/link.safetensors", "runs/link", "runs/link/edit.safetensors"):
        with pytest.raises(UserError, match="is a link out of the working folder"):
            workspace.path(name)


def test_runs_and_edits_are_listed(workspace: Workspace) -> None:
    first, second = workspace.new_run("esd", "pistol/../x"), workspace.new_run("esd", "pistol/../x")
    assert first != second and first.name.endswith("-esd-pistol-x") and second.name.endswith("-esd-pistol-x-2")
    (first / "edit.safetensors").touch()
    (workspace.folder / "edits" / "mine.safetensors").touch()
    (workspace.folder / "edits" / "notes.txt").touch()
    assert workspace.edits() == [workspace.name(first), "edits/mine.safetensors"]
    assert set(workspace.runs()) == {workspace.name(first), workspace.name(second)}
    assert workspace.path(workspace.name(first)) == first


def test_models_are_listed(workspace: Workspace) -> None:
    (workspace.folder / "models" / "one.safetensors").touch()
    (workspace.folder / "models" / "pickle.ckpt").touch()
    (workspace.folder / "models" / "two").mkdir()
    (workspace.folder / "models" / "two" / "model_index.json").touch()
    assert workspace.models() == ["models/one.safetensors", "models/two"]


def test_what_is_published_is_in_the_cache(workspace: Workspace) -> None:
    run = workspace.new_run("audit")
    (run / "page.html").write_text("evidence")
    published = workspace.published(f"{workspace.name(run)}/page.html")
    assert published.read_text() == "evidence" and published.is_relative_to(workspace.folder / "cache")
    for name in (workspace.name(run), f"{workspace.name(run)}/none.html", "runs/../x"):
        with pytest.raises(UserError):
            workspace.published(name)


def test_what_a_file_says_and_what_says_nothing(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    run = workspace.new_run("uce")
    name = f"{workspace.name(run)}/result.json"
    assert workspace.said(name) == {}
    for content, found in (("{", {}), ("[1]", {}), ('{"seconds": 2.5}', {"seconds": 2.5})):
        (run / "result.json").write_text(content)
        assert workspace.said(name) == found
    (run / "result.json").unlink()
    (run / "result.json").symlink_to(__file__)
    with pytest.raises(UserError, match="link out of the working folder"):
        workspace.said(name)
