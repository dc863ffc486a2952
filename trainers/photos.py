"""A subject's pictures and masks as tensors, and as latents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from toolkit.errors import UserError

if TYPE_CHECKING:
    from toolkit.arch.base import Architecture

_BATCH = 8  # pictures per call of the image encoder


def load_photos(paths: Sequence[Path], size: int) -> Tensor:
    """Pictures [n, 3, size, size] in [-1, 1]: turned as EXIF says, transparency over white, the centre square.

    A file that is missing or no complete picture is a UserError.
    """
    squares = [ImageOps.fit(open_photo(path), (size, size), Image.Resampling.LANCZOS) for path in paths]
    return torch.stack([torch.from_numpy(np.array(square)) for square in squares]).permute(0, 3, 1, 2) / 127.5 - 1


def load_masks(paths: Sequence[Path], images: Sequence[Path], size: int) -> Tensor:
    """Masks [n, 1, size, size] in [0, 1], 1 on the subject, cut like their pictures.

    A mask of another size than its picture, or black everywhere in the part that is used, is a UserError.
    """
    masks = []
    for path, image in zip(paths, images, strict=True):
        mask, picture = open_photo(path).convert("L"), open_photo(image)
        if mask.size != picture.size:
            given, needed = "x".join(map(str, mask.size)), "x".join(map(str, picture.size))
            raise UserError(f"mask {path} is {given}, its picture {image} is {needed}; give a mask of the picture's size")
        square = np.array(ImageOps.fit(mask, (size, size), Image.Resampling.BOX))
        if not square.any():
            raise UserError(f"mask {path} is black everywhere in the centre square of {image}; paint the subject white")
        masks.append(torch.from_numpy(square)[None])
    return torch.stack(masks) / 255


def open_photo(path: Path) -> Image.Image:
    """One picture as RGB, turned as EXIF says, transparency over white."""
    if not Path(path).is_file():
        raise UserError(f"no picture file {path}; give files, for a folder toolkit.pictures.pictures(folder)")
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file).convert("RGBA")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read picture {path} ({error}); give a complete PNG, JPEG or WebP file") from error
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


@torch.no_grad()
def to_latents(arch: Architecture, pixels: Tensor) -> Tensor:
    """Pictures [n, 3, h, w] in [-1, 1] -> scaled latents [n, c, h', w'], float32, on the model's device."""
    latents = torch.cat([arch.encode_images(part.to(arch.device)).float() for part in pixels.split(_BATCH)])
    if not latents.isfinite().all():
        raise UserError(f"the image encoder gives values that are not finite in {arch.dtype}; load the model in float32 or bfloat16")
    return latents
