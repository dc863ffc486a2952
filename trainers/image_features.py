"""What a CLIP sees in the pictures of a subject, and small networks that make something of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from toolkit.clip import clip_for
from toolkit.runs import seeded
from trainers.photos import load_photos

if TYPE_CHECKING:
    from toolkit.model import Model
    from trainers.subjects import Photos

CLIP = "whose features of the pictures are used: metric-clip, hf-hub:OWNER/NAME or local-dir:FOLDER; none: metric-clip for emoji-sd"


@torch.no_grad()
def features_of(model: Model, pictures: Photos, clip: str | None) -> Tensor:
    """Pooled features [pictures, d] of the pictures as they are cut, float32, on the model's device. clip: see `CLIP`."""
    return _encoded(clip_for(model, clip).encode_images, model, pictures)


@torch.no_grad()
def places_of(model: Model, pictures: Photos, clip: str | None) -> Tensor:
    """The same of each place of a picture, before the CLIP pools them [pictures, places, k]."""
    return _encoded(clip_for(model, clip).encode_places, model, pictures)


def _encoded(encode: Callable[[Tensor], Tensor], model: Model, pictures: Photos) -> Tensor:
    cut = [load_photos([path], size) for path, size in zip(pictures.paths, pictures.sizes, strict=True)]
    return torch.cat([encode((pixels + 1) / 2) for pixels in cut]).float().to(model.arch.device)


def two_layers(inputs: int, outputs: int, *key: str | int) -> nn.Sequential:
    """A perceptron with one hidden layer, as wide as its input; how it starts depends on the key."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded(*key).initial_seed())
        return nn.Sequential(nn.Linear(inputs, inputs), nn.ReLU(), nn.Linear(inputs, outputs))
