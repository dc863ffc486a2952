"""Pictures that strangers give: how many, how large, and what they really are is checked before one is decoded."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from toolkit.errors import UserError
from toolkit.images import save_png

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # by content; a file's name says nothing


@dataclass(frozen=True)
class Limits:
    """What is taken: files at once, bytes and pixels of each."""

    files: int = 50
    bytes: int = 20 * 2**20
    pixels: int = 40_000_000

    def enforce(self) -> None:
        """Make Pillow refuse larger pictures in this process, wherever it opens them."""
        Image.MAX_IMAGE_PIXELS = self.pixels
        warnings.simplefilter("error", Image.DecompressionBombWarning)


def check_image(path: Path, limits: Limits) -> None:
    """Whether a file is a picture within the limits, by its header alone. Anything else is a UserError."""
    size = path.stat().st_size
    if size > limits.bytes:
        raise UserError(f"picture {path.name} has {size / 2**20:.1f} MB, at most {limits.bytes / 2**20:.0f} are taken; give a smaller one")
    try:
        with Image.open(path, formats=FORMATS) as image:
            pixels = image.width * image.height
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        pixels = limits.pixels + 1
    except (OSError, ValueError, SyntaxError):
        raise UserError(f"{path.name} is no picture that is taken; give one of: {', '.join(FORMATS)}") from None
    if pixels > limits.pixels:
        raise UserError(f"picture {path.name} has more than {limits.pixels:,} pixels; give a smaller one")


def store_images(paths: Sequence[Path], folder: Path, limits: Limits) -> list[Path]:
    """Decode pictures and write them into a folder as 000.png, ...: RGB, upright, without anything else that their files held."""
    if not 0 < len(paths) <= limits.files:
        raise UserError(f"{len(paths)} pictures are given, from 1 to {limits.files} are taken; give so many")
    for path in paths:
        check_image(path, limits)
    folder.mkdir(parents=True, exist_ok=True)
    stored: list[Path] = []
    for number, path in enumerate(paths):
        try:
            with Image.open(path, formats=FORMATS) as image:
                upright = ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            for written in stored:
                written.unlink()
            raise UserError(f"picture {path.name} is damaged ({error}); give another") from None
        stored.append(save_png(upright, folder / f"{number:03d}.png"))
    return stored
