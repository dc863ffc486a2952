"""The lines of a method: what was measured of it, against its bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from eval.bench_learnt import QUESTIONS, bar_of, ceiling, size
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
from eval.experiment import Header, Section
from eval.intervals import NOTHING, Estimate
from eval.rates import background_right, draws, relative, share, style_right
from eval.world_report import Line

GIVEN, INSTEAD, ANCHOR_DRAWN, KEPT_WORST = 0.10, 0.90, 0.70, 0.70
WORST = 3  # times what all may leave together, one may leave


BARS = Header()  # those of an experiment that says none


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


def rows(results: Sequence[Measured], method: str, sections: Sequence[Section] = (), bars: Header = BARS) -> list[Row]:
    """A method's lines, section by section: every bar, and what belongs beside it. sections: those that compare sizes with another's."""
    lines: list[Row] = []
    found = by_section(results)
    for title, by_method in found.items():
        if own := by_method.get(method):
            erased = ROWS.get(own[0].cell.kind)
            lines += erased(title, own, bars) if erased else learnt_rows(title, own, bars, ceiling(results))
    for section in sections:
        by_method, other = found.get(section.title, {}), section.against
        if other != method and {other, method} <= by_method.keys():
            part = size(by_method[method], by_method[other])
            lines.append(Row(f"{section.title}: size of the edit, in parts of {other}'s", part, section.size or None, below=True))
    return lines


def object_rows(title: str, found: Sequence[Measured], bars: Header) -> list[Row]:
    """Erased objects; only what was drawn has a line."""
    has = found[0].images.keys()
    lines = erased_rows(title, found, bars) if "name" in has else [drawn_row(title, found, label) for label in BY_WORD if label in has]
    if "beside" in has:
        lines += beside_rows(title, found)
    return [*lines, *kept_rows(title, found, bars)] if "kept" in has else lines


def erased_rows(title: str, found: Sequence[Measured], bars: Header) -> list[Row]:
    """Objects that were erased: how often they are drawn, and what is drawn instead."""
    worst, first, most = drawn_most(found)
    background = relative(*pooled(found, "name"), background_right)
    lines = [
        drawn_row(title, found, "name", bars.erased_bar),
        Row(f"{title}: drawn by name, the worst ({worst})", most, WORST * bars.erased_bar, below=True, before=first),
        drawn_row(title, found, "given", GIVEN),
        drawn_row(title, found, "held_back"),
        Row(f"{title}: instead, background relative to before", background, INSTEAD),
        Row(f"{title}: instead, style relative to before (where anything is drawn)", instead_style(found), INSTEAD),
        Row(f"{title}: instead, nothing or one clean object", answers(found, "none", "other", "anchor"), INSTEAD),
    ]
    if any(result.cell.anchor for result in found):
        lines.append(Row(f"{title}: instead, the anchor", answers(found, "anchor"), ANCHOR_DRAWN))
    return lines


def kept_rows(title: str, found: Sequence[Measured], bars: Header) -> list[Row]:
    """Everything else. An object is looked at alone when there are several images of each."""
    lines = [Row(f"{title}: other objects kept", kept(found), bars.kept_bar)]
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


def style_section(title: str, found: Sequence[Measured], bars: Header) -> list[Row]:
    """Erased styles one by one: with an anchor against a bar, without one against the unedited model that is told no style."""
    lines = []
    for result in found:
        what, named, anchor = f"{title}, {result.cell.task}", result.sides("name"), result.cell.anchor
        if anchor:
            before, after = (share(side, lambda item, anchor=anchor: draws(item, {anchor})) for side in named)
            lines += [drawn_row(what, [result], "name", bars.erased_bar), Row(f"{what}: drawn in {anchor}", after, before=before)]
        else:
            unnamed = still_drawn([result], "unnamed", 0)
            lines.append(drawn_row(f"{what}, against the unedited model that is told no style", [result], "name", unnamed.value))
        lines += [Row(f"{what}: {asked} right, relative to before", relative(*named, test), INSTEAD) for asked, test in ASKED_FOR.items()]
        lines.append(Row(f"{what}: objects in other styles kept", kept([result]), bars.kept_bar))
    return lines


def learnt_rows(title: str, found: Sequence[Measured], bars: Header, most: float | None) -> list[Row]:
    """Every question that was asked, with the unedited model asked by the objects' names beside it; and everything else.

    most: what words alone draw of one subject.
    """
    has, cell = found[0].images.keys(), found[0].cell
    lines = [
        Row(f"{title}: {one.what}", one.share(found), bar_of(one, cell, most), one.below, before=one.share(found, side=0))
        for one in QUESTIONS[cell.kind]
        if one.label in has
    ]
    return [*lines, Row(f"{title}: other objects kept", kept(found), bars.kept_bar)] if "kept" in has else lines


ROWS = {"objects": object_rows, "styles": style_section}
