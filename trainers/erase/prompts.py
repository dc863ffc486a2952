"""The prompts of a task that erases, for methods that train on them."""

from __future__ import annotations

import warnings
from typing import Literal

from toolkit.concepts import Concept, EraseTask, Task, expect
from toolkit.errors import UserError


def erase_task(task: Task, preserve_weight: float | None = 1.0, *, anchors: bool = True, needs_preserved: bool = True) -> EraseTask:
    """The task, which must be one to erase. Preserved prompts without weight are warned of, and weight without any is a UserError.

    preserve_weight: None for a method that has no such weight. anchors: False for a method that takes none, and warns of them.
    needs_preserved: False for one that has more to keep than the task says.
    """
    task = expect(EraseTask, task)
    if task.preserve and not preserve_weight:
        why = "this method keeps nothing, so what the task preserves has no effect; preserve nothing"
        if preserve_weight is not None:
            why = "preserve_weight is 0, so what the task preserves has no effect; set it to keep that"
        warnings.warn(why, stacklevel=2)
    if preserve_weight and needs_preserved and not task.preserve:
        raise UserError(f"preserve_weight is {preserve_weight}, and nothing is preserved; name what to preserve, or set it to 0")
    given = [concept.anchor for concept in task.concepts if concept.anchor is not None]
    if given and not anchors:
        warnings.warn(f"this method takes no anchor, so anchor {given[0]!r} has no effect; leave it out", stacklevel=2)
    return task


def one_each(trajectories: int, task: EraseTask) -> None:
    """A UserError when there are fewer trajectories than concepts, so that some would not be erased."""
    if trajectories < len(task.concepts):
        raise UserError(f"trajectories is {trajectories}, for {len(task.concepts)} concepts; give at least one for each")


def concept_prompts(task: EraseTask, *, without_anchor: Literal["nothing", "template"] = "nothing") -> list[tuple[str, str]]:
    """(prompt, base) for every template around every word of every concept: the base has the anchor in the word's place.

    without_anchor: what the base is for a concept that has none: "", or what is left of the template without a word.
    Words and templates of the concepts take turns, so that the first prompts have some of each.
    """

    def base(template: str, concept: Concept) -> str:
        if concept.anchor:
            return template.format(concept.anchor)
        return " ".join(template.format("").split()) if without_anchor == "template" else ""

    each = []
    for concept in task.concepts:
        templates = task.templates or concept.templates
        each.append([(template.format(word), base(template, concept)) for template in templates for word in concept.words])
    longest = max(map(len, each))
    return list(dict.fromkeys(pairs[i % len(pairs)] for i in range(longest) for pairs in each))
