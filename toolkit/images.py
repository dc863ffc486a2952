"""Images out of the sampler: tensors to PIL, grids, PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from toolkit.runs import replacing


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """Pixels [n, 3, h, w] in [0, 1] -> n RGB images."""
    rows = (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(row) for row in rows]


def grid(images: Sequence[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """Images of one size, row by row, with `gap` white pixels between them."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * (width + gap), index // columns * (height + gap)))
    return sheet


def overlay(image: Image.Image, heat: Tensor, strength: float = 0.6) -> Image.Image:
    """A map [rows, columns] over an image without its colours: from black at the map's smallest value through red and yellow to white.

    strength: how much of what is seen is the map.
    """
    heat = heat.float().cpu()
    low, high = heat.min(), heat.max()
    large = F.interpolate(heat[None, None], (image.height, image.width), mode="bicubic")[0, 0].clamp(low, high)
    share = (large - low) / (high - low).clamp(min=1e-12)
    colours = (3 * share - torch.arange(3).view(3, 1, 1)).clamp(0, 1)  # red, then green, then blue
    return Image.blend(ImageOps.grayscale(image).convert("RGB"), to_pil(colours[None])[0], strength)


def save_png(image: Image.Image, path: str | Path) -> Path:
    """Write a PNG atomically."""
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")
    return Path(path)
