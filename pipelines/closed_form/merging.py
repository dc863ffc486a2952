"""Edits to merge in closed form: what they change, and on which token rows each should keep its say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

from toolkit.concepts import Concept, MergeTask, Task, expect
from toolkit.edits.base import Edit
from toolkit.errors import UserError

if TYPE_CHECKING:
    from toolkit.model import Model

Kind = TypeVar("Kind", bound=Edit)


def to_merge(task: Task) -> Iterator[tuple[Edit, Concept]]:
    """Each edit of a merge task with what it is about."""
    task = expect(MergeTask, task)
    if len(task.edits) < 2:
        raise UserError(f"given {len(task.edits)} edits, merging needs two or more; give another")
    return zip(task.edits, task.about, strict=True)


def text_parts(model: Model, edit: Edit, *kinds: type[Kind]) -> list[tuple[Kind, float]]:
    """The parts of an edit, all of these kinds, with their scales.

    A part that changes other weights than those of the layers that read text, or one of another kind, is a UserError: the
    closed form says nothing about it.
    """
    reading = {f"{site}.weight" for site in model.arch.text_linears()}
    found = []
    for part, scale in edit.parts():
        what = f"{edit.info.method or edit.kind()} edit"
        if not isinstance(part, kinds):
            known = " or ".join(kind.kind() for kind in kinds)
            raise UserError(f"{what} has a {part.kind()} part, merging in closed form needs {known}; chain it: compose without --method")
        if others := sorted(set(part.parameter_names()) - reading):
            raise UserError(f"{what} changes {others[0]}, which reads no text; leave it out, or chain it: compose without --method")
        found.append((part, scale))
    return found
