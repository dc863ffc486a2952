"""A subject's pictures and masks as tensors, and as latents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from toolkit.errors import UserError
from toolkit.pictures import open_mask, open_photo
from toolkit.runs import progress
from toolkit.sample import trajectory

if TYPE_CHECKING:
    from toolkit.arch.base import Architecture
    from toolkit.model import Model

_BATCH = 8  # pictures per call of the image encoder


Size = int | tuple[int, int]  # a side, or (height, width), in pixels


def load_photos(paths: Sequence[Path], size: Size) -> Tensor:
    """Pictures [n, 3, height, width] in [-1, 1]: turned as EXIF says, transparency over white, cut to the proportions about the centre.

    A file that is missing or no complete picture is a UserError.
    """
    cut = [ImageOps.fit(open_photo(path), _wide_and_high(size), Image.Resampling.LANCZOS) for path in paths]
    return torch.stack([torch.from_numpy(np.array(picture)) for picture in cut]).permute(0, 3, 1, 2) / 127.5 - 1


def bucket_of(path: Path, size: int, step: int) -> tuple[int, int]:
    """The (height, width) that a picture is cut to: multiples of `step`, of an area up to size x size, of at most twice the one as the
    other, and of these in proportions as near to the picture's as can be."""
    wide, high = open_photo(path).size
    heights = [height for height in range(step, 2 * size, step) if size * size // height >= step]
    sizes = [(height, size * size // height // step * step) for height in heights]
    able = [(height, width) for height, width in sizes if max(height, width) <= 2 * min(height, width)]
    return min(able, key=lambda one: (abs(math.log(one[0] * wide / (one[1] * high))), -one[0] * one[1]))


def load_masks(paths: Sequence[Path], images: Sequence[Path], size: Size) -> Tensor:
    """Masks [n, 1, height, width] in [0, 1], 1 on the subject, cut like their pictures.

    A mask of another size than its picture, or black everywhere in the part that is used, is a UserError.
    """
    masks = []
    for path, image in zip(paths, images, strict=True):
        mask = open_mask(path, image, open_photo(image).size)
        cut = np.array(ImageOps.fit(mask, _wide_and_high(size), Image.Resampling.BOX))
        if not cut.any():
            raise UserError(f"mask {path} is black everywhere in the part of {image} that is used; paint the subject white")
        masks.append(torch.from_numpy(cut)[None])
    return torch.stack(masks) / 255


def drawings(
    model: Model, prompts: Sequence[str], *, first_seed: int, steps: int, guidance: float | None, amp: bool, title: str = "pictures"
) -> Tensor:
    """Latents [n, c, h', w'] of what the model draws of these prompts, each with a seed of its own. amp: under bfloat16 autocast."""
    seeds = range(first_seed, first_seed + len(prompts))
    with progress(title) as show:
        return trajectory(model, prompts, seeds, steps=steps, guidance=guidance, progress=show, amp=amp)


def _wide_and_high(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[1], size[0])


@torch.no_grad()
def to_latents(arch: Architecture, pixels: Tensor) -> Tensor:
    """Pictures [n, 3, h, w] in [-1, 1] -> scaled latents [n, c, h', w'], float32, on the model's device."""
    latents = torch.cat([arch.encode_images(part.to(arch.device)).float() for part in pixels.split(_BATCH)])
    if not latents.isfinite().all():
        raise UserError(f"the image encoder gives values that are not finite in {arch.dtype}; load the model in float32 or bfloat16")
    return latents
