"""What an edit is, as its file and the weights of its model say: where it comes from, what it changes and by how much."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.edits.base import by_precedence
from toolkit.fingerprint import same_base
from toolkit.io.export import formats
from toolkit.io.files import FILE_NAME

if TYPE_CHECKING:
    from toolkit.edits.base import Edit
    from toolkit.model import Model


@dataclass(frozen=True)
class Change:
    """Of one component of the model: how many of its parameters and of its numbers are touched, and how far they move.

    moved: |change| / |before| of what is touched, Frobenius norms. most: the parameter that moves furthest, in its own units.
    """

    parameters: int
    of: int
    numbers: int
    moved: float
    most: tuple[str, float]


@dataclass(frozen=True)
class EditFacts:
    """An edit without drawing with it.

    kinds: of its parts. made_by: method, options and what it was fitted on, by part. task: what it was told, where a config.json beside it
    says so. same_base: whether the model is the one it was fitted on; None where it does not say. warnings: what attaching it says.
    changes: by component. brings: by kind, how many words or modules it adds, with their numbers. exports: what other tools can get.
    """

    file: str
    bytes: int
    kinds: tuple[str, ...]
    made_by: tuple[dict[str, Any], ...]
    task: Mapping[str, Any]
    same_base: bool | None
    warnings: tuple[str, ...]
    changes: Mapping[str, Change]
    brings: Mapping[str, tuple[int, int]]
    exports: tuple[str, ...]
    mergeable: bool
    scale: float = 1.0
    model: Mapping[str, str] = field(default_factory=dict)


def facts(written: str, edit: Edit, scale: float, model: Model) -> EditFacts:
    """Look at an edit and at the model that it is for, to which it is attached and from which it is taken off again."""
    file = edit_path(written)
    parts = [part for part, _ in edit.parts(scale)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        with model.attached(edit, scale=scale):
            pass
    bases = [part.info.base for part in parts if part.info.base]
    brings: dict[str, tuple[int, int]] = {}
    for part in parts:
        added = [site for site in part.sites() if site not in set(part.parameter_names())]
        if added:
            count, numbers = brings.get(part.kind(), (0, 0))
            brings[part.kind()] = count + len(added), numbers + sum(part.delta(site).numel() for site in added)
    return EditFacts(
        str(file),
        file.stat().st_size,
        tuple(dict.fromkeys(part.kind() for part in parts)),
        tuple({"method": part.info.method, "config": dict(part.info.config), "on": list(part.info.on)} for part in parts),
        told(file),
        all(same_base(base, model.fingerprint) for base in bases) if bases else None,
        tuple(dict.fromkeys(str(warning.message) for warning in said)),
        changes(edit, scale, model),
        brings,
        tuple(formats(edit)),
        all(part.mergeable for part in parts),
        scale,
        model.fingerprint,
    )


def edit_path(written: str) -> Path:
    """The file of FILE[@SCALE], which may be the folder that a command wrote."""
    path = Path(written if Path(written).exists() else written.rpartition("@")[0])
    return path / FILE_NAME if path.is_dir() else path


def told(file: Path) -> dict[str, Any]:
    """The task that the command which made an edit was given; empty when nothing says so."""
    config = file.with_name("config.json")
    return json.loads(config.read_text(encoding="utf-8")).get("task", {}) if config.is_file() else {}


def changes(edit: Edit, scale: float, model: Model) -> dict[str, Change]:
    """What the parameters become, component by component."""
    touching: dict[str, list[tuple[Edit, float]]] = {}
    for part in by_precedence(edit.parts(scale)):
        for name in part[0].parameter_names():
            touching.setdefault(name, []).append(part)
    moved: dict[str, dict[str, tuple[int, float, float]]] = {}
    for name, parts in touching.items():
        before = model.arch.parameter(name).detach().float()
        after = before
        for part, own in parts:
            after = part.weight(name, after, own)
        component = name.partition(".")[0]
        moved.setdefault(component, {})[name] = before.numel(), float((after - before).square().sum()), float(before.square().sum())
    return {component: _change(found, model, component) for component, found in moved.items()}


def _change(found: Mapping[str, tuple[int, float, float]], model: Model, component: str) -> Change:
    """Of one component: parameter -> its numbers, and the squared norms of its change and of what it was."""
    by_name = {name: (change / max(before, 1e-30)) ** 0.5 for name, (_, change, before) in found.items()}
    numbers, change, before = (sum(values) for values in zip(*found.values(), strict=True))
    every = sum(1 for _ in model.arch.components()[component].parameters())
    return Change(len(found), every, int(numbers), (change / max(before, 1e-30)) ** 0.5, max(by_name.items(), key=lambda item: item[1]))
