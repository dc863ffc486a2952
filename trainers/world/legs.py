"""A stage of the embedded model's training runs in legs: each takes up where the last one ended."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def next_leg(work: Path, name: str) -> Iterator[tuple[int, Path]]:
    """Number and folder of a stage's next leg, or of the one that was interrupted: `work/name.run0`, `work/name.run1`, ...

    When the body ends without an exception, having written its result, the leg counts as finished and its checkpoints go.
    """
    leg = 0
    while (work / f"{name}.run{leg}" / "done").exists():
        leg += 1
    folder = work / f"{name}.run{leg}"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(leg)
    yield leg, folder
    (folder / "done").touch()
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
