"""Stage "metric_clip": a second CLIP with another seed, which only measures alignment."""

from __future__ import annotations

from pathlib import Path

from trainers.world.clip import train_clip


def run(work: Path, steps: int | None) -> None:
    """Train and write `work/metric_clip`."""
    train_clip(work, "metric_clip", steps or 1000, seed=1)
