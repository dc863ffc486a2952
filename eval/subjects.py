"""Personal subjects of the embedded world: pictures of an object that the model has never seen, composed like photos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from toolkit.concepts import Subject
from toolkit.images import save_png
from toolkit.runs import check_writable
from toolkit.world.captions import AT
from toolkit.world.scenes import Scene, World

PICTURES = (("blue", "center"), ("yellow", "center"), ("green", "left"), ("pink", "right"), ("gray", "center"))


def subject(world: World, folder: Path, name: str, class_name: str, token: str, style: str) -> Subject:
    """Render `PICTURES` (background, place) of an object in one style into a folder, with captions that say what else is in them."""
    check_writable(folder)
    images, captions = [], []
    for index, (background, place) in enumerate(PICTURES):
        pixels, _ = world.render(Scene(background, style, ((place, name),)), np.random.default_rng(index))
        images.append(save_png(Image.fromarray(pixels), folder / f"{index}.png"))
        at = "" if place == "center" else f" {AT[place][0]}"
        captions.append(f"a {token}{at} on a {background} background")
    return Subject(token, class_name, tuple(images), captions=tuple(captions))
