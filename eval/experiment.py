"""Experiments: a TOML file that says which methods are measured on which tasks.

    title = "Two erasers"           # of the report
    about = "What it is for."
    n = 64                          # images of a concept by its name
    steps = 8                       # of denoising
    guidance = 2.0

    [methods.uce]                   # a method with its default options
    [methods.gentle]                # another label: the method is said
    method = "uce"
    lamb = 10

    [methods.break_a_scene]         # what a method that learns is given with its pictures, see `Given`
    given = { masks = true, captions = false }

    [attacks.paraphrase]            # tries to bring back what was erased; labels and options as methods have them
    [attacks.long-inversion]
    method = "concept_inversion"
    max_train_steps = 500

    [[sections]]
    title = "objects, each alone"
    objects = ["dog", "pistol"]     # of the embedded world: objects, a group such as weapon; or styles, subjects, ...
    attacks = ["paraphrase", "long-inversion"]

`Section` lists what a section may say. eval/experiments/ has the project's own.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.attacks.base import Attack
from eval.subjects import PICTURES, Given
from toolkit import registry
from toolkit.errors import UserError, unknown
from toolkit.method import Method
from toolkit.options import Configured, option
from toolkit.world.kept import keeping_world

LABELS = {
    "objects": ("name", "given", "held_back", "kept", "beside"),
    "styles": ("name", "kept"),
    "subjects": ("alone", "beside", "kept"),
    "pairs": ("alone", "together", "kept"),
    "entangled": ("alone", "kept"),
}
METHOD_KIND = {"objects": "erase", "styles": "erase", "subjects": "customize", "pairs": "customize", "entangled": "customize"}


@dataclass(frozen=True)
class Section(Configured):
    """Tasks that belong together: their rates are pooled, and compared over methods."""

    title: str = option("", "what the report calls it")
    objects: tuple[str, ...] = option((), "objects to erase, or a group of them")
    styles: tuple[str, ...] = option((), "styles to erase")
    subjects: tuple[str, ...] = option((), "objects that the model has never seen, to learn")
    pairs: tuple[str, ...] = option((), "the same two by two, each two out of pictures that show both side by side")
    entangled: tuple[str, ...] = option((), "the same, each from pictures with one background, which no caption says")
    class_names: tuple[str, ...] = option((), "for each subject what it is nearest to among what the model knows")
    pictures: int = option(1, "pictures of each pair, on different backgrounds, the sides in turn")
    anchors: tuple[str, ...] = option((), "what to draw instead: one for all, or one for each")
    together: bool = option(False, "erase all in one task, rather than each alone")
    synonyms: bool = option(True, "give the methods the synonyms that they may be given")
    templates: int = option(0, "prompt templates that objects, erased and preserved, are put into; 0: the methods' own")
    nothing: str = option("", "where concepts without an anchor go, of the methods that can choose; empty: as their options say")
    preserve_times: float = option(1.0, "times that the methods' preserve scales count, for several concepts in one task")
    ask: tuple[str, ...] = option((), "what is drawn, by label; empty: everything but beside for objects, all else")
    methods: tuple[str, ...] = option((), "labels of the methods; empty: all that can do it")
    attacks: tuple[str, ...] = option((), "labels of the attacks on what was erased")
    against: str = option("", "label of the method that the others are compared with, image by image, and by their edits' sizes")
    size: float = option(0.0, "the bar of the edits' sizes: at most this part of the size of that method's edits; 0: none")
    n: int | None = option(None, "images of a concept by its name, in place of the experiment's")
    kept: int | None = option(None, "images of everything else for each task; default: three quarters of n")

    def __post_init__(self) -> None:
        if sum(bool(getattr(self, kind)) for kind in LABELS) != 1:
            raise UserError(f"section {self.title!r} needs one of {', '.join(LABELS)}; name what it is about there")
        for what, given, allowed in (
            ("class_names", len(self.class_names), {len(self.concepts) if self.learns else 0}),
            ("anchors", len(self.anchors), {0, 1, len(self.concepts)}),
        ):
            if given not in allowed:
                raise UserError(f"section {self.title!r} has {given} {what} for {len(self.concepts)} {self.kind}; give one for each")
        if self.templates < 0 or (self.templates and not self.objects):
            raise UserError(f"section {self.title!r} has {self.templates} templates; give 0, or for objects more")
        if not 0 < self.preserve_times < float("inf"):
            raise UserError(f"section {self.title!r} has preserve_times {self.preserve_times}, needs a number above 0; give such a factor")
        if len(self.pairs) % 2:
            raise UserError(f"section {self.title!r} has {len(self.pairs)} pairs' subjects, needs two for each pair; give one more")
        if not 1 <= self.pictures <= len(PICTURES) or (self.pictures > 1 and not self.pairs):
            raise UserError(f"section {self.title!r} has {self.pictures} pictures; give 1, or for pairs up to {len(PICTURES)}")
        if self.attacks and self.learns:
            raise UserError(f"section {self.title!r} has attacks, which are on what was erased, and is about {self.kind}; leave them out")
        if self.against and not self.learns:
            raise UserError(f"section {self.title!r} has against, which compares what is learnt; leave it out")
        if self.size < 0 or (self.size and not self.against):
            raise UserError(f"section {self.title!r} has size {self.size:g}, needs 0, or more with against; name a method there")
        for label in self.ask:
            if label not in LABELS[self.kind]:
                raise unknown(f"label in ask of section {self.title!r}", label, LABELS[self.kind])

    @property
    def kind(self) -> str:
        """One of `LABELS`."""
        return next(kind for kind in LABELS if getattr(self, kind))

    @property
    def learns(self) -> bool:
        """Whether it is about what is learnt, and not about what is erased."""
        return METHOD_KIND[self.kind] == "customize"

    @property
    def concepts(self) -> tuple[str, ...]:
        """The objects, styles or subjects."""
        return getattr(self, self.kind)

    @property
    def labels(self) -> tuple[str, ...]:
        """What is drawn."""
        return self.ask or tuple(label for label in LABELS[self.kind] if (self.kind, label) != ("objects", "beside"))

    def anchor_of(self, index: int) -> str | None:
        """The anchor of the concept at an index."""
        return self.anchors[index % len(self.anchors)] if self.anchors else None


@dataclass(frozen=True)
class Header(Configured):
    """What holds for all sections."""

    title: str = option("Methods, compared", "heading of the report")
    about: str = option("", "what it is for")
    n: int = option(64, "images of a concept by its name")
    steps: int = option(12, "denoising steps")
    guidance: float = option(2.0, "guidance scale")
    erased_bar: float = option(0.05, "what is erased may still be drawn so often by its name, one concept three times as often")
    kept_bar: float = option(0.95, "so much of everything else should stay right")

    def __post_init__(self) -> None:
        for name in ("n", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} of the experiment is {getattr(self, name)}, needs at least 1; give a larger number")


@dataclass(frozen=True)
class Experiment:
    """What a file says.

    methods: label -> method with its options. given: label -> what it is given. sections: in the order of the report.
    attacks: label -> attack with its options.
    """

    header: Header
    methods: dict[str, Method]
    given: dict[str, Given]
    sections: tuple[Section, ...]
    attacks: dict[str, Attack] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for section in self.sections:
            if not self.methods_of(section):
                what = METHOD_KIND[section.kind]
                raise UserError(f"no method of the experiment can {what}, which section {section.title!r} needs; add one")
            self.attacks_on(section)
        for label in self.attacks:
            if not any(label in section.attacks for section in self.sections):
                raise UserError(f"no section has the attack {label}; name it in the attacks of one, or leave it out")

    def attacks_on(self, section: Section) -> dict[str, Attack]:
        """The attacks on what a section erases, by label."""
        for label in section.attacks:
            if label not in self.attacks:
                raise unknown(f"attack in section {section.title!r}", label, self.attacks)
        return {label: self.attacks[label] for label in section.attacks}

    def methods_of(self, section: Section) -> list[str]:
        """The labels of the methods that are measured on a section."""
        able = [label for label, method in self.methods.items() if method.kind == METHOD_KIND[section.kind]]
        for label in section.methods:
            if label not in able:
                raise unknown(f"method to {METHOD_KIND[section.kind]} in section {section.title!r}", label, able)
        labels = list(section.methods or able)
        if section.against and section.against not in labels:
            raise unknown(f"method in against of section {section.title!r}", section.against, labels)
        return labels

    def method(self, label: str, section: Section) -> Method:
        """The method of this label as it is measured on a section."""
        method = self.methods[label]
        options = method.config()
        told: dict[str, Any] = {}
        if section.preserve_times != 1:
            told |= {key: value * section.preserve_times for key, value in options.items() if key.endswith("preserve_scale")}
        if section.nothing and "nothing" in options:
            told["nothing"] = section.nothing
        return method.from_config({**options, **told}) if told else method


def read(path: str | Path) -> Experiment:
    """The experiment of a TOML file. What it says and cannot be done is a UserError."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file {str(path)!r}; give a TOML file that describes an experiment, such as eval/experiments/closed-form.toml")
    try:
        given: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{str(path)!r} is not TOML ({error}); correct it there") from None
    methods, attacks, sections = given.pop("methods", {}), given.pop("attacks", {}), given.pop("sections", [])
    if not isinstance(methods, dict) or not isinstance(sections, list) or not methods or not sections:
        raise UserError(f"{str(path)!r} needs a table [methods.NAME] and a table [[sections]]; write at least one of each")
    told = {label: _method(label, options) for label, options in methods.items()}
    return Experiment(
        Header.from_config(given),
        {label: method for label, (method, _) in told.items()},
        {label: beside for label, (_, beside) in told.items()},
        _sections(sections),
        {label: _attack(label, options) for label, options in attacks.items()},
    )


