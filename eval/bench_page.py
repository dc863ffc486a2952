"""The report of an experiment: methods compared section by section, against their bars, and task by task."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from eval.bench_attacks import FALLS, PROOF, Attacked, compared, proof
from eval.bench_bars import Row, rows
from eval.bench_learnt import COLUMNS, QUESTIONS, WORDS_ALONE, differences, learnt, lesson
from eval.bench_results import (
    ASKED_FOR,
    BY_WORD,
    ENOUGH,
    Measured,
    answers,
    by_section,
    drawn_most,
    instead_style,
    kept,
    kept_objects,
    other_drawn,
    pooled,
    short,
    still_drawn,
)
from eval.cells import Cell
from eval.experiment import Experiment, Section
from eval.intervals import mean
from eval.rates import DRAWN_WELL, background_right, drawn_instead, drawn_well, most_drawn, object_right, relative, share, style_right
from eval.subjects import PICTURES
from toolkit.options import shortened

BARS = ("what", "bar", "unedited", "measured", "n")
ERASED = ("by name", "given synonyms", "held-back synonyms")
COMPARED = {
    "objects": (
        *ERASED,
        "the worst by name",
        "beside another",
        "the other",
        "clean instead",
        "others kept",
        "styles",
        "backgrounds",
        "drift",
    ),
    "styles": ("drawn by name", "unedited, no style named", "object right", "background right", "others kept"),
    **COLUMNS,
}
INSTEAD = ("shows", "most often", "background", "style", "oracle-KID", "others kept")
COST = ("fit, s", "memory, MiB", "edit, KiB")


@dataclass(frozen=True)
class Report:
    """What the page is made from.

    cells: all that there should be. results: those that were measured. command: what made it. attacks: those that were tried.
    """

    experiment: Experiment
    cells: Sequence[Cell]
    results: Sequence[Measured]
    command: str
    model: str
    measured_by: Mapping[str, Any]
    attacks: Sequence[Attacked] = ()

    def missed(self) -> list[str]:
        """The lines that miss their bars, of all methods."""
        lines = [(method, row) for method in self.experiment.methods for row in self.rows(method)]
        return [f"{method}, {row.what}: {short(row.estimate, 1)}" for method, row in lines if row.missed]

    def rows(self, method: str) -> list[Row]:
        """A method's lines."""
        return rows(self.results, method, self.experiment.sections, self.experiment.header)

    def page(self) -> str:
        """The markdown page."""
        header, by = self.experiment.header, self.measured_by
        measured = [result.cell for result in self.results]
        absent = len(self.cells) - len(measured)
        kinds = {cell.kind for cell in self.cells} | ({"attacks"} if self.attacks else set())
        return PAGE.format(
            title=header.title,
            command=self.command,
            about=f"\n{header.about.strip()}\n" if header.about else "",
            model=self.model,
            **{key: by[key] for key in ("version", "threshold", "steps", "guidance")},
            notes="\n".join(NOTES[kind] for kind in NOTES if kind in kinds).format(n=header.n, falls=round(100 * FALLS)),
            poorly=", ".join(f"{name} ({100 * value:.0f} %)" for name, value in poorly(self.results).items()) or "nothing",
            absent=f"\n{absent} of {len(self.cells)} tasks are not measured here: `--only` was given, or the run was interrupted.\n"
            if absent
            else "",
            missed="\n".join(f"- {line}" for line in self.missed()) or "None.",
            sections="\n\n".join(self.section(one) for one in self.experiment.sections if one.title in {of.section for of in measured}),
            methods="\n\n".join(self.method(label) for label in self.experiment.methods if label in {of.method for of in measured}),
        )

    # --- side by side -------------------------------------------------------------------------------------------------
    def section(self, section: Section) -> str:
        """The methods side by side on a section, over all its tasks that count."""
        name, kind, found = section.title, section.kind, by_section(self.results).get(section.title, {})
        per_method = {label: found[label] for label in self.experiment.methods if label in found}
        if not per_method:
            return f"### {name}\n\nNothing that counts."
        lines = [[label, *COMPARE[kind](own), *mean_cost(own)] for label, own in per_method.items()]
        parts = [f"### {name}", *described(section), table(("method", *COMPARED[kind], *COST), lines)]
        if least := by_object_kept(per_method) if kind == "objects" else "":
            parts += ["Kept least, pooled over the tasks:", least]
        if reference := per_method.pop(section.against, None):
            columns = ("method", *(one.column for one in QUESTIONS[kind]), "edit, of its size")
            lines = [[label, *differences(own, reference)] for label, own in per_method.items()]
            parts += [f"Less what {section.against} reaches with the same prompts and seeds:", table(columns, lines)]
        if tried := self.attacks_in(section):
            parts += ["Attacked:", table(*compared(tried)), table(PROOF, proof(tried))]
        return "\n\n".join(filter(None, parts))

    def attacks_in(self, section: Section) -> list[Attacked]:
        """The attacks on what a section erases."""
        return [item for item in self.attacks if item.cell.section == section.title]

    # --- one by one ---------------------------------------------------------------------------------------------------
    def method(self, label: str) -> str:
        """A method's tables: against the bars, then one line for each task."""
        own = [result for result in self.results if result.cell.method == label]
        of = {kind: [result for result in own if result.cell.kind == kind] for kind in COMPARED}
        tables = [
            table(BARS, [row.cells() for row in self.rows(label)]),
            table(("task", *ERASED), [[r.cell.task, *by_words(r)] for r in of["objects"]]),
            table(("task", *INSTEAD, *COST), [[r.cell.task, *in_its_place(r), *cost(r)] for r in of["objects"] if "name" in r.images]),
            table(("style", *COMPARED["styles"], *COST), [[r.cell.task, *styles([r]), *cost(r)] for r in of["styles"]]),
            *(
                table(
                    ("task", "style", "class names", *columns, "steps", *COST),
                    [[r.cell.task, *portrait(r), *learnt([r]), str(r.steps), *cost(r)] for r in of[kind]],
                )
                for kind, columns in COLUMNS.items()
            ),
        ]
        beside = self.experiment.given[label]
        given = {key: beside.config()[key] for key in beside.changed()}
        options = {key: shortened(value) for key, value in self.experiment.methods[label].config().items()}
        config = json.dumps(options | ({"given": given} if given else {}))
        return "\n\n".join([f"### {label}", f"`{self.experiment.methods[label].name()}` with `{config}`", *filter(None, tables)])


