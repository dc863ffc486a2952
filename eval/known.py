"""What the project's own measurements say about a method: how long it took, what it left and kept, and with which options."""

from __future__ import annotations

import functools
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval import stored
from eval.experiment import read
from eval.intervals import Estimate, rate
from eval.rates import draws, object_right, relative
from toolkit import registry

EXPERIMENTS = Path(__file__).with_name("experiments")


@dataclass(frozen=True)
class Known:
    """tasks: how many were measured. seconds: median, of fitting. left: how often what was erased is drawn, asked by name; kept: how
    much of everything else is, relative to before. options: those that are not the method's defaults."""

    tasks: int
    seconds: float
    left: Estimate
    kept: Estimate
    options: dict[str, Any]


@functools.cache
def known(method: str) -> Known | None:
    """What `eval/results/` holds about erasing single objects of the embedded world with a method; None when nothing.

    Of several choices of options, those that were measured on the most objects.
    """
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(stored.RESULTS.glob(f"{method}-*.json"))]
    by_options: dict[str, list[dict[str, Any]]] = {}
    for cell in found:
        if "attack" not in cell and cell["method"] == method and _one_object(cell["task"]):
            by_options.setdefault(json.dumps(cell["config"], sort_keys=True), []).append(cell)
    if not by_options:
        return None
    cells = max(by_options.values(), key=len)
    named = [(cell["task"]["concepts"][0]["name"], stored.from_json(rows)) for cell in cells for rows in cell["images"].get("name", ())]
    kept = [stored.from_json(rows) for cell in cells for rows in cell["images"].get("kept", ())]
    before, after = [pair[0] for pair in kept], [pair[1] for pair in kept]
    defaults = registry.load("method", method)().config()
    return Known(
        len(cells),
        statistics.median(cell["seconds"] for cell in cells),
        rate([draws(shown, {name}) for name, (_, shown) in named], [shown.prompt.text for _, (_, shown) in named]),
        relative(before, after, object_right),
        {key: value for key, value in cells[0]["config"].items() if key in defaults and value != defaults[key]},
    )


def _one_object(task: dict[str, Any]) -> bool:
    concepts = task.get("concepts", ())
    return len(concepts) == 1 and concepts[0]["kind"] == "object"


@functools.cache
def chosen_to_learn(method: str) -> dict[str, Any]:
    """The options that were chosen for learning a subject on the embedded model with a method, where they are not its defaults."""
    found = read(EXPERIMENTS / "customize.toml").methods.get(method)
    return {name: value for name, value in found.config().items() if name in found.changed()} if found else {}
