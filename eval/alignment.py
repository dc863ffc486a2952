"""How well images and prompts agree, by a CLIP: of the embedded world, or any that open_clip loads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.intervals import Estimate, rate
from eval.metrics.base import accelerator
from eval.rates import version
from toolkit import clip as clips
from toolkit.clip import METRIC_CLIP
from toolkit.errors import UserError
from toolkit.runs import seeded
from toolkit.world.captions import caption
from toolkit.world.scenes import World, random_scene

if TYPE_CHECKING:
    from open_clip.model import CLIP

AMONG = 64  # captions that one render is matched with


@dataclass(frozen=True)
class Clip:
    """Image and text features of one CLIP, unit length.

    encode_images: [n, 3, h, w] in [0, 1] -> [n, d]. encode_text: n texts -> [n, d]. measured_by: its name and version.
    """

    encode_images: Callable[[Tensor], Tensor]
    encode_text: Callable[[Sequence[str]], Tensor]
    measured_by: dict[str, Any]

    @torch.no_grad()
    def similarity(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """The cosine of every image and its text [n]."""
        features = torch.cat([F.normalize(self.encode_images(part).float(), dim=-1) for part in images.split(128)])
        unique = list(dict.fromkeys(texts))
        parts = [self.encode_text(unique[i : i + 256]) for i in range(0, len(unique), 256)]
        table = F.normalize(torch.cat(parts).float(), dim=-1)
        return (features * table[[unique.index(text) for text in texts]]).sum(-1)

    @torch.no_grad()
    def top1(self, images: Tensor, texts: Sequence[str], among: int = AMONG) -> Estimate:
        """How often an image's own text is the most similar of `among` (the texts of its group; the last may be smaller)."""
        right: list[bool] = []
        for i in range(0, len(texts), among):
            shown = F.normalize(self.encode_images(images[i : i + among]).float(), dim=-1)
            said = F.normalize(self.encode_text(texts[i : i + among]).float(), dim=-1)
            right += ((shown @ said.T).argmax(1).cpu() == torch.arange(len(shown))).tolist()
        return rate(right)


@lru_cache(maxsize=1)
def load_metric_clip(folder: Path = METRIC_CLIP) -> Clip:
    """The CLIP that ships with the project: see `toolkit.clip`."""
    return _measuring(clips.load_metric_clip(folder), model=clips.METRIC)


def world_clip(clip: CLIP, tokenizer: Any) -> Clip:
    """An open_clip model of the embedded world with its tokenizer: see `toolkit.clip`."""
    return _measuring(clips.world_clip(clip, tokenizer), model=clips.METRIC)


@lru_cache(maxsize=2)
def load_open_clip(source: str, weights: str | None = None) -> Clip:
    """A CLIP by the name that open_clip gives it: see `toolkit.clip`."""
    import open_clip

    loaded = clips.load_open_clip(source, weights, accelerator())
    return _measuring(loaded, model=source, **({"weights": weights} if weights else {}), library=f"open_clip {open_clip.__version__}")


def load_clip(source: str | None = None, weights: str | None = None) -> Clip:
    """The embedded world's own CLIP ("metric-clip", or None), or one of open_clip's."""
    if source not in (None, clips.METRIC):
        return load_open_clip(source, weights)
    if weights:
        raise UserError(
            f"{clips.METRIC} has its own weights, and {weights!r} was given; leave the weights out, or say which CLIP they are of"
        )
    return load_metric_clip()


def _measuring(encoders: clips.ClipEncoders, **said: str) -> Clip:
    measured_by = {**said, "version": version(encoders.module), "preprocessing": encoders.preprocessing}
    return Clip(encoders.encode_images, encoders.encode_text, measured_by)


def world_pairs(world: World, n: int, seed: int = 0) -> tuple[Tensor, list[str]]:
    """n renders [n, 3, 64, 64] in [0, 1] with full captions, distinct within every `AMONG`."""
    rng = np.random.default_rng(seeded("world pairs", seed).initial_seed())
    images, captions = [], []
    while len(captions) < n:
        scene = random_scene(world, world.names("scored"), rng)
        text = caption(world, scene, rng, full=True, synonyms=0.0)
        if text not in captions:
            images.append(world.render(scene, rng)[0])
            captions.append(text)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255, captions
