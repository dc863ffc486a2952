"""What metrics that look through a CLIP share."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from eval.metrics.base import Metric
from toolkit.options import option

if TYPE_CHECKING:
    from eval.alignment import Clip


@dataclass(frozen=True)
class ClipMetric(Metric, ABC):
    """A metric on the features of a CLIP."""

    clip: str | None = option(None, "metric-clip (the embedded world's own, the default), or what open_clip calls another")
    weights: str | None = option(None, "of a CLIP that is given by its architecture: a tag such as openai, or a file")

    @cached_property
    def encoders(self) -> Clip:
        from eval.alignment import load_clip

        return load_clip(self.clip, self.weights)

    def measured_by(self) -> dict[str, Any]:
        return self.encoders.measured_by
