"""The oracle: what an image of the world shows, place by place.

A small convolutional network trained on renders only. It looks at each of the seven places through its own window and says
which object is there, or `none` (empty, blurred, noisy, blended or half objects), in which style, and on which background.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from toolkit.world.scenes import ASSETS, BACKGROUNDS, PLACES, SIZE, load_world

NONE = "none"
WINDOW = 32  # pixels a side of what the network sees of a place
MARGIN = 8  # pixels of border added around the image so that windows stay inside


@dataclass(frozen=True)
class Reading:
    """What one image shows.

    objects: place -> object name, or "none"; each with at least the oracle's threshold. styles: place -> style, for places
    with an object. background: a colour name or "none".
    """

    objects: dict[str, str]
    styles: dict[str, str]
    background: str

    def present(self) -> dict[str, str]:
        """The places that show an object."""
        return {place: name for place, name in self.objects.items() if name != NONE}


def windows(pixels: Tensor) -> Tensor:
    """Pixels [n, 3, 64, 64] -> what each place shows [n, 7, 3, 32, 32]."""
    padded = F.pad(pixels, (MARGIN,) * 4, mode="replicate")
    views = []
    for x, y, side in PLACES.values():
        half = side // 2 + 4
        left, top = x + MARGIN - half, y + MARGIN - half
        view = padded[:, :, top : top + 2 * half, left : left + 2 * half]
        views.append(F.interpolate(view, (WINDOW, WINDOW), mode="bilinear", antialias=True, align_corners=False))
    return torch.stack(views, 1)


def block(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions, the first of stride 2."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.SiLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.SiLU(),
    )


class Oracle(nn.Module):
    """Classifier of windows (object, style) and of whole images (background)."""

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__()
        world = load_world()
        self.names: list[str] = [*world.things, NONE]
        self.styles: list[str] = list(world.styles)
        self.backgrounds: list[str] = [*BACKGROUNDS, NONE]
        self.threshold = threshold
        self.trunk = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.SiLU(), block(32, 64), block(64, 128), block(128, 224))
        self.object_head = nn.Linear(224, len(self.names))
        self.style_head = nn.Linear(224, len(self.styles))
        self.background_net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.SiLU(), nn.Conv2d(32, 32, 3, stride=2), nn.SiLU(), nn.Flatten())
        self.background_head = nn.Linear(32 * 6 * 6, len(self.backgrounds))

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """Windows [m, 3, 32, 32] in [-1, 1] -> object logits [m, names], style logits [m, styles]."""
        features = self.trunk(views).mean((2, 3))
        return self.object_head(features), self.style_head(features)

    def background(self, pixels: Tensor) -> Tensor:
        """Pixels [n, 3, 64, 64] in [-1, 1] -> background logits [n, backgrounds]."""
        return self.background_head(self.background_net(F.avg_pool2d(pixels, 4)))

    @torch.no_grad()
    def read(self, images: Tensor | Sequence[Image.Image]) -> list[Reading]:
        """What images show: a tensor [n, 3, h, w] in [0, 1] or PIL images of any size."""
        readings = []
        for pixels in as_pixels(images).split(256):
            pixels = pixels.to(self.object_head.weight.device)
            objects, styles = self(windows(pixels).flatten(0, 1))
            confidence, kind = objects.float().softmax(-1).max(-1)
            kind = torch.where(confidence >= self.threshold, kind, len(self.names) - 1).view(len(pixels), -1).tolist()
            style = styles.argmax(-1).view(len(pixels), -1).tolist()
            for k, s, b in zip(kind, style, self.background(pixels).argmax(-1).tolist(), strict=True):
                shown = {place: self.names[i] for place, i in zip(PLACES, k, strict=True)}
                drawn = {place: self.styles[i] for place, i in zip(PLACES, s, strict=True) if shown[place] != NONE}
                readings.append(Reading(shown, drawn, self.backgrounds[b]))
        return readings


def as_pixels(images: Tensor | Sequence[Image.Image]) -> Tensor:
    """Images as [n, 3, 64, 64] in [-1, 1]."""
    if not isinstance(images, Tensor):
        arrays = [np.asarray(image.convert("RGB").resize((SIZE, SIZE))) for image in images]
        images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
    if images.shape[-2:] != (SIZE, SIZE):
        images = F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
    return images.float() * 2 - 1


@lru_cache(maxsize=1)
def load_oracle() -> Oracle:
    """The oracle that ships with the project, on the CPU."""
    oracle = Oracle()
    oracle.load_state_dict({key: value.float() for key, value in load_file(ASSETS / "oracle.safetensors").items()})
    return oracle.eval().requires_grad_(False)
