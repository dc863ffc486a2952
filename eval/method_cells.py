"""What the methods are measured on: a cell is one method on one task, with everything that is drawn for it.

The tasks are fixed, so that no result decides what is measured. Only objects that the unedited model draws well count; when
one of `OBJECTS` or `ANCHORED` does not, the next spare takes its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, product
from pathlib import Path

from eval import prompts as make
from eval.prompts import Prompt
from eval.subjects import PICTURES, subject
from toolkit.concepts import Concept, CustomizeTask, EraseTask, Task
from toolkit.world.captions import AT
from toolkit.world.scenes import BACKGROUNDS, Scene, World

ERASERS, LEARNER = ("uce", "rece"), "textual_inversion"
BARE = "rece"  # the method that is also fitted without any synonym
OBJECTS = ("pistol", "dog", "turtle", "pizza", "sailboat", "house", "backpack", "laptop", "couch", "drum", "palm tree", "gem")
SPARES = ("mushroom", "helicopter", "frog", "hamburger", "knife", "phone", "bucket", "top hat", "dartboard", "bee", "gift", "corn")
ANCHORED = (("cat", "dog"), ("car", "bicycle"))
SPARE_ANCHORED = (("axe", "saw"), ("frog", "turtle"), ("beer", "coffee"), ("ship", "sailboat"))
GROUP = "weapon"
STYLES, STYLE_ANCHOR = ("twemoji", "noto", "fluent 3d"), "fluent flat"
KEPT = 0.75  # images of everything else in a cell, per image of the concept by name
ROUND = 40  # different prompts for one of the other objects before seeds change

Pair = tuple[Prompt, Prompt]


@dataclass(frozen=True)
class Portrait:
    """A subject to learn: the object, the word for what it is nearest to among what the model knows, its token, its style."""

    name: str
    class_name: str
    token: str
    style: str


CLASSES = {
    "penguin": "bird",
    "octopus": "crab",
    "castle": "house",
    "doughnut": "cookie",
    "cactus": "tulip",
    "tractor": "truck",
    "umbrella": "parachute",
    "scissors": "knife",
}


@dataclass(frozen=True)
class Cell:
    """One method on one task.

    section: objects, bare (without synonyms), anchored, group, styles or subjects. task: its name. asked: label -> pairs
    of what the unedited model is asked and what the edited one is; the two differ only where it says so below.

    name        the concept by its name                     kept    other objects
    given       by its synonyms that a method may be given  unnamed unedited: the prompts of `name` without the style
    held_back   by those that none is given                 alone   a subject in new contexts; unedited: by the object's name
                                                            beside  the same, left of another object
    """

    method: str
    section: str
    task: str
    goal: EraseTask | Portrait
    asked: Mapping[str, Sequence[Pair]]

    @property
    def name(self) -> str:
        """The method and the task, as a file name."""
        return f"{self.method}-{self.task}".replace(" ", "-")

    @property
    def erased(self) -> tuple[str, ...]:
        """The objects, or the style, that must not be drawn."""
        return tuple(concept.name for concept in self.goal.concepts) if isinstance(self.goal, EraseTask) else ()

    @property
    def anchor(self) -> str | None:
        """What should be drawn instead."""
        return self.goal.concepts[0].anchor if isinstance(self.goal, EraseTask) else None

    def to_fit(self, world: World, folder: Path) -> Task:
        """The task for the method; a subject's pictures go into the folder."""
        if isinstance(self.goal, EraseTask):
            return self.goal
        one = self.goal
        return CustomizeTask((subject(world, folder, one.name, one.class_name, one.token, one.style),))


@dataclass(frozen=True)
class Chosen:
    """The objects that the unedited model draws well enough to count, and with anchors the pairs."""

    objects: tuple[str, ...]
    anchored: tuple[tuple[str, str], ...]


