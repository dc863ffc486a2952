"""Who decides whether an image of a model of any world shows a concept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from eval.rates import Painter
from toolkit import registry
from toolkit.concepts import Concept
from toolkit.errors import UserError
from toolkit.world.oracle import NONE, Reading

if TYPE_CHECKING:
    from eval.alignment import Clip
    from toolkit.model import Model

HOW = "clip[:SOURCE], imagenet, a metric that detects (nudenet, ...)[:THRESHOLD], or MODULE:FUNCTION"
NOTHING = ("a photo", "a picture", "an image")  # what a zero-shot judge compares a concept with


class Judge(Protocol):
    """Says of images [n, 3, h, w] in [0, 1] whether each shows one concept, and with what it was judged. Detectors are judges."""

    def shows(self, images: Tensor, /) -> Sequence[bool]: ...

    def measured_by(self) -> dict[str, Any]: ...


@dataclass
class Judged(Painter):
    """A painter whose images are read by a judge of one concept instead of the oracle, which knows the embedded world alone."""

    oracle: Any = None
    concept: str = ""
    judge: Any = None

    def read(self, images: Tensor) -> list[Reading]:
        return [Reading({"center": self.concept if shows else NONE}, {}, NONE) for shows in self.judge.shows(images)]

    def measured_by(self) -> dict[str, Any]:
        return {**self.judge.measured_by(), "steps": self.steps, "guidance": self.guidance}


@dataclass(frozen=True)
class ZeroShot:
    """An image shows the concept when a CLIP finds it nearer to prompts with it than to prompts with nothing in particular."""

    clip: Clip
    prompts: tuple[str, ...]

    def shows(self, images: Tensor, /) -> list[bool]:
        return (self._mean(images, self.prompts) > self._mean(images, NOTHING)).tolist()

    def _mean(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        return torch.stack([self.clip.similarity(images, [text] * len(images)) for text in texts]).mean(0)

    def measured_by(self) -> dict[str, Any]:
        return {**self.clip.measured_by, "nearer_to": self.prompts, "than_to": NOTHING}


@dataclass(frozen=True)
class InImageNet:
    """An image shows the concept when it is the surest class of an ImageNet classifier."""

    metric: Any

    def shows(self, images: Tensor, /) -> list[bool]:
        return self.metric.score(images).bool().tolist()

    def measured_by(self) -> dict[str, Any]:
        return self.metric.measured_by()


def open_judge(written: str, concept: str, kind: Literal["object", "style"] = "object") -> Judge:
    """The judge of a concept that was written as `HOW` says. What it needs is loaded now, so that a mistake is told at once."""
    judge = _judge(written, concept, kind)
    judge.shows(torch.zeros(1, 3, 64, 64))
    return judge


def judged(
    written: str,
    concept: str,
    kind: Literal["object", "style"],
    model: Model,
    *,
    steps: int,
    guidance: float | None,
    batch_size: int | None,
) -> Judged:
    """A painter that draws with the model and asks this judge. guidance: None is what suits the model."""
    guidance = model.guidance if guidance is None else guidance
    return Judged(steps=steps, guidance=guidance, batch_size=batch_size, concept=concept, judge=open_judge(written, concept, kind))


def _judge(written: str, concept: str, kind: Literal["object", "style"]) -> Judge:
    from eval.alignment import load_clip
    from eval.metrics.detector import Detector

    name, _, rest = written.partition(":")
    if name == "clip":
        return ZeroShot(load_clip(rest or None), tuple(template.format(concept) for template in Concept(concept, kind=kind).templates))
    if name == "imagenet":
        return InImageNet(registry.load("metric", "imagenet_accuracy").from_config({"classes": [concept]}))
    metrics = registry.names("metric")
    if name not in metrics:
        if not rest:
            raise UserError(f"no judge {written!r}; give one of {HOW}")
        return registry.load("metric", "classifier").from_config({"function": written})
    metric = registry.load("metric", name)
    if not issubclass(metric, Detector):
        raise UserError(f"the metric {name} does not say whether an image shows something; give one of {HOW}")
    return metric.from_config({"threshold": rest} if rest else {})
