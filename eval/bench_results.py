"""What cells say when they are put together: rates pooled over tasks."""

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

Test = Callable[[Shown], bool | None]
BY_WORD = {"name": "by name", "given": "by given synonyms", "held_back": "by held-back synonyms"}
ASKED_FOR: dict[str, Test] = {"object": object_right, "background": background_right}
ENOUGH = 5  # images of one object, from which on it is looked at alone


@dataclass(frozen=True)
class Costs:
    """Of fitting an edit: seconds, the largest memory meanwhile in MiB (of a GPU, else of the process), bytes of the edit's file."""

    seconds: float
    memory: float
    bytes: int
    device: str = "CPU"


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


def by_section(results: Iterable[Measured]) -> dict[str, dict[str, list[Measured]]]:
    """The results that count: section -> method -> its cells."""
    found: dict[str, dict[str, list[Measured]]] = {}
    for result in results:
        if result.counts:
            found.setdefault(result.cell.section, {}).setdefault(result.cell.method, []).append(result)
    return found


# --- pooled over cells ------------------------------------------------------------------------------------------------
def pooled(results: Iterable[Measured], label: str) -> tuple[list[Shown], list[Shown]]:
    """The images of a label of several cells, before and after."""
    sides = [result.sides(label) for result in results]
    return [item for before, _ in sides for item in before], [item for _, after in sides for item in after]


def still_drawn(results: Iterable[Measured], label: str, side: int = 1) -> Estimate:
    """How often what a cell erased is drawn, before (side 0) or after."""
    return judged(results, label, Measured.drawn, side)


def judged(results: Iterable[Measured], label: str, test: Callable[[Measured, Shown], bool], side: int = 1) -> Estimate:
    """How often images pass a test that depends on their cell, before (side 0) or after."""
    found = [(test(result, item), item.prompt.text) for result in results for item in result.sides(label)[side]]
    return rate([passed for passed, _ in found], [text for _, text in found])


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


def other_drawn(shown: Shown) -> bool:
    """The second object asked for is drawn, anywhere."""
    return shown.prompt.names[1] in shown.drawn


def short(estimate: Estimate, digits: int = 0) -> str:
    """A rate with its interval, in percent; "" when there is none."""
    if math.isnan(estimate.value):
        return ""
    value, low, high = (f"{100 * x:.{digits}f}" for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} % [{low}, {high}]"
