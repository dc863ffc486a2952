"""Captions: how the world's scenes are put into words."""

from __future__ import annotations

import numpy as np

from toolkit.world.scenes import Scene, World, pick

AT = {
    "center": ("in the middle",),
    "left": ("on the left",),
    "right": ("on the right",),
    "top left": ("in the top left",),
    "top right": ("in the top right",),
    "bottom left": ("in the bottom left",),
    "bottom right": ("in the bottom right",),
}
HEADS = ("a {}", "a {}", "a photo of a {}", "a picture of a {}", "an emoji of a {}", "{}")
BACKDROPS = (" on a {} background", " on a {} background", ", {} background", " with a {} background")
EMPTY = ("a plain {} background", "an empty {} background", "nothing on a {} background")


def caption(world: World, scene: Scene, rng: np.random.Generator, *, full: bool = False, synonyms: float = 0.4) -> str:
    """A caption for a scene.

    full: name the style, the background and every place; otherwise style and background are named most of the time, a
    single object's place whenever it is not the middle, and the sides of two objects most of the time.
    synonyms: how often an object that has synonyms is called by one.
    """
    names = [_word(world, name, rng, synonyms) for _, name in scene.items]
    backdrop = pick(rng, list(BACKDROPS)).format(scene.background) if full or rng.random() < 0.85 else ""
    if not names:
        return pick(rng, list(EMPTY)).format(scene.background) if backdrop else "nothing"
    style = scene.style if full or rng.random() < 0.9 else ""
    before, after = ("", "")
    if style:
        before, after = [(f"{style} ", ""), ("", f" in {style} style"), ("", f", {style} style")][int(rng.integers(3))]
    if len(names) == 1:
        place = scene.items[0][0]
        where = f" {AT[place][0]}" if full or place != "center" or rng.random() < 0.2 else ""
        what = pick(rng, list(HEADS)).format(before + names[0]) + where
    else:
        placed = len(names) > 2 or full or rng.random() < 0.9
        order = rng.permutation(len(names)) if not placed else range(len(names))
        parts = [f"a {before}{names[i]}" + (f" {AT[scene.items[i][0]][0]}" if placed else "") for i in order]
        what = " and ".join(parts) if len(parts) == 2 else ", ".join(parts)
    return f"{what}{after}{backdrop}" if rng.random() < 0.5 else f"{what}{backdrop}{after}"


def _word(world: World, name: str, rng: np.random.Generator, synonyms: float) -> str:
    others = world.things[name].synonyms
    return pick(rng, list(others)) if others and rng.random() < synonyms else name
