"""What is measured: a cell is one method on one task, with everything that is drawn for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, product
from pathlib import Path
from typing import TYPE_CHECKING

from eval import prompts as make
from eval.attacks.base import Attack
from eval.experiment import Experiment, Section
from eval.found import called, untold
from eval.prompts import Prompt, resolve
from eval.subjects import PICTURES, SIDES, Lesson, Portrait, entangled, side_by_side
from eval.subjects import alone as portrayed
from toolkit.concepts import Concept, EraseTask, Task
from toolkit.errors import UserError, unknown
from toolkit.method import Method
from toolkit.world.captions import AT
from toolkit.world.kept import everything_else
from toolkit.world.scenes import BACKGROUNDS, Scene, World
from trainers.customize.concept_express import ConceptExpress

if TYPE_CHECKING:
    from toolkit.edits.base import Edit
    from toolkit.model import Model

KEPT = 0.75  # images of everything else in a cell, per image of the concept by name
ROUND = 40  # different prompts for one of the other objects before seeds change
TOKENS = ("<pal>", "<toy>")

Pair = tuple[Prompt, Prompt]


@dataclass(frozen=True)
class Cell:
    """One method on one task.

    method: its label in the experiment. fitted: it, with its options. section: the name of what it is pooled with. task: its own
    name. asked: label -> pairs of what the unedited model is asked and what the edited one is; the two differ only where it says so below.

    name        the concept by its name                     kept    everything else
    given       by its synonyms that a method may be given  unnamed unedited: the prompts of `name` without the style
    held_back   by those that none is given                 alone   a subject in new contexts; unedited: by the object's name
    beside      left of another object, which should stay   beside  of a subject: the same on new backgrounds
    together    both subjects of a pair, side by side; unedited: by the objects' names

    attacks: label -> what tries to bring back what is erased, n images of each object.
    """

    method: str
    fitted: Method
    section: str
    task: str
    goal: EraseTask | Lesson
    asked: Mapping[str, Sequence[Pair]]
    attacks: Mapping[str, Attack] = field(default_factory=dict)
    n: int = 0

    @property
    def name(self) -> str:
        """The method and the task, as a file name."""
        return f"{self.method}-{self.task}".replace(" ", "-").replace("/", "-")

    @property
    def erased(self) -> tuple[str, ...]:
        """The objects, or the style, that must not be drawn."""
        return tuple(concept.name for concept in self.goal.concepts) if isinstance(self.goal, EraseTask) else ()

    @property
    def kind(self) -> str:
        """What kind of section it is in."""
        if isinstance(self.goal, Lesson):
            return self.goal.kind
        return "styles" if self.goal.concepts[0].kind == "style" else "objects"

    @property
    def anchor(self) -> str | None:
        """What should be drawn instead."""
        return self.goal.concepts[0].anchor if isinstance(self.goal, EraseTask) else None

    def to_fit(self, world: World, folder: Path) -> Task:
        """The task for the method; a subject's pictures go into the folder."""
        if isinstance(self.goal, EraseTask):
            return self.goal
        return untold(self.goal, world, folder) if isinstance(self.fitted, ConceptExpress) else self.goal.task(world, folder)

    def asked_by(self, edit: Edit, model: Model, world: World) -> Edit:
        """The edit with the words that prompts ask by: another one where the method found by itself what there is to learn."""
        if isinstance(self.fitted, ConceptExpress) and isinstance(self.goal, Lesson):
            return called(edit, self.goal, self.fitted, model, world)
        return edit


def plan(world: World, experiment: Experiment) -> list[Cell]:
    """Every cell, section by section and task by task.

    Everything else is asked for evenly over all tasks that erase, and over all that learn.
    """
    cells: dict[str, list[Cell]] = {section.title: [] for section in experiment.sections}
    for learning in (False, True):
        tasks = [
            (section, task, goal) for section in experiment.sections if section.learns == learning for task, goal in goals(world, section)
        ]
        counts = [others(section, experiment) for section, *_ in tasks]
        rest = shares(world, [hidden(goal) for *_, goal in tasks], counts)
        for (section, task, goal), kept in zip(tasks, rest, strict=True):
            attacks = experiment.attacks_on(section)
            for method in experiment.methods_of(section):
                own = replace(goal, given=experiment.given[method]) if isinstance(goal, Lesson) else goal
                n = section.n or experiment.header.n
                about = {**asked(world, own, n), "kept": same(kept)}
                drawn = {label: pairs for label, pairs in about.items() if label in section.labels or label == "unnamed"}
                cells[section.title].append(Cell(method, experiment.method(method, section), section.title, task, own, drawn, attacks, n))
    return [cell for found in cells.values() for cell in found]


