"""The one idea: a method is a frozen configuration that fits an edit to a model and a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from toolkit.errors import UserError
from toolkit.options import Configured, option

if TYPE_CHECKING:
    from toolkit.concepts import Task
    from toolkit.edits.base import Edit
    from toolkit.model import Model
    from toolkit.runs import TrainingRun

__all__ = ["Method", "Score", "TrainedMethod", "fit", "option"]

Score = Callable[["Model"], float]


@dataclass(frozen=True)
class Method(Configured, ABC):
    """A published method. One subclass per file; the file's stem is its name, the fields are its options.

    A subclass sets the class variables, declares its options with `option(default, help)`, and implements `fit` and
    `example_task`. Its docstring has the title, authors and arXiv id, and the sections Equation, Shapes, Defaults and
    Deviations.
    """

    kind: ClassVar[Literal["erase", "customize", "merge", "debias"]]
    architectures: ClassVar[tuple[str, ...]]
    paper: ClassVar[str]
    class_after: ClassVar[bool] = False  # whether captions must name a subject by its word and its class name
    training_free: ClassVar[bool]

    @abstractmethod
    def fit(self, model: Model, task: Task, *, score: Score | None = None) -> Edit:
        """Fit an edit.

        model: the model to edit, with any edits it should build on already attached. It is left as it was found.
        task: what to do; a task of the wrong type is an error. score: a number for a model, higher is better, by which
        the method may choose among its own candidates.
        """

    def needs(self) -> Literal["text", "all"]:
        """What of a model `fit` looks at without a `score`: "text" is the text encoders, and the weights of the layers that read what
        they give; then the rest may stay in its file. "all" runs the denoiser, or looks at other weights."""
        return "all"

    @classmethod
    @abstractmethod
    def example_task(cls, model: Model) -> Task:
        """A task small enough for a test on a tiny random instance of the model's architecture."""


class TrainedMethod(Method):
    """A method that takes gradient steps."""

    @abstractmethod
    def fit(self, model: Model, task: Task, *, score: Score | None = None, run: TrainingRun | None = None) -> Edit:
        """Fit an edit, see `Method.fit`. run: what is to be left behind meanwhile; None is nothing."""


def fit(method: Method, model: Model, task: Task, run: TrainingRun | None = None) -> Edit:
    """Fit any method. run: what one that trains leaves behind. An architecture that the method does not work on is a UserError."""
    if model.arch.name not in method.architectures:
        known = ", ".join(method.architectures)
        raise UserError(f"{method.name()} does not work on {model.arch.name} models, only on {known}; choose another method or model")
    return method.fit(model, task, run=run) if isinstance(method, TrainedMethod) else method.fit(model, task)
