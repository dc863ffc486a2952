"""Options as text: what is written converts back."""

from dataclasses import dataclass
from typing import Any

import pytest

from toolkit.errors import UserError
from toolkit.options import Configured, option, written


@dataclass(frozen=True)
class Example(Configured):
    words: tuple[str, ...] = option(("dog",), "several")
    numbers: tuple[int, ...] = option((1, 2), "several")
    scale: float | None = option(None, "one, or none")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("words", (), ""),
        ("words", ("a dog", "a house"), "a dog,a house"),
        ("words", ("a dog, red background",), '["a dog, red background"]'),
        ("words", ("[dog]", "cat"), '["[dog]", "cat"]'),
        ("numbers", (3, 4), "3,4"),
        ("scale", None, "none"),
        ("scale", 0.5, "0.5"),
    ],
)
def test_what_is_written_converts_back(name: str, value: Any, text: str) -> None:
    assert written(value) == text
    assert getattr(Example.from_config({name: text}), name) == value


def test_a_broken_list_is_refused() -> None:
    with pytest.raises(UserError, match="no JSON list"):
        Example.from_config({"words": '["a dog"'})
    with pytest.raises(UserError, match="needs int"):
        Example.from_config({"numbers": "[1.5]"})