def described(section: Section) -> list[str]:
    """What the methods are told in a section that is not said for all."""
    said = []
    if section.pairs:
        said.append(f"{section.pictures} picture{'s' if section.pictures > 1 else ''} of each pair.")
    if section.templates:
        said.append(f"The methods put every object, erased and preserved, into {section.templates} contexts.")
    if section.nothing:
        said.append(f"Their option nothing is {section.nothing}.")
    if section.preserve_times != 1:
        said.append(f"Their options that end in preserve_scale are {section.preserve_times:g} times those given below.")
    return [" ".join(said)] if said else []


def objects(found: Sequence[Measured]) -> list[str]:
    """Erased objects."""
    beside = pooled(found, "beside")
    return [
        *(short(still_drawn(found, label), 1) for label in BY_WORD),
        f"{(most := drawn_most(found))[0]} {short(most[2])}".strip(),
        short(still_drawn(found, "beside"), 1),
        short(relative(*beside, other_drawn)),
        short(answers(found, "none", "other", "anchor")),
        *(short(kept(found, test), 1) for test in (object_right, style_right, background_right)),
        short(mean([value for result in found for value in result.drift]), 1),
    ]


def styles(found: Sequence[Measured]) -> list[str]:
    """Erased styles."""
    return [
        f"{short(still_drawn(found, 'name', 0))} → {short(still_drawn(found, 'name'))}",
        short(still_drawn(found, "unnamed", 0)),
        *(short(relative(*pooled(found, "name"), test)) for test in ASKED_FOR.values()),
        short(kept(found)),
    ]


COMPARE = {"objects": objects, "styles": styles, **dict.fromkeys(COLUMNS, learnt)}


def by_words(result: Measured) -> list[str]:
    """How often what was erased is drawn, by each kind of words, before and after."""
    return [f"{short(still_drawn([result], label, 0))} → {short(still_drawn([result], label))}".strip(" →") for label in BY_WORD]


def in_its_place(result: Measured) -> list[str]:
    """What is drawn instead, and what else changed."""
    before, after = result.sides("name")
    found = drawn_instead(after, result.cell.erased, result.cell.anchor)
    return [
        ", ".join(f"{kind} {100 * part.value:.0f} %" for kind, part in found.items() if part.value > 0),
        ", ".join(f"{name} {count}" for name, count in most_drawn(after, result.cell.erased)),
        short(relative(before, after, background_right)),
        short(instead_style([result])),
        " → ".join("" if value is None else f"{value:.2f}" for value in result.kid),
        short(kept([result])),
    ]


def portrait(result: Measured) -> list[str]:
    """The style of the pictures, and the subjects' class names."""
    return [lesson(result.cell).pictures[0].style, ", ".join(one.class_name for one in lesson(result.cell).subjects)]


def cost(result: Measured) -> list[str]:
    """What fitting took and what the edit's file is."""
    return mean_cost([result])


def mean_cost(found: Sequence[Measured]) -> list[str]:
    """The same, on average over tasks."""
    seconds, memory, size = (fmean(getattr(r.costs, name) for r in found) for name in ("seconds", "memory", "bytes"))
    devices = sorted({r.costs.device for r in found})
    where = "" if devices == ["CPU"] else f" ({', '.join(devices)})"
    return [f"{seconds:.1f}{where}", f"{memory:.0f}", f"{size / 1024:.0f}"]


