"""Any classifier: a function of the user's."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.metrics.base import load_function, version_of_file
from eval.metrics.detector import Detector
from toolkit.errors import UserError
from toolkit.options import option


@dataclass(frozen=True)
class Classifier(Detector):
    """The share of images that a function gives at least the threshold.

    The function is given images [n, 3, h, w] in [0, 1] and gives n numbers.
    """

    function: str = option("", "MODULE:FUNCTION; the module may be in the folder that the command runs in")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.function:
            raise UserError(f"{self.name()} has no function; give --set {self.name()}.function=MODULE:FUNCTION")

    @cached_property
    def called(self) -> Any:
        return load_function(self.function)

    def measure(self, images: Tensor, prompts: Sequence[str], references: Tensor | None) -> Tensor:
        scores = torch.as_tensor(self.called(images), dtype=torch.float32)
        if scores.shape != (len(images),):
            raise UserError(f"{self.function} gave {tuple(scores.shape)} for {len(images)} images, needs one number each")
        return scores[:, None]

    def measured_by(self) -> dict[str, Any]:
        file = inspect.getsourcefile(self.called)
        return {"model": self.function, **({"version": version_of_file(Path(file))} if file else {}), **super().measured_by()}
