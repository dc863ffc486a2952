"""Options that erasers share, by what they train on: drawings of the frozen model, or pictures of the concept."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from toolkit.errors import UserError
from toolkit.method import option
from trainers.method import Trained

if TYPE_CHECKING:
    from toolkit.model import Model

DRAWING = ("n_images", "sampling_steps", "guidance")  # options of pictures that the model draws


@dataclass(frozen=True)
class TrainedEraser(Trained, ABC):
    """Base of the methods that erase by training."""

    kind: ClassVar = "erase"
    architectures: ClassVar = ("sd", "sdxl")


class Draws(Protocol):
    """A method whose options say how the model draws what it trains on."""

    @property
    def sampling_steps(self) -> int: ...
    @property
    def guidance(self) -> float | None: ...
    def draws_in_bf16(self, model: Model) -> bool: ...


def drawing_options(method: Draws, model: Model) -> dict[str, Any]:
    """What these say to the sampler."""
    return {"steps": method.sampling_steps, "guidance": method.guidance, "amp": method.draws_in_bf16(model)}


@dataclass(frozen=True)
class TrainedOnDrawings(TrainedEraser, ABC):
    """Base of those that train on what the frozen model draws of prompts."""

    trajectories: int = option(24, "drawings of the frozen model whose steps are trained on")
    sampling_steps: int = option(50, "steps of each of them")
    guidance: float = option(3.0, "guidance scale of the drawings")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "trajectories", "sampling_steps", "guidance")


@dataclass(frozen=True)
class Steered(TrainedOnDrawings, ABC):
    """Base of those that steer the concept's prediction, as ESD does.

    Targets take the frozen model's prediction without a prompt, which drawings have with guidance above 1 alone.
    """

    eta: float = option(1.0, "how far beyond the base the concept is steered away")
    weight_decay: float = option(0.0, "of the optimizer")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.more_than(1, "guidance")


@dataclass(frozen=True)
class TrainedOnPictures(TrainedEraser, ABC):
    """Base of those that train on pictures of the concept: a folder of the user's, or what the model draws itself."""

    images: str | None = option(None, "folder of pictures of the concept; none: the model draws them")
    n_images: int = option(10, "pictures that the model draws of each concept, without images")
    sampling_steps: int = option(20, "steps of each of them")
    guidance: float | None = option(None, "guidance scale of each of them; none is the model's own")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "n_images", "sampling_steps")
        given = self.changed(DRAWING)
        if self.images is not None and given:
            raise UserError(f"{', '.join(given)} given beside images, with which nothing is drawn; leave out one of the two")
