"""What scores share that are made of accuracies: of the target, of its own domain, of the other domain."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from eval.intervals import Estimate, rate
from eval.metrics.base import Metric, load_function
from eval.metrics.names import named
from eval.rates import version
from toolkit.errors import UserError, unknown
from toolkit.options import option
from toolkit.world.scenes import load_world

Labels = tuple[set[str], set[str]]
"""What an image shows: its styles and its objects."""


@dataclass(frozen=True)
class Labelled(Metric, ABC):
    """A score of a model that has unlearnt one style or one object, on prompts that name a style, an object or both.

    The target's domain is its own (styles or objects), the other one the cross domain. A reader says what an image shows; with a
    reader of one's own, its labels are given too. An object or style is right when the image shows it.
    """

    target: str = option("", "the style or object that was unlearnt")
    reader: str = option("oracle", "oracle (the embedded world's), or MODULE:FUNCTION, images to (style, object) each")
    styles: tuple[str, ...] = option((), "names of all styles; none: the embedded world's")
    objects: tuple[str, ...] = option((), "names of all objects; none: the embedded world's")

    compares: ClassVar = "prompt"
    on_target: ClassVar = True

    def __post_init__(self) -> None:
        if not self.target:
            raise UserError(f"{self.name()} has no target; give --set {self.name()}.target=NAME, the style or object that was unlearnt")
        if self.reader != "oracle" and not (self.styles and self.objects):
            raise UserError(f"{self.name()} reads by {self.reader}, which may know other names than the world; give styles and objects")
        if self.target not in self.names[0] + self.names[1]:
            raise unknown("style or object", self.target, self.names[0] + self.names[1])

    @cached_property
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """All styles and all objects."""
        world = load_world()
        return self.styles or tuple(world.styles), self.objects or tuple(world.names("scored"))

    @cached_property
    def read(self) -> Callable[[Tensor], list[Labels]]:
        if self.reader == "oracle":
            from toolkit.world.oracle import load_oracle

            oracle = load_oracle()
            return lambda images: [(set(r.styles.values()), set(r.present().values())) for r in oracle.read(images)]
        function = load_function(self.reader)
        return lambda images: [({style}, {thing}) for style, thing in function(images)]

    def measure(self, images: Tensor, prompts: Sequence[str], references: Tensor | None) -> Tensor:
        """Whether the prompt names the target, whether its own domain is right, and the cross domain; NaN where it names none."""
        own = 0 if self.target in self.names[0] else 1
        rows = []
        for prompt, shown in zip(prompts, self.read(images), strict=True):
            asked = [named(prompt, names) for names in self.names]
            right = [float("nan") if name is None else float(name in found) for name, found in zip(asked, shown, strict=True)]
            rows.append([float(asked[own] == self.target), right[own], right[1 - own]])
        return torch.tensor(rows)

    def accuracies(self, rows: Tensor, prompts: Sequence[str]) -> dict[str, Estimate]:
        """Unlearning, in-domain retain and cross-domain retain accuracy."""
        target, own, cross = rows.T
        return {
            "unlearning_accuracy": _share(1 - own, target == 1, prompts),
            "in_domain_retain_accuracy": _share(own, target == 0, prompts),
            "cross_domain_retain_accuracy": _share(cross, target >= 0, prompts),
        }

    def more(self, rows: Tensor, prompts: Sequence[str]) -> dict[str, Any]:
        return {name: estimate.as_json() for name, estimate in self.accuracies(rows, prompts).items()}

    def measured_by(self) -> dict[str, Any]:
        said: dict[str, Any] = {"model": self.reader, "target": self.target}
        if self.reader == "oracle":
            from toolkit.world.oracle import load_oracle

            oracle = load_oracle()
            said |= {"version": version(oracle), "threshold": oracle.threshold}
        return said


def _share(outcomes: Tensor, among: Tensor, prompts: Sequence[str]) -> Estimate:
    """The share of true outcomes where they count and there are any."""
    kept = [i for i in torch.nonzero(among & ~outcomes.isnan()).flatten().tolist()]
    return rate([bool(outcomes[i]) for i in kept], [prompts[i] for i in kept])
