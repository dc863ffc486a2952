"""Custom Diffusion's augmentation: subjects at other sizes than in their pictures, and prompts that say so."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.photos import load_masks, load_photos, to_latents
from trainers.subjects import Photos, Seen

SMALLER = 2 / 3  # how often a picture is made smaller; else it is enlarged
SMALL, LARGE = (1 / 3, 1.0), (1.2, 1.4)  # by how much
PASTED = 0.6  # below this a picture is pasted on black; above, the whole of it is used
FAR, NEAR = ("a far away ", "very small "), ("zoomed in ", "close up ")


class Scaled(Photos):
    """Pictures whose size is drawn anew for every sample (Kumari et al., arXiv 2212.04488, appendix C).

    Smaller ones are pasted on black, where the error counts only inside of them, less a margin of one place of the latent; of larger
    ones a part is cut out. So they are encoded at each use, whatever the cache.
    """

    def ready(self, rows: Sequence[int]) -> None:
        """Nothing: each is another size every time."""

    def at(self, row: int, prompt: str, draw: torch.Generator) -> Seen:
        factor, (high, wide) = _factor(draw), self.sizes[row]
        pixels = load_photos([self.paths[row]], self.sizes[row])
        mask = self._mask(row, pixels)
        if factor < PASTED:
            prompt = f"{_one_of(FAR, draw)}{prompt}"
            pixels, mask = self._pasted(pixels, mask, (round(factor * high), round(factor * wide)), draw)
        elif factor > 1:
            prompt = f"{_one_of(NEAR, draw)}{prompt}"
            pixels, mask = _cut(pixels, mask, (round(factor * high), round(factor * wide)), draw)
        latent = to_latents(self.arch, pixels)
        weight = F.interpolate(mask, latent.shape[-2:], mode="area").to(latent)
        return Seen(prompt, latent, weight / weight.mean() if self.method.mask_normalization == "mask" else weight)

    def _mask(self, row: int, pixels: Tensor) -> Tensor:
        """The picture's mask [1, 1, h, w]; without one it counts everywhere."""
        mask = self.masks[row]
        return torch.ones_like(pixels[:, :1]) if mask is None else load_masks([mask], [self.paths[row]], self.sizes[row])

    def _pasted(self, pixels: Tensor, mask: Tensor, size: tuple[int, int], draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """A picture at a smaller size, anywhere on black, and where the error counts."""
        top, left = (_number(full - small, draw) for full, small in zip(pixels.shape[2:], size, strict=True))
        bottom, right = top + size[0], left + size[1]
        canvas, counts = torch.full_like(pixels, -1), torch.zeros_like(mask)
        canvas[..., top:bottom, left:right] = _resized(pixels, size)
        rows, columns = (_inner(*side, self.arch.downscale) for side in ((top, bottom), (left, right)))
        counts[..., rows, columns] = 1
        placed = torch.zeros_like(mask)
        placed[..., top:bottom, left:right] = _resized(mask, size)
        return canvas, (counts * placed if (counts * placed).any() else placed)


def _factor(draw: torch.Generator) -> float:
    """How large a picture becomes."""
    low, high = SMALL if float(torch.rand((), generator=draw)) < SMALLER else LARGE
    return low + (high - low) * float(torch.rand((), generator=draw))


def _one_of(words: tuple[str, ...], draw: torch.Generator) -> str:
    return words[_number(len(words) - 1, draw)]


def _number(largest: int, draw: torch.Generator) -> int:
    """From 0 to this."""
    return int(torch.randint(largest + 1, (), generator=draw))


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(image, size, mode="bilinear", antialias=True).clamp(-1, 1)


def _cut(pixels: Tensor, mask: Tensor, size: tuple[int, int], draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """A part, of the picture's own size, of the picture at a larger size; the whole mask counts where the part shows none of it."""
    high, wide = pixels.shape[2:]
    top, left = _number(size[0] - high, draw), _number(size[1] - wide, draw)
    pixels, larger = (_resized(image, size)[..., top : top + high, left : left + wide] for image in (pixels, mask))
    return pixels, larger if larger.any() else torch.ones_like(larger)


def _inner(first: int, last: int, step: int) -> slice:
    """The pixels of the latent's places that are inside these and not at their margin."""
    return slice((math.ceil(first / step) + 1) * step, (last // step - 1) * step)
