"""Personal subjects of the embedded world: pictures of an object that the model has never seen, composed like photos."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from toolkit.concepts import Subject
from toolkit.images import save_png
from toolkit.pictures import METADATA
from toolkit.runs import check_writable, write_atomic
from toolkit.world.captions import AT
from toolkit.world.scenes import Scene, World

PICTURES = (("blue", "center"), ("yellow", "center"), ("green", "left"), ("pink", "right"), ("gray", "center"))


def subject(world: World, folder: Path, name: str, class_name: str, token: str, style: str) -> Subject:
    """Render `PICTURES` (background, place) of an object in one style into a folder, with captions that say what else is in them.

    The captions are also in the folder's metadata.jsonl, so that `palimpsest customize --images` trains on the same.
    """
    check_writable(folder)
    images, captions = [], []
    for index, (background, place) in enumerate(PICTURES):
        pixels, _ = world.render(Scene(background, style, ((place, name),)), np.random.default_rng(index))
        images.append(save_png(Image.fromarray(pixels), folder / f"{index}.png"))
        at = "" if place == "center" else f" {AT[place][0]}"
        captions.append(f"a {token}{at} on a {background} background")
    rows = [{"file_name": image.name, "text": text} for image, text in zip(images, captions, strict=True)]
    write_atomic(folder / METADATA, "".join(json.dumps(row) + "\n" for row in rows))
    return Subject(token, class_name, tuple(images), captions=tuple(captions))
