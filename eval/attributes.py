"""Which part of a concept's images shows each attribute, as a CLIP tells them apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice, product
from typing import TYPE_CHECKING

import torch

from eval.intervals import Estimate, rate
from toolkit.runs import progress
from toolkit.sample import sample

if TYPE_CHECKING:
    from eval.alignment import Clip
    from toolkit.concepts import Concept
    from toolkit.model import Model


@dataclass(frozen=True)
class AttributeCounter:
    """What a `DebiasTask` calls `classify`: draws a concept by its words alone and says which attribute every image is nearest to.

    An image is drawn from a template with one of the concept's words in it, each pair in turn, and shows the attribute whose
    prompt, the same template with the attribute in it, is the most similar one by the CLIP. Image i has the seed `seed` + i
    whatever the model, so that only the model's change moves the count.

    clip: gives the CLIP; called at every count. templates: with one `{}`; empty means the concept's own. n: images per concept.
    steps, guidance, batch_size: the sampler's.
    """

    clip: Callable[[], Clip]
    attributes: tuple[str, ...]
    templates: tuple[str, ...] = ()
    n: int = 32
    seed: int = 0
    steps: int = 20
    guidance: float | None = None
    batch_size: int | None = None

    def __call__(self, model: Model, concept: Concept) -> list[float]:
        """The parts, in the order of the attributes; they add up to 1."""
        return [estimate.value for estimate in self.rates(model, concept).values()]

    def rates(self, model: Model, concept: Concept) -> dict[str, Estimate]:
        """Attribute -> its part with its interval, clustered by prompt."""
        pairs = list(islice(cycle(product(self.templates or concept.templates, concept.words)), self.n))
        prompts = [template.replace("{}", word) for template, word in pairs]
        seeds = range(self.seed, self.seed + self.n)
        with progress(f"draw {concept.name}") as show:
            pixels = sample(model, prompts, seeds, steps=self.steps, guidance=self.guidance, batch_size=self.batch_size, progress=show)
        clip = self.clip()
        alike = [clip.similarity(pixels, [template.replace("{}", attribute) for template, _ in pairs]) for attribute in self.attributes]
        nearest = torch.stack(alike).argmax(0).tolist()
        return {name: rate([index == i for index in nearest], prompts) for i, name in enumerate(self.attributes)}
