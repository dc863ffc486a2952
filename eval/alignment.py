"""How well images and prompts agree, by a CLIP: of the embedded world, or any that open_clip loads."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from eval.intervals import Estimate, mean, rate
from eval.rates import version
from toolkit.errors import UserError
from toolkit.images import to_pil
from toolkit.runs import seeded
from toolkit.world.captions import caption
from toolkit.world.oracle import as_pixels
from toolkit.world.scenes import ASSETS, World, random_scene

if TYPE_CHECKING:
    from open_clip.model import CLIP

METRIC_CLIP = ASSETS / "metric-clip"
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

    def clip_t(self, images: Tensor, texts: Sequence[str]) -> Estimate:
        """The mean cosine of images and their prompts, clustered by prompt."""
        return mean(self.similarity(images, texts).tolist(), texts)

    @torch.no_grad()
    def top1(self, images: Tensor, texts: Sequence[str], among: int = AMONG) -> Estimate:
        """How often an image's own text is the most similar of `among` (the texts of its group; the last may be smaller)."""
        right: list[bool] = []
        for i in range(0, len(texts), among):
            shown = F.normalize(self.encode_images(images[i : i + among]).float(), dim=-1)
            said = F.normalize(self.encode_text(texts[i : i + among]).float(), dim=-1)
            right += ((shown @ said.T).argmax(1) == torch.arange(len(shown))).tolist()
        return rate(right)


@lru_cache(maxsize=1)
def load_metric_clip(folder: Path = METRIC_CLIP) -> Clip:
    """The CLIP that ships with the project. It knows the embedded world only; its seed is not the text encoder's."""
    from transformers import CLIPTokenizer

    from trainers.world.clip import build_clip

    if not (folder / "open_clip_config.json").is_file():
        raise UserError(f"no metric CLIP in {folder}; install the project with its assets, or give another with --clip")
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    clip = build_clip(config)
    clip.load_state_dict({name: value.float() for name, value in load_file(folder / "open_clip_model.safetensors").items()})
    return world_clip(clip, CLIPTokenizer.from_pretrained(folder))


def world_clip(clip: CLIP, tokenizer: Any) -> Clip:
    """An open_clip model of the embedded world with its tokenizer. Its images are 64 pixels in [-1, 1].

    Texts are cut at 77 tokens, as open_clip does.
    """
    from trainers.world.clip import encode_text

    clip.eval().requires_grad_(False)

    def text(texts: Sequence[str]) -> Tensor:
        ids = tokenizer(list(texts), padding=True, truncation=True, max_length=clip.context_length, return_tensors="pt")["input_ids"]
        return encode_text(clip, ids)

    return Clip(lambda images: clip.encode_image(as_pixels(images)), text, {"model": "metric-clip", "version": version(clip)})


def load_open_clip(source: str) -> Clip:
    """A CLIP by the name that open_clip gives it, e.g. "hf-hub:owner/name" or "local-dir:/folder". Failing is a UserError."""
    import open_clip

    made: Any
    try:
        made = open_clip.create_model_from_pretrained(source)
        tokenize = open_clip.get_tokenizer(source)
    except Exception as error:
        raise UserError(f"cannot load the CLIP {source!r} ({error}); give hf-hub:OWNER/NAME or local-dir:FOLDER") from error
    model, preprocess = made
    model.eval().requires_grad_(False)

    def images(pixels: Tensor) -> Tensor:
        return model.encode_image(torch.stack([preprocess(image) for image in to_pil(pixels)]))

    def text(texts: Sequence[str]) -> Tensor:
        return model.encode_text(tokenize(list(texts)))

    return Clip(images, text, {"model": source, "library": f"open_clip {open_clip.__version__}", "version": version(model)})


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
