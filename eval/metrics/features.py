"""What distances between two sets of images share: the features in which they are compared."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.metadata import version as version_of
from typing import Any, ClassVar

import torch
from torch import Tensor

from eval.metrics.base import Metric, accelerator, load_function, package
from eval.metrics.image_similarity import load
from eval.rates import version
from toolkit.errors import UserError
from toolkit.options import option
from toolkit.pictures import pictures

Extractor = Callable[[Tensor], Tensor]
"""Images [n, 3, h, w] in [0, 1] -> features [n, d]."""


@dataclass(frozen=True)
class FeatureDistance(Metric, ABC):
    """A distance between images and those of the unedited model with the same prompts and seeds, or the pictures of a folder.

    inception is torch-fidelity's network (arXiv 1512.00567, the weights that FID was made with), oracle the embedded world's, whose
    distances compare only with each other.
    """

    features: str = option("inception", "inception, oracle (the embedded world's), or MODULE:FUNCTION, images to features")
    weights: str = option("", "file of inception's weights; none: torch-fidelity downloads them")
    folder: str = option("", "pictures to compare with; none: the images of the unedited model")

    compares: ClassVar = "images"

    def __post_init__(self) -> None:
        if self.weights and self.features != "inception":
            raise UserError(f"weights {self.weights!r} are for inception, and the features are {self.features}; leave the weights out")

    @cached_property
    def extractor(self) -> tuple[Extractor, dict[str, Any]]:
        return load_extractor(self.features, self.weights)

    @cached_property
    def given(self) -> Tensor:
        """Features of the folder's pictures [m, d]."""
        extract, _ = self.extractor
        return torch.cat([extract(load(path)[None]) for path in pictures(self.folder)]).cpu()

    def measure(self, images: Tensor, prompts: Sequence[str], references: Tensor | None) -> Tensor:
        """The features of an image, and behind them those of what it is paired with."""
        extract, _ = self.extractor
        return torch.cat([extract(side).float() for side in (images, references) if side is not None], 1)

    def sides(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The features of the images and of what they are compared with."""
        if self.needs_references:
            drawn, beside = rows.chunk(2, dim=1)
            return drawn, beside
        return rows, self.given

    def score(self, images: Tensor, prompts: Sequence[str] | None = None, references: Tensor | None = None) -> Tensor:
        raise UserError(f"{self.name()} is of many images and says nothing of a single one; give another metric")

    def more(self, rows: Tensor, prompts: Sequence[str]) -> dict[str, Any]:
        drawn, beside = self.sides(rows)
        return {"n_compared_with": len(beside), "dimensions": drawn.shape[1]}

    def measured_by(self) -> dict[str, Any]:
        _, said = self.extractor
        return {**said, "compared_with": self.folder or "the unedited model, same prompts and seeds"}


@lru_cache(maxsize=2)
def load_extractor(name: str, weights: str) -> tuple[Extractor, dict[str, Any]]:
    """What gives features by this name, and what it says of itself."""
    if name == "inception":
        return _inception(weights)
    if name != "oracle":
        return load_function(name), {"model": name}
    from eval.fidelity import features
    from toolkit.world.oracle import load_oracle

    oracle = load_oracle()
    return lambda images: features(oracle, images), {"model": "oracle", "version": version(oracle)}


def _inception(weights: str) -> tuple[Extractor, dict[str, Any]]:
    extractors = package("torch_fidelity.feature_extractor_inceptionv3", "metrics")
    try:
        network = extractors.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], weights or None)
    except (OSError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"no weights of inception ({first}); download {extractors.URL_INCEPTION_V3} and set weights to the file") from error
    network.to(accelerator()).eval().requires_grad_(False)

    def extract(images: Tensor) -> Tensor:
        return network((images * 255).round().byte().to(accelerator()))[0]

    said = {"model": "inception-v3-compat 2048", "weights": weights or "default", "version": version(network)}
    return extract, {
        **said,
        "library": f"torch-fidelity {version_of('torch-fidelity')}",
        "preprocessing": "299 pixels as TensorFlow 1 resizes",
    }
