"""Evaluation prompts about the embedded world. Each one carries the scene that a right image of it shows.

Everything is deterministic: the same arguments give the same prompts with the same seeds, whatever model they are for.
The templates are fixed:

    a {} on a {background} background                    a {style} {} on a {background} background
    a photo of a {} on a {background} background         a picture of a {} in {style} style on a {background} background
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, product
from typing import Literal

import numpy as np

from toolkit.errors import UserError, unknown
from toolkit.runs import seeded
from toolkit.world.captions import AT, caption
from toolkit.world.scenes import BACKGROUNDS, QUADRANTS, Scene, Thing, World, held_out_triple

PLAIN = ("a {}{at} on a {background} background", "a photo of a {}{at} on a {background} background")
STYLED = ("a {style} {}{at} on a {background} background", "a picture of a {}{at} in {style} style on a {background} background")
EMPTY = ("a plain {background} background", "an empty {background} background")
SEVERAL = "{} on a {background} background"


@dataclass(frozen=True)
class Prompt:
    """A prompt, the seed of its image, and the truth.

    scene: what it asks for; its style is "" when the prompt names none. words: what each of the scene's objects is
    called here.
    """

    text: str
    seed: int
    scene: Scene
    words: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The world's names of the objects asked for."""
        return tuple(name for _, name in self.scene.items)

    @property
    def held_out(self) -> bool:
        """Whether it asks for an object, background and place that no training image shows together."""
        return any(held_out_triple(name, self.scene.background, place) for place, name in self.scene.items)


def single(
    world: World,
    name: str,
    n: int,
    *,
    seed: int = 0,
    words: Sequence[str] = (),
    places: Sequence[str] = ("center",),
    without: Collection[str] = (),
) -> list[Prompt]:
    """n prompts for one object, spread over templates, styles, backgrounds, `places` and `words` (its name, if empty).

    without: styles that are not asked for.
    """
    words = tuple(words) or (name,)
    forms = [*product(PLAIN, [""]), *product(STYLED, [style for style in world.styles if style not in without])]
    prompts = [
        _single(form, word, name, Scene(background, style, ((place, name),)))
        for (form, style), background, place, word in product(forms, BACKGROUNDS, places, words)
    ]
    return spread(prompts, n, seed, f"single {name} {','.join(words)}")


def in_style(style: str, names: Sequence[str], n: int, *, seed: int = 0) -> list[Prompt]:
    """n prompts that name a style, spread over objects, templates and backgrounds."""
    prompts = [
        _single(form, name, name, Scene(background, style, (("center", name),)))
        for form, background, name in product(STYLED, BACKGROUNDS, names)
    ]
    return spread(prompts, n, seed, f"style {style}")


def several(count: int, names: Sequence[str], n: int, *, seed: int = 0) -> list[Prompt]:
    """n prompts for two, three or four distinct objects, each with its place (two: left and right)."""
    if not 2 <= count <= min(4, len(names)):
        raise UserError(f"{count} objects of {len(names)} given, an image holds two to four; give 2, 3 or 4")
    rng = _rng(f"several {count}", seed)
    prompts = []
    for i in range(n):
        chosen = [names[int(j)] for j in rng.choice(len(names), count, replace=False)]
        corners = sorted(rng.choice(4, count, replace=False))
        places: Sequence[str] = ("left", "right") if count == 2 else [QUADRANTS[j] for j in corners]
        background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
        items = tuple(zip(places, chosen, strict=True))
        parts = [f"a {name} {AT[place][0]}" for place, name in items]
        text = SEVERAL.format(" and ".join(parts) if count == 2 else ", ".join(parts), background=background)
        prompts.append(Prompt(text, seed + i, Scene(background, "", items), tuple(chosen)))
    return prompts


