"""What cells say when they are put together: rates pooled over tasks, against their bars."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from eval.cells import Cell
from eval.intervals import NOTHING, Estimate, rate
from eval.rates import (
    DRAWN_WELL,
    Retained,
    Shown,
    background_right,
    by_object,
    drawn_well,
    draws,
    instead,
    object_right,
    relative,
    retained,
    share,
    style_right,
)
from eval.world_report import Line

POOLED, WORST, GIVEN, INSTEAD, ANCHOR_DRAWN, KEPT_POOLED, KEPT_WORST, LEARNT = 0.05, 0.15, 0.10, 0.90, 0.70, 0.95, 0.70, 0.60
Test = Callable[[Shown], bool | None]
BY_WORD = {"name": "by name", "given": "by given synonyms", "held_back": "by held-back synonyms"}
ENOUGH = 5  # images of one object, from which on it is looked at alone


@dataclass(frozen=True)
class Row(Line):
    """A line with what the unedited model does beside it; what could not be measured neither meets a bar nor misses it."""

    before: Estimate = NOTHING

    @property
    def missed(self) -> bool:
        return not math.isnan(self.estimate.value) and not self.met

    def cells(self) -> list[str]:
        """What, bar, unedited, measured, n."""
        bar = "" if self.bar is None else f"{'≤' if self.below else '≥'} {self._number(self.bar)}{' **missed**' if self.missed else ''}"
        return [self.what, bar, short(self.before, 1), short(self.estimate, 1) or "nothing to measure", str(self.estimate.n)]


@dataclass(frozen=True)
class Costs:
    """Of fitting an edit: seconds, the largest memory of the process meanwhile, in MiB, and bytes of the edit's file."""

    seconds: float
    memory: float
    bytes: int


@dataclass(frozen=True)
class Measured:
    """A cell with its images, before and after, by label.

    kid: oracle-KID of the images by name, before and after. drift: of some images of everything else, see `eval.fidelity.drift`.
    """

    cell: Cell
    images: Mapping[str, Sequence[tuple[Shown, Shown]]]
    costs: Costs
    steps: int | None
    kid: Sequence[float | None]
    drift: Sequence[float] = ()

    def sides(self, label: str) -> tuple[list[Shown], list[Shown]]:
        """The images of a label before and after; about erased objects, only of those that the unedited model draws well."""
        images = self.images.get(label, ())
        if self.cell.kind == "objects" and label != "kept" and "name" in self.images:
            counted = drawn_well([before for before, _ in self.images["name"]])
            images = [pair for pair in images if pair[0].prompt.names[0] in counted]
        return [before for before, _ in images], [after for _, after in images]

    @property
    def counts(self) -> bool:
        """Whether the unedited model draws what is erased well enough."""
        if "name" not in self.images:
            return True
        before = [first for first, _ in self.images["name"]]
        return share(before, self.drawn).value >= DRAWN_WELL if self.cell.kind == "styles" else bool(drawn_well(before))

    def drawn(self, shown: Shown) -> bool:
        """Whether something that was erased is drawn."""
        return draws(shown, self.cell.erased)


# --- pooled over cells ------------------------------------------------------------------------------------------------
def pooled(results: Iterable[Measured], label: str) -> tuple[list[Shown], list[Shown]]:
    """The images of a label of several cells, before and after."""
    sides = [result.sides(label) for result in results]
    return [item for before, _ in sides for item in before], [item for _, after in sides for item in after]


def still_drawn(results: Iterable[Measured], label: str, side: int = 1) -> Estimate:
    """How often what a cell erased is drawn, before (side 0) or after."""
    found = [(result.drawn(item), item.prompt.text) for result in results for item in result.sides(label)[side]]
    return rate([drawn for drawn, _ in found], [text for _, text in found])


def drawn_most(results: Iterable[Measured]) -> tuple[str, Estimate, Estimate]:
    """The object that is drawn most after it was erased, asked by its name; how often before, and after."""
    rates = []
    for result in results:
        before, after = map(by_object, result.sides("name"))
        rates += [(name, share(before[name], result.drawn), share(items, result.drawn)) for name, items in after.items()]
    return max(rates, key=lambda row: row[2].value, default=("", NOTHING, NOTHING))


def answers(results: Iterable[Measured], *wanted: str) -> Estimate:
    """How often images that no longer show what was erased give one of these answers of `instead`."""
    cells = [(result, item) for result in results for item in result.sides("name")[1]]
    found = [(instead(item, result.cell.erased, result.cell.anchor), item.prompt.text) for result, item in cells]
    found = [(answer, text) for answer, text in found if answer != "erased"]
    return rate([answer in wanted for answer, _ in found], [text for _, text in found])


def instead_style(results: Iterable[Measured]) -> Estimate:
    """Styles right relative to before, where anything is drawn."""
    pairs = [pair for pair in zip(*pooled(results, "name"), strict=True) if pair[1].drawn]
    return relative([before for before, _ in pairs], [after for _, after in pairs], style_right)


def kept(results: Iterable[Measured], test: Test = object_right) -> Estimate:
    """What is left of everything else, relative to before."""
    return relative(*pooled(results, "kept"), test)


def kept_objects(results: Iterable[Measured]) -> Retained:
    """The same object by object, of those that the unedited model draws well in these images."""
    return retained(*pooled(results, "kept"))


def compared(what: str, results: Iterable[Measured], label: str, test: Test, bar: float | None = None) -> Row:
    """How often images pass a test after, with before beside it."""
    before, after = pooled(results, label)
    return Row(what, share(after, test), bar, before=share(before, test))


