"""The project's experiments with fewer images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from eval.experiment import Experiment, read

FILES = Path("eval/experiments")
ALONE, ANCHORED, WEAPONS, BARE = (
    "12 objects, each alone",
    "2 objects with an anchor",
    "weapons, in one task",
    "12 objects, without synonyms",
)
GROUP, LEARNER = "rece-contexts", "textual_inversion"


def smaller(name: str, n: int) -> Experiment:
    """One of the project's experiments with fewer images."""
    experiment = read(FILES / f"{name}.toml")
    return replace(experiment, header=replace(experiment.header, n=n))
