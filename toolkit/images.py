"""Images out of the sampler: tensors to PIL, grids, PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
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


def save_png(image: Image.Image, path: str | Path) -> Path:
    """Write a PNG atomically."""
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")
    return Path(path)