def _method(label: str, options: dict[str, Any]) -> tuple[Method, Given]:
    """The method of a table [methods.LABEL], and what it is given."""
    options = _table("methods", label, options)
    given = options.pop("given", {})
    beside = Given.from_config(given)
    kind = registry.load("method", options.pop("method", label))
    method = kind.from_config(keeping_world(kind, options) if beside.world else options)
    if given and (method.kind != "customize" or getattr(method, "finds", False)):
        what = "is told nothing of its pictures" if method.kind == "customize" else "learns from no pictures"
        raise UserError(f"methods.{label} is given {', '.join(given)}, and {method.name()} {what}; leave it out")
    return method, beside


def _attack(label: str, options: dict[str, Any]) -> Attack:
    """The attack of a table [attacks.LABEL]."""
    options = _table("attacks", label, options)
    return registry.load("attack", options.pop("method", label)).from_config(options)


def _table(of: str, label: str, options: Any) -> dict[str, Any]:
    """A copy of the table [OF.LABEL]."""
    if not isinstance(options, dict):
        raise UserError(f"{of}.{label} is {options!r}, needs a table; write [{of}.{label}] with its options below")
    return dict(options)


def _sections(given: list[dict[str, Any]]) -> tuple[Section, ...]:
    """The sections, each with its own name."""
    sections = tuple(map(Section.from_config, given))
    names = [section.title for section in sections]
    if "" in names or len(set(names)) < len(names):
        raise UserError(f"the sections are called {', '.join(map(repr, names))}; give each a name of its own")
    return sections
