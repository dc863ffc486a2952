"""How much measuring images costs beside drawing them.

    python -m benchmarks.scoring [--n 64] [--steps 12] [--metrics clip_t clip_drift ...] [--repeats 5] [--out docs/performance.md]

Draws the same prompts of the embedded model in turns: plainly, in one batched call, and with every image scored after it. Both
are timed in one process side by side, in time of the processor, and the medians of the ratios within each turn are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.page import write_section
from toolkit import registry
from toolkit.model import load_model
from toolkit.sample import sample
from toolkit.world.scenes import load_world

if TYPE_CHECKING:
    from eval.metrics.base import Metric
    from toolkit.model import Model

BAR = 1.10
SECTION = """## Scoring

Made by `python -m benchmarks.scoring`: {n} images of emoji-sd in {steps} steps, one process side by side, threads: {threads}; the medians
of {repeats} turns, in time of the processor. Drawing alone takes {plain:.2f} s.

| metrics | drawing and scoring, in drawing alone |
|---|---|
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=64, help="images (default %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="denoising steps (default %(default)s)")
    parser.add_argument("--metrics", nargs="+", default=["clip_t", "unlearn_canvas", "nudenet"], help="each alone (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="the page whose section is written anew")
    args = parser.parse_args()
    options = {"unlearn_canvas": {"target": "pistol"}, "kid": {"features": "oracle"}, "fid": {"features": "oracle"}}
    metrics = {name: registry.load("metric", name).from_config(options.get(name, {})) for name in args.metrics}
    model, names = load_model("emoji-sd"), load_world().names("scored")
    asked = [f"a {names[i % len(names)]} on a red background" for i in range(args.n)]
    for metric in metrics.values():
        score(metric, torch.rand(2, 3, 64, 64), asked[:2])  # loads it

    drawing: list[float] = []
    ratios: dict[str, list[float]] = {name: [] for name in metrics}
    for _ in range(args.repeats):
        for name, metric in metrics.items():
            plain = seconds(model, asked, args.steps, None)
            scored = seconds(model, asked, args.steps, metric)
            drawing.append(plain)
            ratios[name].append(scored / plain)
            print(f"{name}: drawing {plain:.2f} s, with scoring {scored:.2f} s, {scored / plain:.3f} times")
    rows = []
    for name, found in ratios.items():
        median = statistics.median(found)
        rows.append(f"| `{name}` | {median:.3f} times (bar ≤ {BAR}{'' if median <= BAR else ', **missed**'}) |")
    print("\n".join(rows))
    if args.out:
        said = {"n": args.n, "steps": args.steps, "threads": torch.get_num_threads(), "repeats": args.repeats}
        write_section(args.out, SECTION.format(**said, plain=statistics.median(drawing), rows="\n".join(rows)))


def seconds(model: Model, asked: Sequence[str], steps: int, metric: Metric | None) -> float:
    """The processor's time for drawing the prompts, and for scoring them."""
    start = time.process_time()
    images = sample(model, asked, range(len(asked)), steps=steps)
    if metric is not None:
        score(metric, images, asked)
    return time.process_time() - start


def score(metric: Metric, images: torch.Tensor, asked: Sequence[str]) -> None:
    """A fresh pass over the images. What compares with other images is given the same ones."""
    fresh = metric.fresh()
    fresh.update(images, asked, range(len(asked)), images)
    fresh.compute()


if __name__ == "__main__":
    main()