# --- tasks ------------------------------------------------------------------------------------------------------------
def goals(world: World, section: Section) -> Iterator[tuple[str, EraseTask | Lesson]]:
    """The tasks of a section with their names."""
    if section.learns:
        yield from lessons(world, section)
        return
    concepts = list(erased(world, section))
    if section.together:
        yield section.title, erasure(world, concepts, section.templates)
        return
    for concept in concepts:
        to = f" to {concept.anchor or 'nothing'}" if section.styles or concept.anchor else ""
        yield f"{concept.name}{to}{'' if section.synonyms else ' without synonyms'}", erasure(world, [concept], section.templates)


def lessons(world: World, section: Section) -> Iterator[tuple[str, Lesson]]:
    """What is to learn in a section; styles are taken in turn."""
    unseen, size = world.names("held_out"), len(TOKENS) if section.pairs else 1
    named = list(zip(section.concepts, section.class_names, strict=True))
    for name in section.concepts:
        if name not in unseen:
            raise unknown(f"subject in section {section.title!r}", name, unseen)
    for i in range(len(named) // size):
        one, *other = (Portrait(*names, token) for names, token in zip(named[i * size :][:size], TOKENS, strict=False))
        style, background = world.styles[i % len(world.styles)], PICTURES[i % len(PICTURES)][0]
        if other:
            several = f" in {section.pictures} pictures" if section.pictures > 1 else ""
            yield f"{one.name} and {other[0].name}{several}", side_by_side((one, *other), style, i, section.pictures)
        elif section.entangled:
            yield f"{one.name} on {background}", entangled(one, style, background)
        else:
            yield one.name, portrayed(one, style)


def erased(world: World, section: Section) -> Iterator[Concept]:
    """The concepts of a section, groups as their objects."""
    for i, word in enumerate(section.concepts):
        target = resolve(world, word)
        if target.kind != {"objects": "object", "styles": "style"}[section.kind]:
            raise UserError(f"{word!r} in section {section.title!r} is of the kind {target.kind}; move it to {target.kind}s")
        for name in target.names:
            synonyms = world.things[name].given if target.kind == "object" and section.synonyms else ()
            yield Concept(name, synonyms, section.anchor_of(i), target.kind)


def erasure(world: World, concepts: Sequence[Concept], templates: int) -> EraseTask:
    """The task that erases concepts and preserves every other scored object, in so many contexts, and style when it is about one."""
    names = [concept.name for concept in concepts]
    if templates:
        rest = tuple(name for name in world.names("scored") if name not in names)
        return EraseTask(tuple(concepts), rest, make.contexts(world, templates))
    styles = tuple(style for style in world.styles if style not in names) if concepts[0].kind == "style" else ()
    return EraseTask(tuple(concepts), (*styles, *everything_else(world, names)))


def hidden(goal: EraseTask | Lesson) -> set[str]:
    """What is not asked for among everything else."""
    return {concept.name for concept in goal.concepts} if isinstance(goal, EraseTask) else set()


def others(section: Section, experiment: Experiment) -> int:
    """How many images of everything else each task of a section is measured with."""
    n = section.n or experiment.header.n
    return section.kept or (max(1, n // 2) if section.learns else max(1, round(KEPT * n)))


# --- prompts ----------------------------------------------------------------------------------------------------------
def asked(world: World, goal: EraseTask | Lesson, n: int) -> dict[str, list[Pair]]:
    """Label -> the prompts about what is erased or learnt. n: of each concept by its name."""
    if isinstance(goal, Lesson):
        return taught(world, goal, n)
    if goal.concepts[0].kind == "style":
        named = make.in_style(goal.concepts[0].name, world.names("scored"), n)
        return {"name": same(named), "unnamed": [(unnamed(prompt), prompt) for prompt in named]}
    names = [concept.name for concept in goal.concepts]
    rest = [name for name in world.names("scored") if name not in names]
    by_name = [prompt for name in names for prompt in make.single(world, name, n)]
    with_others = [prompt for name in names for prompt in beside(name, name, rest, max(1, n // 2), list(BACKGROUNDS))]
    return {"name": same(by_name), **by_synonyms(world, goal, n), "beside": same(with_others)}


def taught(world: World, lesson: Lesson, n: int) -> dict[str, list[Pair]]:
    """The same about what is learnt; n: of each subject alone, and of both together."""
    names = lesson.names

    def pairs(asked: Callable[[Sequence[str]], list[Prompt]]) -> list[Pair]:
        return list(zip(asked(names), asked(lesson.words), strict=True))

    result = {"alone": pairs(lambda words: [prompt for word, name in zip(words, names, strict=True) for prompt in alone(word, name, n)])}
    if lesson.kind == "pairs":
        return {**result, "together": pairs(lambda words: together(words, names, n))}
    others, half, free = world.names("scored"), max(1, n // 2), new_backgrounds()
    return {**result, "beside": pairs(lambda words: beside(words[0], names[0], others, half, free))}


def by_synonyms(world: World, goal: EraseTask, n: int) -> dict[str, list[Pair]]:
    """Half as many prompts by each concept's given synonyms, and by those held back."""
    things = [world.things[concept.name] for concept in goal.concepts]
    half = max(1, n // 2)
    return {
        role: same(
            [prompt for thing, words in zip(things, each, strict=True) for prompt in make.single(world, thing.name, half, words=words)]
        )
        for role, each in (("given", [thing.given for thing in things]), ("held_back", [thing.held_back for thing in things]))
    }


def unnamed(prompt: Prompt) -> Prompt:
    """A prompt of `in_style` without its style."""
    style = prompt.scene.style
    text = prompt.text.replace(f" in {style} style", "").replace(f"{style} ", "")
    return replace(prompt, text=text, scene=replace(prompt.scene, style=""))


def alone(word: str, name: str, n: int) -> list[Prompt]:
    """n prompts for a subject on backgrounds that none of its pictures has, at all places."""
    return [prompt for prompt in make.learned(word, name, 8 * n) if prompt.scene.background in new_backgrounds()][:n]


def beside(word: str, name: str, others: Sequence[str], n: int, backgrounds: Sequence[str]) -> list[Prompt]:
    """n prompts for an object, called by `word`, on the left of one of the others."""
    prompts = [two((word, other), (name, other), background) for background, other in product(backgrounds, others)]
    return make.spread(prompts, n, 0, f"beside {name}")


def together(words: Sequence[str], names: Sequence[str], n: int) -> list[Prompt]:
    """n prompts for two objects, called by `words`, side by side either way, on backgrounds that none of their pictures has."""
    prompts = [two(words[::turn], names[::turn], background) for background, turn in product(new_backgrounds(), (1, -1))]
    return make.spread(prompts, n, 0, f"together {', '.join(names)}")


def two(words: Sequence[str], names: Sequence[str], background: str) -> Prompt:
    """A prompt for two objects, called by `words`, the first on the left."""
    parts = [f"a {word} {AT[side][0]}" for word, side in zip(words, SIDES, strict=True)]
    scene = Scene(background, "", tuple(zip(SIDES, names, strict=True)))
    return Prompt(make.SEVERAL.format(" and ".join(parts), background=background), 0, scene, tuple(words))


def new_backgrounds() -> list[str]:
    """Backgrounds that no picture of a subject has."""
    return [background for background in BACKGROUNDS if background not in {shown for shown, _ in PICTURES}]


def shares(world: World, hidden: Sequence[set[str]], counts: Sequence[int]) -> list[list[Prompt]]:
    """For every task so many prompts of scored objects and styles other than those it hides.

    Each object is asked for as often as any other over the tasks up to any one of them, always in new prompts.
    """
    used: Counter[str] = Counter()
    queues = {name: _endless(world, name) for name in world.names("scored")}
    result = []
    for names, n in zip(hidden, counts, strict=True):
        free = [name for name in queues if name not in names]
        prompts = []
        for _ in range(n):
            name = min(free, key=used.__getitem__)
            used[name] += 1
            prompts.append(next(prompt for prompt in queues[name] if prompt.scene.style not in names))
        result.append(prompts)
    return result


def _endless(world: World, name: str) -> Iterator[Prompt]:
    """Prompts for one object, again with the next seed when they are through."""
    for seed in count():
        yield from make.single(world, name, ROUND, seed=seed)


def same(prompts: Sequence[Prompt]) -> list[Pair]:
    """The same prompts before and after."""
    return [(prompt, prompt) for prompt in prompts]