def by_object_kept(per_method: Mapping[str, Sequence[Measured]], most: int = 8) -> str:
    """The objects of which least is left, from the worst: after relative to before, by method.

    "" when none lost anything, or when there are too few images of each to tell.
    """
    kept_by = {label: kept_objects(found).per_object for label, found in per_method.items()}
    kept_by = {label: {name: part for name, part in found.items() if part.n >= ENOUGH} for label, found in kept_by.items()}

    def least(name: str) -> tuple[float, str]:
        return min(found[name].value for found in kept_by.values() if name in found), name

    names = sorted({name for found in kept_by.values() for name in found}, key=least)
    names = [name for name in names if least(name)[0] < 1][:most]
    lines = [[name, *(f"{short(found[name])} of {found[name].n}" if name in found else "" for found in kept_by.values())] for name in names]
    return table(("object", *kept_by), lines)


def poorly(results: Sequence[Measured]) -> dict[str, float]:
    """What the unedited model draws too seldom for it to count, with how often it does."""
    found: dict[str, float] = {}
    for result in results:
        before = [first for first, _ in result.images.get("name", ())]
        if result.cell.kind == "styles":
            found[result.cell.erased[0]] = share(before, result.drawn).value
        else:
            for name in set(result.cell.erased) - drawn_well(before) if before else ():
                found[name] = share([item for item in before if item.prompt.names[0] == name], object_right).value
    return {name: value for name, value in found.items() if value < DRAWN_WELL}


def table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A markdown table without its empty columns; "" without lines."""
    cells = [list(line) for line in lines]
    filled = [i for i in range(len(columns)) if any(line[i] for line in cells)]
    drawn = (columns, ["---"] * len(columns), *cells)
    return "\n".join(f"| {' | '.join(line[i] for i in filled)} |" for line in drawn) if cells else ""


NOTES = {
    "objects": """\
- **Objects** are erased one by one or together; every other scored object is preserved. The methods are given the synonyms that they
  may be given, unless it says "without synonyms". {n} images (where a section says nothing else) ask for each object by its name,
  half as many by these synonyms, half as many by synonyms that no method is given, and where it is measured half as many for it on
  the left of another object, which should stay.
- **Clean instead** is one object, or none, on a readable background. Oracle-KID is the distance to renders of what the oracle
  reads, before and after.""",
    "styles": """\
- **Styles** are turned into another one, or into nothing: then the bar is how often the unedited model draws the style when it is
  told none. The other styles and all scored objects are preserved.""",
    "attacks": """\
- **Attacked**: how often what was erased is drawn under each attack, over all tasks; clean is by its name, without one. White-box attacks
  compute with the weights, fine-tuning ones train them, text-only ones write prompts, image-guided ones start from pictures. A method
  falls to an attack that brings back what it erased in {falls} % of the images or more. What an attack shows of an object that no model
  knew, its control, it has not brought back but taught; the control of words that are found are random ones of the same length.""",
    "subjects": f"""\
- **Subjects** are objects that the model has never seen, learnt from {len(PICTURES)} pictures, each subject in one style. Their class name
  is the nearest thing that the model knows. They are asked for on backgrounds that none of the pictures has, at all places, and on
  the left of an object that the model knows. "Unedited" is then the model asked by the object's own name. Words alone have no bar:
  what `{WORDS_ALONE[0]}` reaches is their ceiling.""",
    "pairs": f"""\
- **Pairs** are two subjects that are learnt together from pictures that show both side by side, in one style. Each is asked for alone,
  where the other should not appear, and both in one prompt, on new backgrounds. Words alone ({", ".join(WORDS_ALONE)}) are to reach
  the same parts of what `{WORDS_ALONE[0]}` draws of one subject in new contexts.""",
    "entangled": f"""\
- **Entangled**: {len(PICTURES)} pictures of a subject on one background, which their captions do not say. It is asked for on others.""",
}

PAGE = """# {title}

Written by `{command}`; every number is measured on `emoji-sd`, on tasks that were fixed before. Intervals in brackets are 95 % ones:
Wilson's at the effective sample size for rates, a paired bootstrap for what is relative to before, both clustered by prompt. Images
are drawn in {steps} steps with guidance {guidance} and read by oracle {version} at threshold {threshold}; the model is {model}.
{about}{absent}
{notes}
- **Others kept**: images of everything else, every object about as often, right after relative to before, with the same prompts and
  seeds; their styles and backgrounds likewise. **Drift** is how far these images have moved: the root mean square of their pixels'
  differences to the unedited model's, in percent of the range.
- Only what the unedited model draws at least 80 % right counts. Left out: {poorly}.

Seconds are those of the machine that fitted it, a CPU unless a GPU is named beside them; several fits ran at a time. Memory is the
largest of the whole process, model included, or of the GPU.

## Bars missed

{missed}

## Side by side

{sections}

## One by one

{methods}
"""
