"""What is asked about subjects that were learnt: rates with their bars, and methods compared image by image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eval.bench_results import Measured, judged, kept, short
from eval.cells import Cell
from eval.intervals import Estimate, mean
from eval.rates import Shown, background_right, object_right
from eval.subjects import Lesson


@dataclass(frozen=True)
class Question:
    """A share of a label's images. what: in a row. column: in a table that compares methods. test: which images count."""

    what: str
    column: str
    label: str
    test: Callable[[Measured, Shown], bool]
    bar: float | None = None
    below: bool = False

    def share(self, found: Sequence[Measured], side: int = 1) -> Estimate:
        """Its estimate over cells, before (side 0) or after."""
        return judged(found, self.label, self.test, side)


def lesson(cell: Cell) -> Lesson:
    """What a cell teaches."""
    assert isinstance(cell.goal, Lesson)
    return cell.goal


def right(result: Measured, shown: Shown) -> bool:
    """Every object asked for is drawn."""
    return object_right(shown)


def first(result: Measured, shown: Shown) -> bool:
    """The first object asked for is drawn."""
    return shown.prompt.names[0] in shown.drawn


def other(result: Measured, shown: Shown) -> bool:
    """The subject of a pair that was not asked for is drawn."""
    return not shown.drawn.isdisjoint(set(lesson(result.cell).names) - set(shown.prompt.names))


def only(result: Measured, shown: Shown) -> bool:
    """Of a pair the subject asked for is drawn, and the other one is not."""
    return object_right(shown) and not other(result, shown)


def background(result: Measured, shown: Shown) -> bool:
    """The background is the one asked for."""
    return background_right(shown)


def pictured(result: Measured, shown: Shown) -> bool:
    """The background is the one of all the subject's pictures, which no prompt asks for."""
    return shown.reading.background == lesson(result.cell).pictures[0].background


QUESTIONS = {
    "subjects": (
        Question("drawn in new contexts", "new contexts", "alone", right, 0.80),
        Question("drawn beside another object", "beside another", "beside", first, 0.60),
        Question("both drawn", "both drawn", "beside", right),
        Question("background right in new contexts", "background", "alone", background),
    ),
    "pairs": (
        Question("each alone, and not the other", "alone, not the other", "alone", only, 0.70),
        Question("both in one prompt", "together", "together", right, 0.50),
        Question("asked for alone, the other is drawn", "the other", "alone", other, below=True),
        Question("background right alone", "background", "alone", background),
    ),
    "entangled": (
        Question("drawn on other backgrounds", "drawn", "alone", right, 0.60),
        Question("the pictures' background drawn", "the pictures' background", "alone", pictured, below=True),
        Question("background right", "background", "alone", background),
    ),
}
WORDS_ALONE = ("textual_inversion", "mcpl", "concept_express")  # methods that learn words and change no layer
COLUMNS = {kind: (*(one.column for one in asked), "unedited, by name", "others kept") for kind, asked in QUESTIONS.items()}


def ceiling(results: Sequence[Measured]) -> float | None:
    """The share of images that show one subject in new contexts, of words that `textual_inversion` learnt; None where not measured."""
    found = [one for one in results if one.cell.fitted.name() == WORDS_ALONE[0] and one.cell.kind == "subjects" and "alone" in one.images]
    return QUESTIONS["subjects"][0].share(found).value if found else None


def bar_of(question: Question, cell: Cell, ceiling: float | None) -> float | None:
    """A question's bar. What words alone draw has none, but of pairs the same part of their ceiling."""
    if question.bar is None or cell.fitted.name() not in WORDS_ALONE:
        return question.bar
    return question.bar * ceiling if cell.kind == "pairs" and ceiling is not None else None


def learnt(found: Sequence[Measured]) -> list[str]:
    """`COLUMNS`, over cells of one kind."""
    asked = QUESTIONS[found[0].cell.kind]
    return [*(short(one.share(found)) for one in asked), short(asked[0].share(found, side=0)), short(kept(found))]


# --- against another method -------------------------------------------------------------------------------------------
def differences(found: Sequence[Measured], reference: Sequence[Measured]) -> list[str]:
    """For every question by how much a method's share is above another's, on the same tasks and seeds; and its edits' size in parts."""
    asked = QUESTIONS[found[0].cell.kind]
    return [*(short(difference(one, found, reference)) for one in asked), short(size(found, reference))]


def difference(question: Question, found: Sequence[Measured], reference: Sequence[Measured]) -> Estimate:
    """The difference of two methods' shares, with a paired bootstrap over the prompts of each task."""
    values, clusters = [], []
    for own, others in both(found, reference):
        for a, b in zip(own.sides(question.label)[1], others.sides(question.label)[1], strict=True):
            values.append(float(question.test(own, a)) - float(question.test(others, b)))
            clusters.append((own.cell.task, b.prompt.text))
    return mean(values, clusters)


def size(found: Sequence[Measured], reference: Sequence[Measured]) -> Estimate:
    """How large a method's edits are in parts of another's, mean over tasks."""
    return mean([own.costs.bytes / others.costs.bytes for own, others in both(found, reference)])


def both(found: Sequence[Measured], reference: Sequence[Measured]) -> list[tuple[Measured, Measured]]:
    """The results of the tasks that both have."""
    by_task = {result.cell.task: result for result in reference}
    return [(result, by_task[result.cell.task]) for result in found if result.cell.task in by_task]
