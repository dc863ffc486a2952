"""What a metric is: a frozen configuration that measures images as they come, and says what it measured them with."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from eval.intervals import NOTHING, Estimate, mean
from toolkit.errors import UserError
from toolkit.options import Configured

BATCH = 64  # images measured at once


def accelerator() -> torch.device:
    """Where models that measure run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def package(name: str, extra: str) -> ModuleType:
    """An optional package. extra: what brings it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name} cannot be imported ({error}); run pip install 'palimpsest-diffusion[{extra}]'") from error


def load_function(written: str) -> Callable[..., Any]:
    """The function that MODULE:FUNCTION names; modules are looked for in the working folder as well. Failing is a UserError."""
    module, _, name = written.partition(":")
    sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"no function {written!r} ({error}); give MODULE:FUNCTION") from error
    finally:
        sys.path.remove("")


def version_of_file(path: Path) -> str:
    """A short hash of a file, for weights that are no module of torch's, and for code."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=6)).hexdigest()


@dataclass(frozen=True)
class Measured:
    """A metric's value with its interval, and what it was measured with.

    measured_by: model, version (of its weights), preprocessing and the metric's options. more: what else belongs to the value, for
    example the rates at other thresholds.
    """

    estimate: Estimate
    measured_by: dict[str, Any]
    more: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {**self.estimate.as_json(), **self.more, "measured_by": self.measured_by}


@dataclass(frozen=True)
class Metric(Configured, ABC):
    """A metric. One subclass per file; the file's stem is its name, the fields are its options.

    Images come in any number of `update`s, in any order and in several processes, whose metrics `merge` puts together. An image is
    its prompt and its seed: measured twice it counts once, and the images of a prompt are one cluster of the interval. What is kept
    of an image is a row of numbers, so a metric that was pickled (sent to another process) carries rows and options, no model.

    compares: what an image is compared with: "nothing", its "prompt", or "images", which are the same prompts and seeds drawn by the
    unedited model, or what the option `folder` holds where there is one. on_target: whether it is of what was erased and of the rest
    at once. paper: the arXiv id of where it comes from, "" for none.
    """

    compares: ClassVar[Literal["nothing", "prompt", "images"]]
    on_target: ClassVar[bool] = False
    paper: ClassVar[str] = ""

    @abstractmethod
    def measure(self, images: Tensor, prompts: Sequence[str], references: Tensor | None) -> Tensor:
        """One row [n, k] for each image; the first number is the image's score.

        images, references: [n, 3, h, w] in [0, 1], at most `BATCH` of them; references are there when the metric `needs_references`.
        """

    @abstractmethod
    def measured_by(self) -> dict[str, Any]:
        """Model, version, preprocessing, and the options that the value depends on."""

    def estimate(self, rows: Tensor, prompts: Sequence[str]) -> Estimate:
        """The value of all rows [n, k] and the prompts that they belong to."""
        return mean(rows[:, 0].tolist(), prompts)

    def more(self, rows: Tensor, prompts: Sequence[str]) -> dict[str, Any]:
        """What else is said beside the value."""
        return {}

    @property
    def needs_prompts(self) -> bool:
        """Whether `score` needs prompts."""
        return self.compares == "prompt"

    @property
    def needs_references(self) -> bool:
        """Whether `update` needs the images of the unedited model."""
        return self.compares == "images" and not getattr(self, "folder", "")

    @cached_property
    def kept(self) -> dict[tuple[str, int], Tensor]:
        """Prompt and seed -> the row of that image."""
        return {}

    def fresh(self) -> Self:
        """One of the same options that has measured nothing yet; a model that is loaded is shared."""
        made = dataclasses.replace(self)
        vars(made).update({name: value for name, value in vars(self).items() if name != "kept"})
        return made

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str] | None = None, references: Tensor | None = None) -> Tensor:
        """A number for each image [n], for whoever judges single images. Nothing is kept."""
        return self._rows(images, prompts, references)[:, 0]

    @torch.no_grad()
    def update(self, images: Tensor, prompts: Sequence[str], seeds: Sequence[int], references: Tensor | None = None) -> None:
        """Measure images [n, 3, h, w] in [0, 1]. references: of the same prompts and seeds, where they are compared with such."""
        keys = list(zip(prompts, seeds, strict=True))
        self.kept.update(zip(keys, self._rows(images, prompts, references), strict=True))

    def merge(self, other: Self) -> None:
        """Take over what another one of the same options has measured."""
        if type(self) is not type(other) or self.config() != other.config():
            raise ValueError(f"{self.name()} {self.config()} and {other.name()} {other.config()} measure different things")
        self.kept.update(other.kept)

    def compute(self) -> Measured:
        """The value so far. It does not depend on the order in which the images came."""
        keys = sorted(self.kept)
        if not keys:
            return Measured(NOTHING, self.measured_by())
        rows, prompts = torch.stack([self.kept[key] for key in keys]), [text for text, _ in keys]
        return Measured(self.estimate(rows, prompts), self.measured_by(), self.more(rows, prompts))

    def _rows(self, images: Tensor, prompts: Sequence[str] | None, references: Tensor | None) -> Tensor:
        """What `measure` says, asked in batches, on the CPU."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images are {tuple(images.shape)}, needs [n, 3, h, w]")
        if (prompts is None and self.needs_prompts) or (self.needs_references and references is None):
            raise ValueError(f"{self.name()} compares with {self.compares}, which were not given")
        texts = [""] * len(images) if prompts is None else list(prompts)
        if len(texts) != len(images) or (references is not None and len(references) != len(images)):
            raise ValueError(f"{len(images)} images, {len(texts)} prompts, references {references is not None and len(references)}")
        parts = []
        for i in range(0, len(images), BATCH):
            part = slice(i, i + BATCH)
            beside = references[part] if references is not None and self.needs_references else None
            parts.append(self.measure(images[part], texts[part], beside).cpu())
        return torch.cat(parts) if parts else torch.zeros(0, 1)

    def __getstate__(self) -> dict[str, Any]:
        """Options and rows; models are loaded again where they are needed."""
        return {**{item.name: getattr(self, item.name) for item in dataclasses.fields(self)}, "kept": self.kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
