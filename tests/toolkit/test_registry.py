from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from toolkit import registry
from toolkit.arch.base import Architecture
from toolkit.edits.base import Edit
from toolkit.errors import PalimpsestError, UserError
from toolkit.method import Method

BASES = {"method": Method, "arch": Architecture, "edit": Edit}


@pytest.mark.parametrize("kind", BASES)
def test_what_is_found_loads_as_a_concrete_class_of_its_kind(kind: str) -> None:
    names = registry.names(kind)
    assert names
    for name in names:
        loaded = registry.load(kind, name)
        assert issubclass(loaded, BASES[kind]) and not loaded.__abstractmethods__
        assert loaded.__module__.rpartition(".")[2] == name


def test_commands_are_modules_with_a_help_line() -> None:
    assert {"methods", "generate", "erase", "customize", "compose", "export"} <= set(registry.names("command"))
    for name in registry.names("command"):
        assert registry.help_line(name) == registry.load("command", name).HELP != ""


def test_finding_imports_nothing() -> None:
    code = "import sys; from toolkit import registry; [registry.names(k) for k in registry.KINDS]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=registry.ROOT).returncode == 0


def test_unknown_name_says_the_near_ones() -> None:
    with pytest.raises(UserError, match=r"unknown method 'uec'; did you mean uce"):
        registry.load("method", "uec")
    with pytest.raises(UserError, match=r"unknown command 'zzz'; known: .*generate"):
        registry.load("command", "zzz")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes source files below a root of its own, which the registry then looks at."""
    monkeypatch.setattr(registry, "ROOT", tmp_path)

    def write(**files: str) -> None:
        for path, text in files.items():
            target = tmp_path / (path.replace("__", "/") + ".py")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)

    return write


METHOD = "from toolkit.method import Method\nclass A(Method): ...\n"


def test_bases_are_followed_through_other_files(tree) -> None:
    tree(
        pipelines__closed_form__direct=METHOD,
        pipelines__closed_form__of_sibling="from .direct import A as Other\nclass B(Other): ...\n",
        trainers__loop="from abc import ABC\nfrom toolkit.method import Method\nclass Trained(Method, ABC): ...\n",
        trainers__erase__trained="from trainers import loop\nclass C(loop.Trained): ...\n",
        trainers__erase__by_alias="import trainers.loop as shared\nclass D(shared.Trained): ...\n",
    )
    assert registry.names("method") == ["by_alias", "direct", "of_sibling", "trained"]


def test_helpers_bases_and_private_files_are_no_methods(tree) -> None:
    tree(
        pipelines__closed_form__rows="class Method: ...\nclass Rows(Method): ...\n",
        pipelines__closed_form__common="from abc import ABC\nfrom toolkit.method import Method\nclass Shared(Method, ABC): ...\n",
        pipelines__closed_form___draft=METHOD,
        pipelines__closed_form__quiet="from toolkit.method import Method\nclass _Hidden(Method): ...\n",
        pipelines__closed_form__user="from toolkit.method import Method\ndef f(m: Method): ...\n",
    )
    assert registry.names("method") == []


def test_two_methods_in_a_file_and_two_files_of_a_name_are_errors(tree, tmp_path: Path) -> None:
    tree(pipelines__closed_form__two=METHOD + "class B(Method): ...\n")
    with pytest.raises(PalimpsestError, match=r"two\.py defines A and B; one file defines one method"):
        registry.names("method")
    tree(pipelines__closed_form__two=METHOD, trainers__erase__two=METHOD)
    with pytest.raises(UserError, match=r"two things are called method 'two': .*closed_form/two.py and .*erase/two.py"):
        registry.names("method")


def test_entry_points_add_to_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    def points(group: str) -> list[EntryPoint]:
        return [EntryPoint("theirs", "toolkit.method:Method", group)] if group == "palimpsest.methods" else []

    monkeypatch.setattr(registry, "entry_points", points)
    assert "theirs" in registry.names("method")
    assert "theirs" not in registry.names("edit")
    assert registry.load("method", "theirs") is Method
