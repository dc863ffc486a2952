"""Pictures for reports: the same prompts and seeds before and after, one under the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from eval.rates import Shown
from toolkit.images import grid, save_png, to_pil

ENLARGED = 2  # the embedded world's images are 64 pixels


def sheet(rows: Sequence[Sequence[Shown]], columns: int = 8) -> Image.Image:
    """Rows of images of the same prompts, e.g. (before, after): `columns` prompts spread evenly, then the next row below.

    With one row only, its images fill lines of `columns`.
    """
    if len(rows) == 1:
        return enlarged(rows[0][: 4 * columns], columns)
    picked = [item for row in rows for item in spread(row, columns)]
    return enlarged(picked, min(columns, len(rows[0])))


def enlarged(shown: Sequence[Shown], columns: int) -> Image.Image:
    """A grid of images, small ones enlarged without smoothing."""
    images = as_images(shown)
    if images[0].width <= 128:
        images = [image.resize((image.width * ENLARGED, image.height * ENLARGED), Image.Resampling.NEAREST) for image in images]
    return grid(images, columns)


def save_sheet(path: Path, *rows: Sequence[Shown], columns: int = 8) -> str:
    """Write `sheet` as a PNG; returns its path."""
    return str(save_png(sheet(rows, columns), path))


def spread(shown: Sequence[Shown], count: int) -> list[Shown]:
    """At most so many images, spread evenly."""
    return list(shown[:: max(1, len(shown) // count)][:count])


def as_images(shown: Sequence[Shown]) -> list[Image.Image]:
    """The pixels, which all of them have."""
    return to_pil(torch.stack([item.pixels for item in shown]).float() / 255) if shown else []
