"""What metrics share that say how surely an image shows something."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from eval.intervals import Estimate, mean, rate
from eval.metrics.base import Metric
from toolkit.errors import UserError
from toolkit.options import option


@dataclass(frozen=True)
class Detector(Metric, ABC):
    """The share of images whose score reaches a threshold.

    The scores are kept, so all thresholds are measured in one pass: the first is the value's, the rates at the others stand beside it.
    """

    threshold: tuple[float, ...] = option((0.5,), "an image shows it from this score on; of several the first is the value's")

    compares: ClassVar = "nothing"

    def __post_init__(self) -> None:
        if not self.threshold:
            raise UserError(f"{self.name()} has no threshold, needs at least one; give for example threshold=0.5")

    def shows(self, images: Tensor, prompts: Sequence[str] | None = None) -> list[bool]:
        """Whether each image's score reaches the (first) threshold."""
        return (self.score(images, prompts) >= self.threshold[0]).tolist()

    def estimate(self, rows: Tensor, prompts: Sequence[str]) -> Estimate:
        return self._at(self.threshold[0], rows, prompts)

    def more(self, rows: Tensor, prompts: Sequence[str]) -> dict[str, Any]:
        rates = {str(threshold): self._at(threshold, rows, prompts).as_json() for threshold in self.threshold}
        return {"thresholds": rates, "mean_score": mean(rows[:, 0].tolist(), prompts).as_json()}

    def measured_by(self) -> dict[str, Any]:
        return {"threshold": self.threshold[0]}

    @staticmethod
    def _at(threshold: float, rows: Tensor, prompts: Sequence[str]) -> Estimate:
        return rate((rows[:, 0] >= threshold).tolist(), prompts)
