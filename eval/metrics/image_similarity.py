"""What metrics share that compare images with images by their features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from eval.metrics.base import Metric
from toolkit.options import option
from toolkit.pictures import pictures


@dataclass(frozen=True)
class ImageSimilarity(Metric, ABC):
    """The cosine of features of images.

    With a folder, the mean over its pictures, which is subject fidelity as DreamBooth has it (arXiv 2208.12242); without one, of an
    image and the one that the unedited model draws with the same prompt and seed.
    """

    folder: str = option("", "pictures to compare with; none: the images of the unedited model")

    compares: ClassVar = "images"

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Images [n, 3, h, w] in [0, 1] -> [n, d]."""

    @cached_property
    def given(self) -> Tensor:
        """Unit features of the folder's pictures [m, d], each encoded at its own size."""
        parts = [self.features(load(path)[None]) for path in pictures(self.folder)]
        return F.normalize(torch.cat(parts).float(), dim=-1)

    def measure(self, images: Tensor, prompts: Sequence[str], references: Tensor | None) -> Tensor:
        drawn = F.normalize(self.features(images).float(), dim=-1)
        if references is None:
            return (drawn @ self.given.T).mean(1, keepdim=True)
        return (drawn * F.normalize(self.features(references).float(), dim=-1)).sum(1, keepdim=True)

    def measured_by(self) -> dict[str, Any]:
        return {"compared_with": self.folder or "the unedited model, same prompts and seeds"}


def load(path: Path) -> Tensor:
    """A picture [3, h, w] in [0, 1]."""
    with Image.open(path) as image:
        return to_tensor(image.convert("RGB"))