def plan(world: World, chosen: Chosen, n: int) -> list[Cell]:
    """Every cell. n: images of a concept by name."""
    goals = list(erasures(world, chosen))
    portraits = list(subjects(world))
    hidden = [{concept.name for concept in goal.concepts} for *_, goal in goals]
    share = max(1, round(KEPT * n))
    kept = [same(prompts) for prompts in shares(world, hidden, share)]
    prompts = [{**asked(world, goal, n), "kept": rest} for (*_, goal), rest in zip(goals, kept, strict=True)]
    cells = [
        Cell(method, section, task, goal, about) for method in ERASERS for (section, task, goal), about in zip(goals, prompts, strict=True)
    ]
    for name in chosen.objects:
        goal = EraseTask((Concept(name),), make.everything_else(world, [name]))
        cells.append(Cell(BARE, "bare", f"{name} without synonyms", goal, by_synonyms(world, goal, n)))
    half = max(1, n // 2)
    for one, rest in zip(portraits, shares(world, [set() for _ in portraits], half), strict=True):
        new = {
            "alone": list(zip(*(alone(word, one.name, n) for word in (one.name, one.token)), strict=True)),
            "beside": list(zip(*(beside(world, word, one.name, half) for word in (one.name, one.token)), strict=True)),
        }
        cells.append(Cell(LEARNER, "subjects", one.name, one, {**new, "kept": same(rest)}))
    return cells


# --- tasks ------------------------------------------------------------------------------------------------------------
def erasures(world: World, chosen: Chosen) -> Iterator[tuple[str, str, EraseTask]]:
    """(section, task, what to erase): objects alone, objects with an anchor, the group in one task, styles."""

    def objects(names: Sequence[str], anchor: str | None = None) -> EraseTask:
        concepts = tuple(Concept(name, world.things[name].given, anchor) for name in names)
        return EraseTask(concepts, make.everything_else(world, names))

    for name in chosen.objects:
        yield "objects", name, objects([name])
    for name, anchor in chosen.anchored:
        yield "anchored", f"{name} to {anchor}", objects([name], anchor)
    yield "group", GROUP, objects(world.group(GROUP))
    for style, anchor in product(STYLES, (STYLE_ANCHOR, None)):
        rest = tuple(other for other in world.styles if other != style)
        goal = EraseTask((Concept(style, anchor=anchor, kind="style"),), (*rest, *make.everything_else(world, ())))
        yield "styles", f"{style} to {anchor or 'nothing'}", goal


def subjects(world: World) -> Iterator[Portrait]:
    """Objects that the model has never seen, each in one style, the styles in turn."""
    for i, (name, class_name) in enumerate(CLASSES.items()):
        yield Portrait(name, class_name, "<pal>", world.styles[i % len(world.styles)])


# --- prompts ----------------------------------------------------------------------------------------------------------
def asked(world: World, goal: EraseTask, n: int) -> dict[str, list[Pair]]:
    """The prompts about what is erased."""
    if goal.concepts[0].kind == "style":
        named = make.in_style(goal.concepts[0].name, world.names("scored"), n)
        return {"name": same(named), "unnamed": [(unnamed(prompt), prompt) for prompt in named]}
    by_name = same([prompt for concept in goal.concepts for prompt in make.single(world, concept.name, n)])
    return {"name": by_name, **by_synonyms(world, goal, n)}


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


def beside(world: World, word: str, name: str, n: int) -> list[Prompt]:
    """n prompts for a subject on the left of a scored object, on such backgrounds."""
    left, right = AT["left"][0], AT["right"][0]
    prompts = [
        Prompt(
            make.SEVERAL.format(f"a {word} {left} and a {other} {right}", background=background),
            0,
            Scene(background, "", (("left", name), ("right", other))),
            (word, other),
        )
        for background, other in product(new_backgrounds(), world.names("scored"))
    ]
    return make.spread(prompts, n, 0, f"beside {name}")


def new_backgrounds() -> list[str]:
    """Backgrounds that no picture of a subject has."""
    return [background for background in BACKGROUNDS if background not in {shown for shown, _ in PICTURES}]


def shares(world: World, hidden: Sequence[set[str]], n: int) -> list[list[Prompt]]:
    """For every task n prompts of scored objects and styles other than those it hides.

    Each object is asked for as often as any other over the tasks up to any one of them, always in new prompts.
    """
    used: Counter[str] = Counter()
    queues = {name: _endless(world, name) for name in world.names("scored")}
    result = []
    for names in hidden:
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