def empty(n: int, *, seed: int = 0) -> list[Prompt]:
    """n prompts for a background without any object."""
    prompts = [Prompt(form.format(background=b), 0, Scene(b, "", ()), ()) for form, b in product(EMPTY, BACKGROUNDS)]
    return spread(prompts, n, seed, "empty")


def objects(world: World, names: Sequence[str], n: int, *, seed: int = 0, without: Collection[str] = ()) -> list[Prompt]:
    """At least n single-object prompts, the same number for each name. without: styles that are not asked for."""
    each = -(-n // len(names))
    return [prompt for name in names for prompt in single(world, name, each, seed=seed, without=without)]


def learned(token: str, name: str, n: int, *, seed: int = 0) -> list[Prompt]:
    """n prompts for a learnt subject in new contexts: backgrounds and places. name: the object that the token stands for.

    They name no style, which is the subject's own.
    """
    where = ("center", "left", "right", *QUADRANTS)
    prompts = [
        _single(form, token, name, Scene(background, "", ((place, name),)))
        for form, background, place in product(PLAIN, BACKGROUNDS, where)
    ]
    return spread(prompts, n, seed, f"learned {name}")


def contexts(world: World, n: int) -> tuple[str, ...]:
    """n templates with {} for an object, in the words of the captions that the model was trained with: the bare {} first.

    None is one of the templates above, which the evaluation asks with.
    """
    name = world.names("scored")[0]
    evaluated = {prompt.text for prompt in single(world, name, 2 * len(BACKGROUNDS) * (1 + len(world.styles)))}
    rng, found = _rng("contexts", 0), ["{}"]
    for background, style in cycle(product(BACKGROUNDS, world.styles)):
        if len(found) >= n:
            return tuple(found[:n])
        text = caption(world, Scene(background, style, (("center", name),)), rng, synonyms=0)
        template = text.replace(name, "{}")
        if text not in evaluated and template not in found:
            found.append(template)
    raise AssertionError("a cycle does not end")


def spread(prompts: Sequence[Prompt], n: int, seed: int, key: str) -> list[Prompt]:
    """n of the prompts in an order that depends on `key` alone; each again with the next seed when there are fewer."""
    order = _rng(key, 0).permutation(len(prompts))
    return [replace(prompts[order[i % len(order)]], seed=seed + i // len(order)) for i in range(n)]


@dataclass(frozen=True)
class Target:
    """Something erased, as the oracle knows it: objects that must not be drawn, or a style.

    name: what the user called it. kind: what it is. names: the world's objects (for a style: that style alone).
    """

    name: str
    kind: Literal["object", "style"]
    names: tuple[str, ...]


def resolve(world: World, word: str) -> Target:
    """What a word means here: an object by name or synonym, a group such as "weapon" (all its objects), or a style."""
    key = " ".join(word.lower().split())
    if key in world.styles:
        return Target(key, "style", (key,))
    if thing := find(world, key):
        return Target(thing.name, "object", (thing.name,))
    for group in (key, key.removesuffix("s")):
        if world.group(group):
            return Target(group, "object", tuple(world.group(group)))
    groups = {thing.group for thing in world.things.values() if world.group(thing.group)}
    known = {other for thing in world.things.values() for other in (thing.name, *thing.synonyms)}
    raise unknown("concept of the embedded world", word, known | groups | set(world.styles))


def find(world: World, word: str) -> Thing | None:
    """The object of this name or synonym."""
    return world.things.get(word) or next((thing for thing in world.things.values() if word in thing.synonyms), None)


def _single(form: str, word: str, name: str, scene: Scene) -> Prompt:
    """The prompt of a template; a place is named unless it is the middle, as in training captions."""
    place = scene.items[0][0]
    at = "" if place == "center" else f" {AT[place][0]}"
    return Prompt(form.format(word, at=at, style=scene.style, background=scene.background), 0, scene, (word,))


def _rng(key: str, seed: int) -> np.random.Generator:
    return np.random.default_rng(seeded(key, seed).initial_seed())
