"""Finds methods, architectures, edit kinds, attacks, metrics, tabs and commands by file, without importing them.

The stem of a file is the name of what it defines. A file belongs to a kind when, at its top level, it defines exactly
one public class that descends from the kind's base class (for commands: the functions `add_arguments` and `run`).
Bases are followed through `from x import y` by reading the source, so nothing is run to find out; a class that lists
`ABC` among its own bases is itself a base and does not count, and neither does a file whose name starts with "_". Helper
files therefore live beside methods without being taken for one.

Other distributions add to a kind by an entry point in the group "palimpsest.<kind>s": a class, or a module for commands.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from toolkit.errors import PalimpsestError, UserError, unknown

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Kind:
    """Where the files of a kind are (globs below the rooms' common folder) and what they define.

    base: the dotted name of the base class; None means a command, which is a module.
    """

    label: str
    globs: tuple[str, ...]
    base: str | None


KINDS = {
    "method": Kind("method", ("pipelines/*/*.py", "trainers/*/*.py"), "toolkit.method.Method"),
    "arch": Kind("architecture", ("toolkit/arch/*.py",), "toolkit.arch.base.Architecture"),
    "edit": Kind("edit kind", ("toolkit/edits/*.py",), "toolkit.edits.base.Edit"),
    "attack": Kind("attack", ("eval/attacks/*.py",), "eval.attacks.base.Attack"),
    "metric": Kind("metric", ("eval/metrics/*.py",), "eval.metrics.base.Metric"),
    "tab": Kind("tab", ("tabs/*.py",), "tabs.base.Tab"),
    "command": Kind("command", (*(f"{room}/commands/*.py" for room in ("toolkit", "pipelines", "trainers", "eval")), "app.py"), None),
}


@dataclass(frozen=True)
class Entry:
    """One thing that was found. where: its file, or the entry point that brings it; load: imports it."""

    name: str
    where: str
    load: Callable[[], Any]


@dataclass(frozen=True)
class Source:
    """What a source file says at its top level.

    classes: name -> dotted names of its bases. names: imported local name -> dotted name. functions: their names.
    texts: constants that are plain strings.
    """

    classes: dict[str, tuple[str, ...]]
    names: dict[str, str]
    functions: frozenset[str]
    texts: dict[str, str]


def names(kind: str) -> list[str]:
    """The names of a kind, sorted. Imports nothing."""
    return sorted(entries(kind))


def load(kind: str, name: str) -> Any:
    """The class called `name` (the module, for a command). Imports that one file. An unknown name is a UserError."""
    found = entries(kind)
    if name not in found:
        raise unknown(KINDS[kind].label, name, found)
    return found[name].load()


def entries(kind: str) -> dict[str, Entry]:
    """Name -> entry of everything of a kind. Two entries with one name are a UserError."""
    found: dict[str, Entry] = {}
    for entry in (*_own(KINDS[kind]), *map(_third_party, entry_points(group=f"palimpsest.{kind}s"))):
        if entry.name in found:
            where = f"{found[entry.name].where} and {entry.where}"
            raise UserError(f"two things are called {KINDS[kind].label} {entry.name!r}: {where}; rename or remove one")
        found[entry.name] = entry
    return found


def help_line(command: str) -> str:
    """A command's HELP, read without importing the command when its file is ours."""
    entry = entries("command")[command]
    path = Path(entry.where)
    return read_source(path).texts.get("HELP", "") if path.is_file() else entry.load().HELP


def _own(kind: Kind) -> list[Entry]:
    """The entries of a kind in this distribution's own files."""
    found = []
    for path in sorted(path for pattern in kind.globs for path in ROOT.glob(pattern)):
        if path.stem.startswith("_"):
            continue
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if kind.base is None:
            if {"add_arguments", "run"} <= read_source(path).functions:
                found.append(Entry(path.stem, str(path), functools.partial(importlib.import_module, module)))
        elif defined := _subclasses(path, module, kind.base):
            if len(defined) > 1:
                raise PalimpsestError(f"{path} defines {' and '.join(defined)}; one file defines one {kind.label}, give each its own")
            found.append(Entry(path.stem, str(path), functools.partial(_load_class, module, defined[0])))
    return found


def _third_party(point: EntryPoint) -> Entry:
    return Entry(point.name, f"entry point {point.value}", point.load)


def _load_class(module: str, name: str) -> type:
    return getattr(importlib.import_module(module), name)


def _subclasses(path: Path, module: str, base: str) -> list[str]:
    """The public classes of a file that descend from `base` and are not bases for others (no direct ABC)."""
    classes = read_source(path).classes
    return [
        name
        for name, bases in classes.items()
        if not name.startswith("_") and "abc.ABC" not in bases and any(_descends(parent, base) for parent in classes[name])
    ]


def _descends(dotted: str, base: str) -> bool:
    """Whether the class with this dotted name is `base` or descends from it, as far as our own sources say."""
    if dotted == base:
        return True
    module, _, name = dotted.rpartition(".")
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    if not module or not path.is_file():
        return False
    source = read_source(path)
    parents = source.classes.get(name) or ((source.names[name],) if name in source.names else ())
    return any(_descends(parent, base) for parent in parents)


def read_source(path: Path) -> Source:
    """The top level of a source file, without running it. Parsed once per version of the file."""
    return _parse(path, path.stat().st_mtime_ns)


@functools.cache
def _parse(path: Path, _version: int) -> Source:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    classes: dict[str, tuple[str, ...]] = {}
    imported: dict[str, str] = {}
    functions: set[str] = set()
    texts: dict[str, str] = {}
    for node in ast.parse(path.read_text(encoding="utf-8"), str(path)).body:
        match node:
            case ast.ImportFrom(module=source, names=aliases, level=level):
                package = importlib.util.resolve_name("." * level + (source or ""), module.rpartition(".")[0])
                imported |= {alias.asname or alias.name: f"{package}.{alias.name}" for alias in aliases}
            case ast.Import(names=aliases):
                imported |= {alias.asname: alias.name for alias in aliases if alias.asname}
            case ast.ClassDef(name=name, bases=bases):
                classes[name] = tuple(_dotted(ast.unparse(base), imported, module, classes) for base in bases)
            case ast.FunctionDef(name=name):
                functions.add(name)
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(text))):
                texts[name] = text
    return Source(classes, imported, frozenset(functions), texts)


def _dotted(written: str, imported: dict[str, str], module: str, classes: dict[str, Any]) -> str:
    """The full dotted name of a base class as it is written in a file."""
    head, dot, rest = written.partition(".")
    return f"{module}.{written}" if head in classes else f"{imported.get(head, head)}{dot}{rest}"
