"""What of the embedded world an edit is told to keep."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from toolkit.errors import UserError
from toolkit.world.captions import caption
from toolkit.world.scenes import BACKGROUNDS, Scene, World, load_world

if TYPE_CHECKING:
    from toolkit.method import Method

DRAWING_STEPS = 8  # with which the embedded model draws what a method that learns is to keep


def everything_else(world: World, erased: Collection[str]) -> tuple[str, ...]:
    """What an edit that erases these is told to preserve: every other scored object, by its name and once on a background.

    erased: names, synonyms or groups of objects; other words are nothing's. With the names alone, what an object looks like in a longer
    prompt is not preserved well.
    """
    called = {name: (name, *world.things[name].synonyms, world.things[name].group) for name in world.names("scored")}
    names = [name for name, words in called.items() if not set(erased).intersection(words)]
    backgrounds = list(BACKGROUNDS)
    return (*names, *(f"{name} on a {backgrounds[i % len(backgrounds)]} background" for i, name in enumerate(names)))


def one_of_each(world: World) -> tuple[str, ...]:
    """A caption for each scored object, styles and backgrounds in turn."""
    backgrounds, rng = list(BACKGROUNDS), np.random.default_rng(0)
    scenes = (
        Scene(backgrounds[i % len(backgrounds)], world.styles[i % len(world.styles)], (("center", name),))
        for i, name in enumerate(world.names("scored"))
    )
    return tuple(caption(world, scene, rng, synonyms=0) for scene in scenes)


def keeping_world(method: type[Method], options: Mapping[str, Any]) -> dict[str, Any]:
    """A learning method's options, with those that keep everything that the embedded world has: the model draws a picture of each object,
    and is to say of them what it says now (prior distillation). Options that say otherwise are a UserError.
    """
    fields = {field.name for field in dataclasses.fields(method)}  # type: ignore[arg-type]
    if "class_prompts" not in fields:
        raise UserError(f"{method.name()} has no pictures of anything else, so it cannot keep the world; do not ask it to")
    if given := [name for name in ("prior", "class_prompts", "class_images", "num_class_images") if name in options]:
        raise UserError(f"{', '.join(given)} given beside the world that is to be kept, which says them; leave one of the two out")
    prompts = one_of_each(load_world())
    told = {"prior": "distillation", "class_prompts": prompts, "num_class_images": len(prompts), "class_image_steps": DRAWING_STEPS}
    return {**told, **options}
