"""The page about the methods: what was measured against its bars, and task by task."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.method_cells import BARE, ERASERS, KEPT, LEARNER, Portrait
from eval.method_results import (
    ASKED_FOR,
    BY_WORD,
    Measured,
    instead_style,
    kept,
    kept_objects,
    rows,
    short,
    still_drawn,
    subject_drawn,
)
from eval.rates import background_right, drawn_instead, most_drawn, object_right, relative, share
from eval.subjects import PICTURES

BARS = ("what", "bar", "unedited", "measured", "n")
ERASED = ("by name", "given synonyms", "held-back synonyms", "the same, fitted without synonyms")
INSTEAD = ("shows", "most often", "background", "style", "oracle-KID", "others kept")
STYLE = ("drawn by name", "unedited, no style named", "object right", "background right", "others kept")
SUBJECT = (
    "style",
    "class name",
    "new contexts",
    "beside another",
    "both drawn",
    "unedited, by its name",
    "background",
    "others kept",
    "steps",
)
COST = ("fit, s", "edit, KiB")


@dataclass(frozen=True)
class Settings:
    """What the page says about how it was made.

    configs: method -> its options. cells: how many there are in all. poorly: how often the unedited model draws the objects
    of the list that do not count.
    """

    command: str
    n: int
    measured_by: Mapping[str, Any]
    model: str
    configs: Mapping[str, Mapping[str, Any]]
    cells: int
    poorly: Mapping[str, float]


def page(results: Sequence[Measured], settings: Settings) -> str:
    """The markdown page."""
    absent = settings.cells - len(results)
    return PAGE.format(
        command=settings.command,
        n=settings.n,
        kept=max(1, round(KEPT * settings.n)),
        model=settings.model,
        oracle=settings.measured_by["version"],
        threshold=settings.measured_by["threshold"],
        steps=settings.measured_by["steps"],
        guidance=settings.measured_by["guidance"],
        bare=BARE,
        poorly=", ".join(f"{name} ({100 * value:.0f} %)" for name, value in settings.poorly.items()) or "nothing",
        pictures=len(PICTURES),
        absent=f"\n{absent} of {settings.cells} tasks are not measured here: the command was given `--only`, or was interrupted.\n"
        if absent
        else "",
        missed="\n".join(f"- {line}" for line in missed(results)) or "None.",
        methods="\n\n".join(by_task(method, results, settings.configs[method]) for method in (*ERASERS, LEARNER)),
        objects=by_object_kept(results),
    )


def missed(results: Sequence[Measured]) -> list[str]:
    """The lines that miss their bars, of all methods."""
    lines = [(method, row) for method in (*ERASERS, LEARNER) for row in rows(results, method)]
    return [f"{method}, {row.what}: {short(row.estimate, 1)}" for method, row in lines if row.missed]


def by_task(method: str, results: Sequence[Measured], config: Mapping[str, Any]) -> str:
    """A method's tables: against the bars, then one line for each task."""
    own = [result for result in results if result.cell.method == method]
    bare = {result.cell.task.removesuffix(" without synonyms"): result for result in own if result.cell.section == "bare"}
    objects = [result for result in own if result.cell.section in ("objects", "anchored", "group")]
    tables = [
        table(BARS, [row.cells() for row in rows(results, method)]),
        table(("task", *ERASED), [[result.cell.task, *by_words(result, bare.get(result.cell.task))] for result in objects]),
        table(("task", *INSTEAD, *COST), [[result.cell.task, *in_its_place(result), *cost(result)] for result in objects]),
        table(("style", *STYLE, *COST), [[r.cell.task, *of_style(r), *cost(r)] for r in own if r.cell.section == "styles"]),
        table(("subject", *SUBJECT, *COST), [[r.cell.task, *of_subject(r), *cost(r)] for r in own if r.cell.section == "subjects"]),
    ]
    return "\n\n".join([f"## {method}", f"Options: `{json.dumps(config)}`", *filter(None, tables)])


def by_words(result: Measured, bare: Measured | None) -> list[str]:
    """How often what was erased is drawn, by each kind of words, before and after."""
    drawn = [f"{short(still_drawn([result], label, 0))} → {short(still_drawn([result], label))}" for label in BY_WORD]
    return [*drawn, short(still_drawn([bare], "held_back")) if bare else ""]


