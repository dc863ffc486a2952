"""Which of some names a prompt holds."""

from __future__ import annotations

import re
from collections.abc import Iterable

LONGEST = 5  # words of a name


def named(prompt: str, names: Iterable[str]) -> str | None:
    """The longest of the names that the prompt holds as words, written together or apart, in any case; None when it holds none."""
    words = _words(prompt)
    spans = {"".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, min(i + LONGEST, len(words)) + 1)}
    held = [name for name in names if "".join(_words(name)) in spans]
    return max(held, key=len, default=None)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
