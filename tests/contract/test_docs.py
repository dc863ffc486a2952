"""What the documentation shows is what works: its code runs, its commands parse, its links lead somewhere."""

import ast
import re
import shlex
from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch

import pipelines.closed_form
from toolkit import registry
from toolkit.commands import open_method
from toolkit.model import Model

ROOT = Path(registry.__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def new_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tree like ours whose only method is the one that CONTRIBUTING.md shows, in the file that it names."""
    (code,) = blocks("CONTRIBUTING.md", "python")
    (where,) = re.findall(r"For example, `(.*?)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    file = tmp_path / where
    file.parent.mkdir(parents=True)
    file.write_text(code, encoding="utf-8")
    (tmp_path / "toolkit").symlink_to(ROOT / "toolkit")
    monkeypatch.setattr(registry, "ROOT", tmp_path)
    monkeypatch.setattr(pipelines.closed_form, "__path__", [str(file.parent)])


def test_the_shown_method_works_as_a_file(new_method: None, tiny: Model) -> None:
    assert registry.names("method") == ["null_out"]
    method = open_method("erase", "null_out", ["strength=1.0"])
    body = next(node for node in ast.walk(ast.parse(blocks("CONTRIBUTING.md", "python")[0])) if getattr(node, "name", "") == "fit")
    assert isinstance(body, ast.FunctionDef) and sum(1 for node in ast.walk(body) if isinstance(node, ast.stmt)) - 1 <= 10
    doc = type(method).__doc__ or ""
    assert all(re.search(rf"(?m)^\s*{section}\b", doc) for section in ("Equation", "Shapes", "Defaults", "Deviations"))
    before = {name: linear.weight.clone() for name, linear in tiny.arch.text_linears().items()}
    edit = method.fit(tiny, method.example_task(tiny))
    text = tiny.arch.encode(["cat", "dog"])
    c, g = text.hidden[[0, 1], text.length - 1]
    with tiny.attached(edit):
        for linear in tiny.arch.text_linears().values():
            torch.testing.assert_close(linear(c), linear(g), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(linear.weight, before[name]) for name, linear in tiny.arch.text_linears().items())


def test_the_shown_python_runs(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.model.load_model", lambda source: tiny)
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("README.md", "python")
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "erased.png").is_file() and tiny.edits == ()


def shown_commands() -> list[str]:
    lines = [line for page in PAGES for block in blocks(str(page.relative_to(ROOT)), "sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("palimpsest ")]


@pytest.mark.parametrize("line", shown_commands())
def test_the_shown_commands_are_understood(line: str) -> None:
    _, name, *words = shlex.split(line, comments=True)
    parser = ArgumentParser(exit_on_error=False)
    registry.load("command", name).add_arguments(parser)
    args = parser.parse_args(words)
    assert all(vars(args)[word[2:].replace("-", "_")] for word in words if word.startswith("--")), "every shown option is read"
    if name == "attack":
        registry.load("attack", args.method)
    elif getattr(args, "method", None):
        keep = name == "customize" and args.preserve_world
        open_method("merge" if name == "compose" else name, args.method, args.set, keep_world=keep)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_names_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert all((page.parent / link).exists() for link in links)
    names = re.findall(r"`((?:toolkit|pipelines|trainers|eval|tests)/[\w/]+(?:\.py|/))`", text)
    assert [name for name in names if not (ROOT / name).exists()] in ([], ["pipelines/closed_form/null_out.py"])


def test_the_table_of_methods_is_complete() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| .*? \| \[([\d.]+)\]\S+ \| (yes|no) \|", text, re.MULTILINE)
    methods = {name: registry.load("method", name) for name in registry.names("method")}
    expected = {(name, method.paper.partition(":")[2], "no" if method.training_free else "yes") for name, method in methods.items()}
    assert set(rows) == expected
