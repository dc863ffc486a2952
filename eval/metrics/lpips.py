"""LPIPS: how far images look from those of the unedited model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version as version_of
from typing import Any, ClassVar

import torchvision
from torch import Tensor, nn

from eval.metrics.base import Metric, accelerator, package
from eval.metrics.imagenet_accuracy import load_state
from eval.rates import version
from toolkit.errors import UserError
from toolkit.options import option


@dataclass(frozen=True)
class Lpips(Metric):
    """Learned Perceptual Image Patch Similarity, Zhang et al., arXiv 1801.03924, of an image and its counterpart by the unedited model.

    The package lpips (BSD-2-Clause) brings the heads; their network, AlexNet as erasure papers have it, is torchvision's. Images are
    compared at their own size.
    """

    weights: str = option("", "file of AlexNet's weights; none: torchvision downloads them")

    compares: ClassVar = "images"
    paper: ClassVar = "arXiv:1801.03924"

    def measure(self, images: Tensor, prompts: Sequence[str], references: Tensor | None) -> Tensor:
        assert references is not None
        network = load_lpips(self.weights)
        return network(images.to(accelerator()), references.to(accelerator()), normalize=True).view(len(images), 1)

    def measured_by(self) -> dict[str, Any]:
        network = load_lpips(self.weights)
        said = {"model": f"lpips {version_of('lpips')}, alex, heads 0.1", "weights": self.weights or "default"}
        return {**said, "version": version(network), "preprocessing": "own size, in [-1, 1]"}


@lru_cache(maxsize=1)
def load_lpips(weights: str) -> nn.Module:
    """The distance on AlexNet. Missing weights are a UserError."""
    made = package("lpips", "metrics").LPIPS(net="alex", pnet_rand=True, verbose=False)
    best = torchvision.models.AlexNet_Weights.DEFAULT
    try:
        given = load_state(weights) if weights else best.get_state_dict(progress=False, check_hash=True)
        # Its slices keep the places that the layers have in torchvision's `features`.
        layers = {name: given["features." + name.partition(".")[2]] for name in made.net.state_dict()}
        made.net.load_state_dict(layers)
    except (OSError, RuntimeError, KeyError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"no weights of AlexNet ({first}); download {best.url} and set weights to the file") from error
    return made.to(accelerator()).eval().requires_grad_(False)
