"""The rules of the house that no linter knows: who may import whom, who may say what, what a method documents."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from toolkit import registry

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("toolkit", "pipelines", "trainers", "eval", "tabs", "app")  # a room may import those before it; tabs and app are one
FILES = sorted(path for room in ROOMS for path in (*ROOT.glob(f"{room}/**/*.py"), *ROOT.glob(f"{room}.py")))
FAMILY_WORDS = re.compile(r"\.unet\b|\.transformer\b|attn2|add_k_proj|text_model")
MAY_SAY_FAMILY_WORDS = ("toolkit/arch/", "toolkit/io/export", "trainers/world/")
MAX_LINES = 350


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(path: Path) -> set[str]:
    """Every module that a file imports anywhere, dotted."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_no_room_imports_an_upper_one(path: Path) -> None:
    room = relative(path).split("/")[0].removesuffix(".py")
    upper = ROOMS[ROOMS.index(room) + 1 :]
    assert not [name for name in imported(path) if name.split(".")[0] in upper]


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_nobody_shadows_the_builtin_eval(path: Path) -> None:
    imports = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Import)]
    bound = {alias.asname or alias.name.split(".")[0] for node in imports for alias in node.names}
    assert "eval" not in bound, "write from eval.x import y"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_only_architectures_say_how_a_family_is_built(path: Path) -> None:
    if relative(path).startswith(MAY_SAY_FAMILY_WORDS):
        return
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    assert not [f"{number}: {line.strip()}" for number, line in lines if FAMILY_WORDS.search(line)]


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "tests").rglob("*.py"))], ids=relative)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("name", registry.names("method"))
def test_a_method_says_what_it_implements(name: str) -> None:
    method = registry.load("method", name)
    text = method.__doc__ or ""
    assert re.search(r"arXiv[: ]?\d{4}\.\d{4,5}", text), "no arXiv id"
    assert re.search(r"\d{4}\.\d{4,5}", method.paper)
    assert not [section for section in ("Equation", "Shapes", "Defaults", "Deviations") if not re.search(rf"(?m)^\s*{section}\b", text)]
    assert method.name() == name


def test_the_rules_see_the_files() -> None:
    assert {"toolkit/cli.py", "toolkit/arch/base.py"} <= set(map(relative, FILES))
    assert registry.names("method")
