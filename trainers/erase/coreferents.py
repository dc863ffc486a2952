"""Coreferents and words to keep, with how certain they are, from a file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from toolkit.concepts import EraseTask
from toolkit.errors import UserError, unknown

CERTAINTY = {"very high": 1.0, "high": 0.8, "normal": 0.6, "low": 0.4, "very low": 0.2}
SHAPE = 'write {"CONCEPT": {"coreferents": {"WORD": CERTAINTY, ...}, "retain": ["WORD", ...]}}'


def with_coreferents(task: EraseTask, file: str) -> tuple[EraseTask, dict[str, float]]:
    """The task with what the file says of its concepts, and the certainty of each word that the file names.

    Its coreferents of a concept join the concept's synonyms, and the words that it retains join what the task preserves. A list of
    words is the same as a mapping that gives each of them the highest certainty. What the file says of other concepts is not used.
    """
    told = _read(Path(file))
    known = {name.casefold(): entry for name, entry in told.items()}
    found = [known.get(concept.name.casefold(), {}) for concept in task.concepts]
    if not any(found):
        raise unknown(f"concept in {file}", task.concepts[0].name, told)
    certainty: dict[str, float] = {}
    for words in (words for entry in found for words in entry.values()):
        for word, rated in words.items():
            if certainty.setdefault(word, rated) != rated:
                raise UserError(f"{file} gives {word!r} the certainties {certainty[word]} and {rated} in one task; give it one of them")
    concepts = (
        replace(concept, synonyms=_union(concept.synonyms, entry.get("coreferents", {})))
        for concept, entry in zip(task.concepts, found, strict=True)
    )
    retained = [word for entry in found for word in entry.get("retain", {})]
    return replace(task, concepts=tuple(concepts), preserve=_union(task.preserve, retained)), certainty


def _union(words: Iterable[str], more: Iterable[str]) -> tuple[str, ...]:
    """All of them in order, each once."""
    return tuple(dict.fromkeys([*words, *more]))


def _read(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Concept -> "coreferents" and "retain" -> word -> certainty."""
    try:
        told: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); {SHAPE}") from error
    if not isinstance(told, Mapping) or not all(isinstance(entry, Mapping) for entry in told.values()):
        raise UserError(f"{path} is not a JSON object of objects; {SHAPE}")
    return {name: {key: _words(path, key, words) for key, words in entry.items()} for name, entry in told.items()}


def _words(path: Path, key: str, words: Any) -> dict[str, float]:
    if key not in ("coreferents", "retain"):
        raise unknown(f"key in {path}", key, ("coreferents", "retain"))
    rated: Any = dict.fromkeys(words, 1.0) if isinstance(words, list) and all(isinstance(word, str) for word in words) else words
    if not isinstance(rated, Mapping) or not all(word.strip() for word in rated):
        raise UserError(f"{key} in {path} is {words!r}, needs words with their certainty, or a list of words; {SHAPE}")
    return {word: _certainty(path, word, value) for word, value in rated.items()}


def _certainty(path: Path, word: str, value: Any) -> float:
    if isinstance(value, str):
        if value.casefold() not in CERTAINTY:
            raise unknown(f"certainty of {word!r} in {path}", value, CERTAINTY)
        return CERTAINTY[value.casefold()]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"the certainty of {word!r} in {path} is {value!r}, needs a number above 0 or one of {', '.join(CERTAINTY)}")
    return float(value)