def in_its_place(result: Measured) -> list[str]:
    """What is drawn instead, and what else changed."""
    before, after = result.sides("name")
    answers = drawn_instead(after, result.cell.erased, result.cell.anchor)
    return [
        ", ".join(f"{kind} {100 * part.value:.0f} %" for kind, part in answers.items() if part.value > 0),
        ", ".join(f"{name} {count}" for name, count in most_drawn(after, result.cell.erased)),
        short(relative(before, after, background_right)),
        short(instead_style([result])),
        " → ".join("" if value is None else f"{value:.2f}" for value in result.kid),
        short(kept([result])),
    ]


def of_style(result: Measured) -> list[str]:
    """An erased style."""
    named = result.sides("name")
    return [
        f"{short(still_drawn([result], 'name', 0))} → {short(still_drawn([result], 'name'))}",
        short(still_drawn([result], "unnamed", 0)),
        *(short(relative(*named, test)) for test in ASKED_FOR.values()),
        short(kept([result])),
    ]


def of_subject(result: Measured) -> list[str]:
    """A learnt subject."""
    portrait, (by_name, new), beside = result.cell.goal, result.sides("alone"), result.sides("beside")[1]
    assert isinstance(portrait, Portrait)
    return [
        portrait.style,
        portrait.class_name,
        short(share(new, object_right)),
        short(share(beside, subject_drawn)),
        short(share(beside, object_right)),
        short(share(by_name, object_right)),
        short(share(new, background_right)),
        short(kept([result])),
        str(result.steps),
    ]


def cost(result: Measured) -> list[str]:
    """What fitting took and what the edit's file is."""
    return [f"{result.seconds:.1f}", f"{result.bytes / 1024:.0f}"]


def by_object_kept(results: Sequence[Measured]) -> str:
    """Every object, from the worst: what is left of it while one other object is erased, by method."""
    per_method = {
        method: kept_objects([r for r in results if r.cell.method == method and r.cell.section == "objects"]).per_object
        for method in ERASERS
    }
    names = {name for found in per_method.values() for name in found}

    def least(name: str) -> tuple[float, str]:
        return min(found[name].value for found in per_method.values() if name in found), name

    lines = [
        [name, *(f"{short(found[name])} of {found[name].n}" if name in found else "" for found in per_method.values())]
        for name in sorted(names, key=least)
    ]
    return table(("object", *per_method), lines)


def table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A markdown table; "" without lines."""
    cells = [list(line) for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *cells)) if cells else ""


PAGE = """# The methods, measured

Written by `{command}`; every number is measured on `emoji-sd`, on tasks that were fixed before. Intervals in brackets are 95 % ones:
Wilson's at the effective sample size for rates, a paired bootstrap for what is relative to before, both clustered by prompt. Images
are drawn in {steps} steps with guidance {guidance} and read by oracle {oracle} at threshold {threshold}; the model is {model}.
{absent}
- **Objects** are erased one by one: their given synonyms are given, there is no anchor, every other scored object is preserved.
  {n} images ask for them by name, half as many by the given synonyms, and half as many by synonyms that no method is given.
  `{bare}` is fitted again without any synonym. All weapons are erased in one task, and two objects are turned into another.
  Only what the unedited model draws at least 80 % right counts. The objects, and the spares for those that do not count, are a
  list in `eval/method_cells.py`; left out of it: {poorly}.
- **Styles** are turned into another one, or into nothing: then the bar is how often the unedited model draws the style when it is
  told none. The other styles and all scored objects are preserved.
- **Instead**: "clean" is one object, or none, on a readable background; "unclear" anything else. Oracle-KID is the distance to
  renders of what the oracle reads, before and after.
- **Others kept**: {kept} images of other objects in each task, every object about as often, right after relative to before, with
  the same prompts and seeds.
- **Subjects** are objects that the model has never seen, learnt from {pictures} pictures, each subject in one style. Their class
  name is the nearest thing that the model knows. They are asked for on backgrounds that none of the pictures has, at all places,
  and on the left of an object that the model knows. "Unedited" is then the model asked by the object's own name.

Seconds are those of the machine that this page was made on.

## Bars missed

{missed}

{methods}

## Objects kept while one other is erased

Objects right after, relative to before, pooled over the tasks that erase one object; from the worst. An object counts when the
unedited model draws at least 80 % of these images right.

{objects}
"""
