"""The one idea: a method is a frozen configuration that fits an edit to a model and a task."""

from __future__ import annotations

import dataclasses
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from toolkit.errors import UserError, unknown

if TYPE_CHECKING:
    from toolkit.concepts import Task
    from toolkit.edits.base import Edit
    from toolkit.model import Model

Score = Callable[["Model"], float]


def option(default: Any, help: str) -> Any:
    """A field of a method's configuration with the line that the command line and the app show for it."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Method(ABC):
    """A published method. One subclass per file; the file's stem is its name, the fields are its options.

    A subclass sets the class variables, declares its options with `option(default, help)`, and implements `fit` and
    `example_task`. Its docstring has the title, authors and arXiv id, and the sections Equation, Shapes, Defaults and
    Deviations.
    """

    kind: ClassVar[Literal["erase", "customize", "merge"]]
    architectures: ClassVar[tuple[str, ...]]
    paper: ClassVar[str]
    training_free: ClassVar[bool]

    @abstractmethod
    def fit(self, model: Model, task: Task, *, score: Score | None = None) -> Edit:
        """Fit an edit.

        model: the model to edit, with any edits it should build on already attached. It is left as it was found.
        task: what to do; a task of the wrong type is an error. score: a number for a model, higher is better, by which
        the method may choose among its own candidates.
        """

    @classmethod
    @abstractmethod
    def example_task(cls, model: Model) -> Task:
        """A task small enough for a test on a tiny random instance of the model's architecture."""

    @classmethod
    def name(cls) -> str:
        """The method's name: the stem of the file that defines it."""
        return cls.__module__.rpartition(".")[2]

    def config(self) -> dict[str, Any]:
        """The options as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The method with these options. An unknown option or a value of the wrong type is an error."""
        types = typing.get_type_hints(cls)
        fields = {field.name: types[field.name] for field in dataclasses.fields(cls)}
        for key in config:
            if key not in fields:
                raise unknown(f"option of {cls.name()}", key, fields)
        return cls(**{key: _convert(cls.name(), key, value, fields[key]) for key, value in config.items()})


def _convert(method: str, key: str, value: Any, kind: Any) -> Any:
    """`value` (a JSON value, or text from the command line) as the type of the option."""
    origin, choices = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in choices:
            raise unknown(f"value of {method}.{key}", str(value), map(str, choices))
        return value
    if type(None) in choices:
        if value is None or value == "none":
            return None
        return _convert(method, key, value, next(choice for choice in choices if choice is not type(None)))
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value
        return tuple(_convert(method, key, item, choices[0]) for item in items)
    if kind is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    try:
        fraction = kind is int and isinstance(value, float) and not value.is_integer()
        if kind in (int, float, str) and not isinstance(value, bool) and not fraction and kind(value) == kind(value):  # not NaN
            return kind(value)
    except (TypeError, ValueError):
        pass
    raise UserError(f"option {key} of {method} is {value!r}, needs {getattr(kind, '__name__', kind)}; give such a value")
