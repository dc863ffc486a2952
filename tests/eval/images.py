"""Images whose truth is known, in place of a model's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from eval.prompts import Prompt
from eval.rates import Painter, Shown
from toolkit.model import Model
from toolkit.sample import Hook
from toolkit.world.oracle import NONE, Reading
from toolkit.world.scenes import PLACES, load_world


def reading(objects: dict[str, str], style: str = "noto", background: str = "red") -> Reading:
    """What an image shows: place -> object, the rest empty."""
    return Reading(dict.fromkeys(PLACES, NONE) | objects, dict.fromkeys(objects, style), background)


def true_reading(prompt: Prompt) -> Reading:
    """What a perfect image of the prompt shows."""
    return reading(dict(prompt.scene.items), prompt.scene.style or "noto", prompt.scene.background)


def shown(prompt: Prompt, read: Reading | None = None) -> Shown:
    """An image of the prompt, perfect unless `read` says what it shows; its pixels are black."""
    return Shown(prompt, read or true_reading(prompt), torch.zeros(3, 64, 64, dtype=torch.uint8))


@dataclass
class Renderer(Painter):
    """A painter whose images are renders and whose readings are the truth, changed by `spoil` on edited models (or always)."""

    spoil: Callable[[Prompt], Reading | None] = lambda prompt: None
    always: bool = False
    painted: int = 0

    def _paint(self, model: Model, prompts: Sequence[Prompt], title: str, hooks: Sequence[Hook]) -> list[Shown]:
        self.painted += len(prompts)
        images = []
        for prompt in prompts:
            scene = replace(prompt.scene, style=prompt.scene.style or "noto")
            read = (self.spoil(prompt) if self.always or (model.edits and not hooks) else None) or true_reading(prompt)
            drawn = replace(scene, background=read.background, items=tuple(read.present().items()))
            pixels, _ = load_world().render(drawn, np.random.default_rng(prompt.seed))
            images.append(Shown(prompt, read, torch.from_numpy(pixels.copy()).permute(2, 0, 1)))
        return images
