"""A saved edit attacked and audited at once: what `palimpsest audit` finds, as rates, prompts, pictures and its page."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eval.attacks.words import RANDOM
from eval.pictures import as_images, spread
from eval.trial import percent
from toolkit.images import grid, save_png
from toolkit.runs import write_atomic, write_json

if TYPE_CHECKING:
    from PIL import Image

    from eval.auditor import Auditor
    from eval.rates import Shown
    from eval.report_audit import Audit, Tried
    from toolkit.edits.base import Edit
    from toolkit.model import Model

SHOWN = 4  # pictures of each kind
HEADINGS = ("concept", "attack", "by name", "attacked", "control", "outcome")
PAGE = "audit.html"


@dataclass(frozen=True)
class Attacked:
    """audit: what was found. rows: `HEADINGS` of every attack, as text. prompts: attack and prompt. pictures: with what they are."""

    audit: Audit
    rows: list[list[str]]
    prompts: list[list[str]]
    pictures: list[tuple[Image.Image, str]]


def audit(auditor: Auditor, model: Model, edit: Edit, file: Path, name: str, concepts: Sequence[str], out: Path) -> Attacked:
    """Audit an edit, and write audit.html, audit.json and what shows them later into `out`.

    file: of the edit. name: what the page calls it.
    """
    from eval.report_edit import facts

    about = dataclasses.replace(facts(str(file), edit, 1.0, model), file=name)
    with model.attached(edit):
        found = auditor.look(model, model.reference(), about, concepts, auditor.command(name, model.source, concepts))
    result = Attacked(found, rows(found), prompts(found), pictures(found))
    write_atomic(out / PAGE, found.page())
    write_json(out / "audit.json", found.as_json())
    write_json(out / "report.json", {"headings": HEADINGS, "rows": result.rows, "prompts": result.prompts})
    config = {attack: own.config() for attack, own in auditor.attacks.items()}
    asked = {"audit": name, "model": model.source, "concepts": list(concepts), "attacks": config, "n": auditor.n}
    write_json(out / "config.json", asked)
    if result.pictures:
        save_png(grid([image for image, _ in result.pictures], SHOWN), out / "attacked.png")
    return result


def rows(audit: Audit) -> list[list[str]]:
    """The table: of every attack how often it shows the concept, beside how often its name alone does and its control."""
    return [
        [one.concept, f"{one.attack} ({one.needs})", *rates(one), one.outcome + (f": {one.why}" if one.why else "")] for one in audit.tried
    ]


def rates(one: Tried) -> list[str]:
    """By name, attacked, and control: the same of an object that the model never knew, or words drawn at random."""
    if one.found is None:
        return ["", "", ""]
    random = one.found.beside.get(RANDOM)
    control = percent(one.control) if one.control.n else f"{percent(random)}, random words" if random else "has none"
    return [percent(one.found.clean_rate), percent(one.rate), control]


def prompts(audit: Audit) -> list[list[str]]:
    """What every attack asked with."""
    return [[one.attack, prompt] for one in audit.tried if one.found for prompt in one.found.prompts]


def pictures(audit: Audit) -> list[tuple[Image.Image, str]]:
    """A row for each concept before and after, and for each attack on it."""
    found: list[tuple[Image.Image, str]] = []
    for concept, (before, after) in audit.images.items():
        sides = [("before", before), ("after", after)]
        sides += [(one.attack, one.found.shown) for one in audit.tried if one.concept == concept and one.found]
        found += [pair for label, shown in sides for pair in _row(label, shown)]
    return found


def _row(label: str, shown: Sequence[Shown]) -> list[tuple[Image.Image, str]]:
    """Some of the pictures, spread evenly."""
    picked = spread([item for item in shown if item.pixels.numel()], SHOWN)
    return [(image, f"{label}: {item.prompt.text}") for image, item in zip(as_images(picked), picked, strict=True)]
