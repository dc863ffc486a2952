"""What a user asks for: concepts, and the tasks that methods are fitted to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from toolkit.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from toolkit.edits.base import Edit
    from toolkit.model import Model

OBJECT_TEMPLATES = ("{}", "a {}", "a photo of a {}", "a {} on a plain background", "a picture of a {}")
STYLE_TEMPLATES = ("{}", "{} style", "in {} style", "a picture in {} style", "an object in {} style")


@dataclass(frozen=True)
class Concept:
    """Something a prompt can name.

    name: the words that stand for it in a prompt. synonyms: other words for the same thing, treated as coreferents.
    anchor: the words it should turn into when erased; None means nothing (the empty prompt).
    kind: "object" or "style", which decides the templates it is put into.
    """

    name: str
    synonyms: tuple[str, ...] = ()
    anchor: str | None = None
    kind: Literal["object", "style"] = "object"

    def __post_init__(self) -> None:
        for words in (self.name, *self.synonyms):
            if not words.strip():
                raise UserError(f"empty concept {words!r}; give the words that name it in a prompt")

    @property
    def words(self) -> tuple[str, ...]:
        """The name and every synonym."""
        return (self.name, *self.synonyms)

    @property
    def templates(self) -> tuple[str, ...]:
        """Prompt templates with one `{}` for a concept of this kind."""
        return STYLE_TEMPLATES if self.kind == "style" else OBJECT_TEMPLATES


@dataclass(frozen=True)
class EraseTask:
    """Make a model unable to draw `concepts` while what `preserve` names stays as it is.

    templates: prompt templates with one `{}`; empty means each concept's own.
    """

    concepts: tuple[Concept, ...]
    preserve: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.concepts:
            raise UserError("no concept given; name at least one to erase")
        for template in self.templates:
            if "{}" not in template:
                raise UserError(f"template {template!r} has no place for the concept; write {{}} where its name goes")
        erased = {word.casefold() for concept in self.concepts for word in concept.words}
        for word in self.preserve:
            if word.casefold() in erased:
                raise UserError(f"{word!r} is both erased and preserved; remove it from one of the two")


@dataclass(frozen=True)
class Subject:
    """A personal concept to learn from pictures.

    token: the new word for it in prompts, e.g. "<toy>"; the stem of all words to a method that finds what a picture shows. class_name:
    what it is, e.g. "dog"; "" is not known, which few methods can do with.
    images: picture files. masks: one mask file per picture, white on the subject, or empty.
    captions: one prompt per picture that contains the token, or empty to use templates.
    """

    token: str
    class_name: str
    images: tuple[Path, ...]
    masks: tuple[Path, ...] = ()
    captions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.token.strip() or " " in self.token:
            raise UserError(f"token {self.token!r} is not one word; give a word without spaces such as '<toy>'")
        if not self.images:
            raise UserError(f"no images given for {self.token}; give at least one picture of it")
        for name, given in (("masks", self.masks), ("captions", self.captions)):
            if given and len(given) != len(self.images):
                raise UserError(f"{len(given)} {name} for {len(self.images)} images of {self.token}; give one per image")
        for caption in self.captions:
            if self.token not in caption:
                raise UserError(f"caption {caption!r} does not contain {self.token}; put the token where the subject is named")


def named(subject: Subject) -> str:
    """What stands for a subject where its class is said too: its word and its class name."""
    return f"{subject.token} {subject.class_name}"


@dataclass(frozen=True)
class CustomizeTask:
    """Learn new subjects from pictures."""

    subjects: tuple[Subject, ...]

    def __post_init__(self) -> None:
        if not self.subjects:
            raise UserError("no subject given; give a token, a class name and images")
        tokens = [subject.token for subject in self.subjects]
        if len(set(tokens)) < len(tokens):
            raise UserError(f"the tokens {', '.join(tokens)} are not distinct; give each subject its own")


@dataclass(frozen=True)
class MergeTask:
    """Make one edit out of several.

    edits: what to merge. concepts: what each of them is about, one per edit, or empty: the new words that it brings.
    """

    edits: tuple[Edit, ...]
    concepts: tuple[Concept, ...] = ()

    def __post_init__(self) -> None:
        if self.concepts and len(self.concepts) != len(self.edits):
            raise UserError(f"number of concepts is {len(self.concepts)}, of edits {len(self.edits)}; give one for each edit, or none")

    @property
    def about(self) -> tuple[Concept, ...]:
        """What each edit is about. An edit without new words of its own needs `concepts`; none given is a UserError."""
        if self.concepts:
            return self.concepts
        for edit in self.edits:
            if not edit.info.triggers:
                what = f"{edit.info.method or edit.kind()} edit brings no new words"
                raise UserError(f"{what} that say what it is about; give the concepts (--concept), one for each edit")
        return tuple(Concept(edit.info.triggers[0], edit.info.triggers[1:]) for edit in self.edits)


@dataclass(frozen=True)
class DebiasTask:
    """Make a model draw each of `concepts` with these attributes in wanted parts, e.g. "doctor" with "woman" and "man".

    classify: draws images of a concept with a model, by its words alone, and returns which part of them shows each attribute, in
    the order of `attributes`; given the same model it should draw the same noise. It is a part of the task, and not the `score`
    of `Method.fit`, because one number for a model does not say which attribute is too rare for which concept, and because without
    it there is nothing to do. ratios: the wanted parts, which add up to 1; empty means equal ones. preserve and templates: as in
    `EraseTask`.
    """

    concepts: tuple[Concept, ...]
    attributes: tuple[str, ...]
    classify: Callable[[Model, Concept], Sequence[float]]
    ratios: tuple[float, ...] = ()
    preserve: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.concepts:
            raise UserError("no concept given; name at least one to balance")
        if len(set(self.attributes)) < 2 or len(set(self.attributes)) < len(self.attributes):
            raise UserError(f"attributes are {', '.join(self.attributes) or 'none'}, needs two or more different ones; name them")
        if self.ratios and len(self.ratios) != len(self.attributes):
            raise UserError(f"{len(self.ratios)} ratios for {len(self.attributes)} attributes; give one for each, or none")
        if self.ratios and (min(self.ratios) < 0 or abs(sum(self.ratios) - 1) > 1e-6):
            raise UserError(f"ratios are {', '.join(map(str, self.ratios))}, need parts that add up to 1; give such ratios")


Task = EraseTask | CustomizeTask | MergeTask | DebiasTask
Kind = TypeVar("Kind", EraseTask, CustomizeTask, MergeTask, DebiasTask)
GIVE = {
    EraseTask: "give concepts to erase",
    CustomizeTask: "give subjects to learn",
    MergeTask: "give the edits to merge",
    DebiasTask: "give concepts, attributes and what counts them",
}


def expect(kind: type[Kind], task: Task) -> Kind:
    """The task, which must be of this kind."""
    if not isinstance(task, kind):
        raise UserError(f"given a task of the kind {type(task).__name__}, this method needs {kind.__name__}; {GIVE[kind]}")
    return task
