"""CLIPs by their names: the one that knows the embedded world, or any that open_clip loads."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from toolkit.errors import UserError
from toolkit.images import to_pil
from toolkit.world.oracle import as_pixels
from toolkit.world.scenes import ASSETS

if TYPE_CHECKING:
    from open_clip.model import CLIP

    from toolkit.model import Model

METRIC = "metric-clip"
METRIC_CLIP = ASSETS / METRIC
HUGE = "hf-hub:laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # for photographs, where one is to be named


@dataclass(frozen=True)
class ClipEncoders:
    """The two halves of a CLIP, each with its own preprocessing.

    encode_images: [n, 3, h, w] in [0, 1] -> [n, d]. encode_places: the same -> [n, places, k], what the last layer of the image half
    says of each place, before it is pooled. encode_text: n texts -> [n, d]. module: what has the weights. preprocessing: what is done
    to images, in words.
    """

    encode_images: Callable[[Tensor], Tensor]
    encode_places: Callable[[Tensor], Tensor]
    encode_text: Callable[[Sequence[str]], Tensor]
    module: Any
    preprocessing: str


@lru_cache(maxsize=1)
def load_metric_clip(folder: Path = METRIC_CLIP) -> ClipEncoders:
    """The CLIP that ships with the project. It knows the embedded world only; its seed is not the text encoder's."""
    from transformers import CLIPTokenizer

    if not (folder / "open_clip_config.json").is_file():
        raise UserError(f"no metric CLIP in {folder}; install the project with its assets, or give another CLIP")
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    clip = build_clip(config)
    clip.load_state_dict({name: value.float() for name, value in load_file(folder / "open_clip_model.safetensors").items()})
    return world_clip(clip, CLIPTokenizer.from_pretrained(folder))


def world_clip(clip: CLIP, tokenizer: Any) -> ClipEncoders:
    """An open_clip model of the embedded world with its tokenizer. Its images are 64 pixels in [-1, 1].

    Texts are cut at 77 tokens, as open_clip does.
    """
    clip.eval().requires_grad_(False)

    def text(texts: Sequence[str]) -> Tensor:
        ids = tokenizer(list(texts), padding="max_length", truncation=True, max_length=clip.context_length, return_tensors="pt")
        return clip.encode_text(ids["input_ids"])

    def image(images: Tensor) -> Tensor:
        return clip.encode_image(as_pixels(images))

    return ClipEncoders(image, lambda images: places(clip, as_pixels(images)), text, clip, "64 pixels bilinear, in [-1, 1]")


def load_open_clip(source: str, weights: str | None = None, device: str | torch.device = "cpu") -> ClipEncoders:
    """A CLIP by the name that open_clip gives it. Failing is a UserError.

    source: "hf-hub:owner/name" or "local-dir:/folder", or an architecture such as "ViT-L-14" with its weights: a tag of open_clip's
    ("openai") or a file.
    """
    import open_clip

    if ":" in source and weights:
        raise UserError(f"the CLIP {source!r} has its own weights, and {weights!r} was given too; leave the weights out")
    made: Any
    try:
        made = open_clip.create_model_from_pretrained(source, weights, device=device)
        tokenize = open_clip.get_tokenizer(source)
    except Exception as error:
        which = f"{source!r} with weights {weights!r}" if weights else repr(source)
        ways = "hf-hub:OWNER/NAME, local-dir:FOLDER, or an architecture of open_clip and its weights"
        raise UserError(f"cannot load the CLIP {which} ({error}); give {ways}") from error
    model, preprocess = made
    model.eval().requires_grad_(False)

    def prepared(pixels: Tensor) -> Tensor:
        return torch.stack([preprocess(image) for image in to_pil(pixels)]).to(device)

    def text(texts: Sequence[str]) -> Tensor:
        return model.encode_text(tokenize(list(texts)).to(device))

    said = ", ".join(f"{name} {value}" for name, value in open_clip.get_model_preprocess_cfg(model).items())
    return ClipEncoders(
        lambda pixels: model.encode_image(prepared(pixels)), lambda pixels: places(model, prepared(pixels)), text, model, said
    )


def clip_for(model: Model, source: str | None) -> ClipEncoders:
    """The CLIP of this name: "metric-clip" or one of open_clip. None is the former for the embedded model, else a UserError."""
    if source is None and model.source != "emoji-sd":
        what = f"no CLIP given, and {METRIC} may not know what {model.source} draws"
        raise UserError(f"{what}; set clip to {METRIC}, or to hf-hub:OWNER/NAME or local-dir:FOLDER such as {HUGE}")
    return load_metric_clip() if source in (None, METRIC) else load_open_clip(source)


def build_clip(config: dict[str, Any]) -> CLIP:
    """A fresh open_clip model."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = {**config["vision_cfg"], "layers": tuple(config["vision_cfg"]["layers"])}
    return CLIP(config["embed_dim"], CLIPVisionCfg(**vision), CLIPTextCfg(**config["text_cfg"]))


def places(clip: Any, pixels: Tensor) -> Tensor:
    """What the last layer of an open_clip model's image half says of each place [n, places, k], of pixels as it reads them."""
    made = clip.visual.forward_intermediates(pixels, indices=1, intermediates_only=True)
    return made["image_intermediates"][-1].flatten(2).transpose(1, 2)
