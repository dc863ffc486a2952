"""UnlearnCanvas: unlearning accuracy, and retain accuracy in the target's domain and in the other one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from eval.intervals import Estimate
from eval.metrics.labels import Labelled


@dataclass(frozen=True)
class UnlearnCanvas(Labelled):
    """UnlearnCanvas, Zhang et al., arXiv 2402.11846.

        UA   the share of the target's images that are not classified as the target
        IRA  the accuracy of the other concepts of its domain (styles for a style)
        CRA  the accuracy of the other domain (objects for a style), on all images

    The value is UA; the three stand beside it. As in the official code, CRA counts images whose prompt names the target too. That code
    takes the surest class of a classifier fine-tuned on the data set; the oracle here may also say that it sees none.
    """

    paper: ClassVar = "arXiv:2402.11846"

    def estimate(self, rows: Tensor, prompts: Sequence[str]) -> Estimate:
        return self.accuracies(rows, prompts)["unlearning_accuracy"]
