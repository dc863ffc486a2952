"""Options: the fields of a frozen dataclass, converted from JSON or the command line and checked."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import typing
from collections.abc import Iterable
from typing import Any, Literal, Self

from toolkit.errors import UserError, unknown

MANY = 8  # values of an option that people are shown all of


def option(default: Any, help: str) -> Any:
    """A field with the line that the command line and the app show for it."""
    return dataclasses.field(default=default, metadata={"help": help})


class Configured:
    """Base of what is a frozen dataclass of options, one to a file: methods and attacks."""

    @classmethod
    def name(cls) -> str:
        """Its name: the stem of the file that defines it."""
        return cls.__module__.rpartition(".")[2]

    def config(self) -> dict[str, Any]:
        """The options as JSON values."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def changed(self, names: Iterable[str] | None = None) -> list[str]:
        """Those of its options, or of these, that are not at their defaults."""
        given = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default]  # type: ignore[arg-type]
        return given if names is None else [name for name in given if name in names]

    def at_least(self, least: float, *names: str) -> None:
        """A UserError for the first of these options that is smaller; None is none."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} is {value}, needs at least {least}; give a larger number")

    def more_than(self, bound: float, *names: str) -> None:
        """A UserError for the first of these options that is not larger; None is none."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not value > bound:
                raise UserError(f"{name} is {value}, needs more than {bound}; give a larger number")

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The one with these options. An unknown option or a value of the wrong type is an error."""
        types = typing.get_type_hints(cls)
        fields = {field.name: types[field.name] for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for key in config:
            if key not in fields:
                raise unknown(f"option of {cls.name()}", key, fields)
        return cls(**{key: _convert(cls.name(), key, value, fields[key]) for key, value in config.items()})


def written(value: Any) -> str:
    """An option's value as text that converts back: several with commas between, or as a JSON list where one of them has a comma."""
    if isinstance(value, list | tuple):
        texts = list(map(str, value))
        return json.dumps(texts) if any("," in text or text.startswith("[") for text in texts) else ",".join(texts)
    return "none" if value is None else str(value)


def shortened(value: Any) -> Any:
    """An option's value for people: of a long list the first, and how many more there are."""
    return f"{value[0]!r} and {len(value) - 1} more" if isinstance(value, list | tuple) and len(value) > MANY else value


def _several(owner: str, key: str, text: str) -> list[Any]:
    """The values of an option that takes several, as `written` writes them."""
    if not text.startswith("["):
        return text.split(",") if text else []
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(found := json.loads(text), list):
            return found
    raise UserError(f"option {key} of {owner} is {text[:80]!r}, which is no JSON list; write values with commas between, or such a list")


def _convert(owner: str, key: str, value: Any, kind: Any) -> Any:
    """`value` (a JSON value, or text from the command line) as the type of the option."""
    origin, choices = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in choices:
            raise unknown(f"value of {owner}.{key}", str(value), map(str, choices))
        return value
    if type(None) in choices:
        if value is None or value == "none":
            return None
        return _convert(owner, key, value, next(choice for choice in choices if choice is not type(None)))
    if origin is tuple:
        items = _several(owner, key, value) if isinstance(value, str) else value
        return tuple(_convert(owner, key, item, choices[0]) for item in items)
    if kind is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    with contextlib.suppress(TypeError, ValueError):
        fraction = kind is int and isinstance(value, float) and not value.is_integer()
        if kind in (int, float, str) and not isinstance(value, bool) and not fraction and kind(value) == kind(value):  # not NaN
            return kind(value)
    raise UserError(f"option {key} of {owner} is {value!r}, needs {getattr(kind, '__name__', kind)}; give such a value")
