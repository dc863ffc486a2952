"""Coreferents and words to keep, with how certain they are: from a file, from the list that comes with the project, or from an LLM."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from toolkit.concepts import EraseTask
from toolkit.errors import UserError, unknown
from toolkit.runs import cache_folder, write_atomic

CERTAINTY = {"very high": 1.0, "high": 0.8, "normal": 0.6, "low": 0.4, "very low": 0.2}
SHAPE = 'write {"CONCEPT": {"coreferents": {"WORD": CERTAINTY, ...}, "retain": ["WORD", ...]}}'


BUILT_IN, LLM = "built-in", "llm"  # instead of a file
LIST = Path(__file__).with_name("coreferents.json")
VARIABLE = "PALIMPSEST_LLM"  # the command that asks one
ANSWER = f"the answer of {VARIABLE}"
REQUEST = """Concepts are to be erased from a text-to-image model: {concepts}.
For each of them list its coreferents, words and short phrases that make such a model draw the same thing (other names, descriptions,
parts of a name), with how certain you are that they do: {certainties}. List also what it should retain: words for things that are
close to the concept in meaning or in looks, and are something else.
Answer with JSON alone, like {{"CONCEPT": {{"coreferents": {{"WORD": CERTAINTY}}, "retain": ["WORD"]}}}}, about ten words in each list,
and the concepts spelt as above."""


def with_coreferents(task: EraseTask, source: str) -> tuple[EraseTask, dict[str, float]]:
    """The task with what the source says of its concepts, and the certainty of each word that the source names.

    source: a JSON file, "built-in", or "llm": the command in the environment variable PALIMPSEST_LLM, which is given the request on
    its standard input and writes such JSON. It is no option because options may come from other people.

    Its coreferents of a concept join the concept's synonyms, and the words that it retains join what the task preserves. A list of
    words is the same as a mapping that gives each of them the highest certainty. What is said of other concepts is not used.
    """
    told = _told(task, source)
    known = {name.casefold(): entry for name, entry in told.items()}
    found = [known.get(concept.name.casefold(), {}) for concept in task.concepts]
    if not any(found):
        raise unknown(f"concept in {source}", task.concepts[0].name, told)
    certainty: dict[str, float] = {}
    for words in (words for entry in found for words in entry.values()):
        for word, rated in words.items():
            if certainty.setdefault(word, rated) != rated:
                raise UserError(f"{source} gives {word!r} the certainties {certainty[word]} and {rated} in one task; give it one of them")
    concepts = (
        replace(concept, synonyms=_union(concept.synonyms, entry.get("coreferents", {})))
        for concept, entry in zip(task.concepts, found, strict=True)
    )
    retained = [word for entry in found for word in entry.get("retain", {})]
    return replace(task, concepts=tuple(concepts), preserve=_union(task.preserve, retained)), certainty


def _union(words: Iterable[str], more: Iterable[str]) -> tuple[str, ...]:
    """All of them in order, each once."""
    return tuple(dict.fromkeys([*words, *more]))


def _told(task: EraseTask, source: str) -> dict[str, dict[str, dict[str, float]]]:
    """Concept -> "coreferents" and "retain" -> word -> certainty."""
    if source == LLM:
        return _read(ANSWER, _answer([concept.name for concept in task.concepts]))
    path = LIST if source == BUILT_IN else Path(source)
    try:
        return _read(source, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}); {SHAPE}") from error


def _answer(concepts: list[str]) -> str:
    """What the LLM says of these concepts. It is asked once: a run that is resumed, or in several processes, has the same words."""
    command = os.environ.get(VARIABLE)
    if not command:
        raise UserError(f"coreferents llm needs the command of an LLM; set {VARIABLE}, e.g. to 'ollama run llama3', or give {BUILT_IN}")
    request = REQUEST.format(concepts=json.dumps(concepts), certainties=", ".join(CERTAINTY))
    key, folder = hashlib.blake2b(f"{command}\n{request}".encode(), digest_size=16).hexdigest(), cache_folder()
    if folder and (kept := folder / "answers" / f"{key}.txt").is_file():
        return kept.read_text(encoding="utf-8")
    try:
        made = subprocess.run(shlex.split(command), input=request, capture_output=True, text=True, check=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot run {VARIABLE} {command!r} ({error}); set it to a command that reads standard input") from error
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip().splitlines() or ["nothing"])[-1]
        raise UserError(f"{VARIABLE} {command!r} ended with {error.returncode} and said: {said}; run it by hand to see why") from error
    answer = _inner(made.stdout)
    _read(ANSWER, answer)  # what cannot be used is not kept
    if folder:
        (folder / "answers").mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "answers" / f"{key}.txt", answer)
    return answer


def _inner(answer: str) -> str:
    """From the first brace to the last: models like to say something before and after."""
    return answer[max(answer.find("{"), 0) : answer.rfind("}") + 1]


def _read(source: str, text: str) -> dict[str, dict[str, dict[str, float]]]:
    try:
        told: Any = json.loads(text)
    except ValueError as error:
        raise UserError(f"cannot read {source} ({error}); {SHAPE}") from error
    if not isinstance(told, Mapping) or not all(isinstance(entry, Mapping) for entry in told.values()):
        raise UserError(f"{source} is not a JSON object of objects; {SHAPE}")
    return {name: {key: _words(source, key, words) for key, words in entry.items()} for name, entry in told.items()}


def _words(source: str, key: str, words: Any) -> dict[str, float]:
    if key not in ("coreferents", "retain"):
        raise unknown(f"key in {source}", key, ("coreferents", "retain"))
    rated: Any = dict.fromkeys(words, 1.0) if isinstance(words, list) and all(isinstance(word, str) for word in words) else words
    if not isinstance(rated, Mapping) or not all(word.strip() for word in rated):
        raise UserError(f"{key} in {source} is {words!r}, needs words with their certainty, or a list of words; {SHAPE}")
    return {word: _certainty(source, word, value) for word, value in rated.items()}


def _certainty(source: str, word: str, value: Any) -> float:
    if isinstance(value, str):
        if value.casefold() not in CERTAINTY:
            raise unknown(f"certainty of {word!r} in {source}", value, CERTAINTY)
        return CERTAINTY[value.casefold()]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"the certainty of {word!r} in {source} is {value!r}, needs a number above 0 or one of {', '.join(CERTAINTY)}")
    return float(value)