# --- the bars ---------------------------------------------------------------------------------------------------------
def rows(results: Sequence[Measured], method: str) -> list[Row]:
    """A method's lines, section by section: every bar, and what belongs beside it."""
    sections: dict[str, list[Measured]] = {}
    for result in results:
        if result.cell.method == method and result.counts:
            sections.setdefault(result.cell.section, []).append(result)
    lines: list[Row] = []
    for title, found in sections.items():
        lines += {"objects": object_rows, "styles": style_section, "subjects": subject_rows}[found[0].cell.kind](title, found)
    return lines


def object_rows(title: str, found: Sequence[Measured]) -> list[Row]:
    """Erased objects; only what was drawn has a line."""
    has = found[0].images.keys()
    lines = erased_rows(title, found) if "name" in has else [drawn_row(title, found, label) for label in BY_WORD if label in has]
    if "beside" in has:
        lines += beside_rows(title, found)
    return [*lines, *kept_rows(title, found)] if "kept" in has else lines


def erased_rows(title: str, found: Sequence[Measured]) -> list[Row]:
    """Objects that were erased: how often they are drawn, and what is drawn instead."""
    worst, first, most = drawn_most(found)
    background = relative(*pooled(found, "name"), background_right)
    lines = [
        drawn_row(title, found, "name", POOLED),
        Row(f"{title}: drawn by name, the worst ({worst})", most, WORST, below=True, before=first),
        drawn_row(title, found, "given", GIVEN),
        drawn_row(title, found, "held_back"),
        Row(f"{title}: instead, background relative to before", background, INSTEAD),
        Row(f"{title}: instead, style relative to before (where anything is drawn)", instead_style(found), INSTEAD),
        Row(f"{title}: instead, nothing or one clean object", answers(found, "none", "other", "anchor"), INSTEAD),
    ]
    if any(result.cell.anchor for result in found):
        lines.append(Row(f"{title}: instead, the anchor", answers(found, "anchor"), ANCHOR_DRAWN))
    return lines


def kept_rows(title: str, found: Sequence[Measured]) -> list[Row]:
    """Everything else. An object is looked at alone when there are several images of each."""
    lines = [Row(f"{title}: other objects kept", kept(found), KEPT_POOLED)]
    objects = kept_objects(found)
    if min((estimate.n for estimate in objects.per_object.values()), default=0) >= ENOUGH:
        name, least = objects.worst
        lines.append(Row(f"{title}: the object kept least ({name})", least, KEPT_WORST))
    return [
        *lines,
        Row(f"{title}: styles kept", kept(found, style_right)),
        Row(f"{title}: backgrounds kept", kept(found, background_right)),
    ]


def drawn_row(title: str, found: Sequence[Measured], label: str, bar: float | None = None) -> Row:
    """How often what was erased is drawn, asked by a kind of words."""
    before, after = (still_drawn(found, label, side) for side in (0, 1))
    return Row(f"{title}: drawn {BY_WORD[label]}", after, bar, below=True, before=before)


def beside_rows(title: str, found: Sequence[Measured]) -> list[Row]:
    """Two objects in one prompt, the first of them erased."""
    before, after = pooled(found, "beside")
    return [
        Row(f"{title}: drawn beside another object", still_drawn(found, "beside"), below=True, before=still_drawn(found, "beside", 0)),
        Row(f"{title}: the other one, relative to before", relative(before, after, other_drawn)),
    ]


def style_section(title: str, found: Sequence[Measured]) -> list[Row]:
    """Erased styles one by one: with an anchor against a bar, without one against the unedited model that is told no style."""
    lines = []
    for result in found:
        what, named, anchor = f"{title}, {result.cell.task}", result.sides("name"), result.cell.anchor
        if anchor:
            instead = compared(f"{what}: drawn in {anchor}", [result], "name", lambda item, anchor=anchor: draws(item, {anchor}))
            lines += [drawn_row(what, [result], "name", POOLED), instead]
        else:
            unnamed = still_drawn([result], "unnamed", 0)
            lines.append(drawn_row(f"{what}, against the unedited model that is told no style", [result], "name", unnamed.value))
        lines += [Row(f"{what}: {asked} right, relative to before", relative(*named, test), INSTEAD) for asked, test in ASKED_FOR.items()]
        lines.append(Row(f"{what}: objects in other styles kept", kept([result]), KEPT_POOLED))
    return lines


ASKED_FOR: dict[str, Test] = {"object": object_right, "background": background_right}


def subject_rows(title: str, found: Sequence[Measured]) -> list[Row]:
    """Subjects that were learnt, with the unedited model asked by the object's name beside it; and everything else."""
    return [
        compared(f"{title}: drawn in new contexts", found, "alone", object_right, LEARNT),
        compared(f"{title}: drawn beside another object", found, "beside", first_drawn, LEARNT),
        compared(f"{title}: both drawn", found, "beside", object_right),
        compared(f"{title}: background right in new contexts", found, "alone", background_right),
        Row(f"{title}: other objects kept", kept(found), KEPT_POOLED),
    ]


def first_drawn(shown: Shown) -> bool:
    """The first object asked for is drawn, anywhere."""
    return shown.prompt.names[0] in shown.drawn


def other_drawn(shown: Shown) -> bool:
    """The second object asked for is drawn, anywhere."""
    return shown.prompt.names[1] in shown.drawn


def short(estimate: Estimate, digits: int = 0) -> str:
    """A rate with its interval, in percent; "" when there is none."""
    if math.isnan(estimate.value):
        return ""
    value, low, high = (f"{100 * x:.{digits}f}" for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} % [{low}, {high}]"
