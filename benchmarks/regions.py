"""What regions cost: one image with two, three and four of them beside a plain one, in one process.

    python -m benchmarks.regions [--turns 7] [--out docs/performance.md]

Every turn draws, one after the other, the plain image and one for each number of regions, with and without a learnt edit in each; a time
is everything from the prompts to the pixels, in one thread, and the medians count. The times of the processor are compared, which
other processes disturb less than those of the clock.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from benchmarks.page import write_section
from eval.regions_report import BOXES
from pipelines.attention.regional import Region, regional
from toolkit.edits.base import EditInfo
from toolkit.edits.low_rank import LowRank
from toolkit.model import Model, load_model
from toolkit.runs import seeded
from toolkit.sample import sample
from toolkit.world.captions import AT

BARS = {2: 0.10, 3: 0.15, 4: 0.20}  # of the time of a plain image
OBJECTS = {"top left": "dog", "top right": "cat", "bottom left": "bell", "bottom right": "shirt"}
TWO = {"left": "dog", "right": "cat"}
RANK, STEPS, GUIDANCE = 16, 20, 2.0
PROMPT = f"{', '.join(f'a {name} {AT[place][0]}' for place, name in OBJECTS.items())} on a red background"


def learnt(model: Model, seed: int) -> LowRank:
    """A change of the keys and values as learning a subject gives."""
    factors = {
        site: tuple(0.01 * torch.randn(*shape, generator=seeded("regions", seed, site, i)) for i, shape in enumerate(shapes))
        for site, layer in model.arch.text_linears().items()
        for shapes in [((layer.out_features, RANK), (RANK, layer.in_features))]
    }
    return LowRank.from_factors({site: (up, down) for site, (up, down) in factors.items()}, EditInfo("benchmark", base=model.fingerprint))


def regions(count: int, edits: list[LowRank]) -> list[Region]:
    """So many, with these edits or none."""
    inside = list(TWO.items() if count == 2 else OBJECTS.items())[:count]
    given = edits[:count] or [None] * count
    return [
        Region(f"a {name} {AT[place][0]} on a red background", box=BOXES[place], edit=edit)
        for (place, name), edit in zip(inside, given, strict=True)
    ]


def draw(model: Model, count: int, edits: list[LowRank]) -> tuple[float, float]:
    """Seconds of the processor and of the clock for one image; count 0 is a plain one."""
    busy, clock = time.process_time(), time.perf_counter()
    if count:
        with regional(model, regions(count, edits)) as acting:
            sample(model, [PROMPT], [0], steps=STEPS, guidance=GUIDANCE, hooks=[acting])
    else:
        sample(model, [PROMPT], [0], steps=STEPS, guidance=GUIDANCE)
    return time.process_time() - busy, time.perf_counter() - clock


def measure(turns: int) -> dict[tuple[int, bool], tuple[float, float]]:
    """(regions, with edits) -> the medians of both times."""
    model = load_model()
    edits = [learnt(model, seed) for seed in range(max(BARS))]
    cases = [(0, False), *((count, own) for own in (False, True) for count in BARS)]
    found: dict[tuple[int, bool], list[tuple[float, float]]] = {case: [] for case in cases}
    for turn in range(turns + 1):
        for case in cases:
            took = draw(model, case[0], edits if case[1] else [])
            if turn:  # the first one warms up
                found[case].append(took)
    return {case: (statistics.median(t[0] for t in took), statistics.median(t[1] for t in took)) for case, took in found.items()}


def section(medians: dict[tuple[int, bool], tuple[float, float]], turns: int) -> str:
    """What goes on the page."""
    plain = medians[0, False]
    lines = [
        "## Regions",
        "",
        f"Made by `python -m benchmarks.regions`: one image of emoji-sd in {STEPS} steps with guidance, one thread, float32,",
        f"in one process side by side; the medians of {turns} turns, in time of the processor. A plain image takes {plain[0]:.2f} s",
        f"({plain[1]:.2f} s by the clock). Learnt edits are of rank {RANK} in all keys and values, another one in each region;",
        "what it costs to attach them is counted.",
        "",
        "| regions | added, known objects | added, a learnt edit in each |",
        "|---|---|---|",
    ]
    for count, bar in BARS.items():
        known, own = (medians[count, edits][0] / plain[0] - 1 for edits in (False, True))
        missed = "" if known <= bar else ", **missed**"
        lines.append(f"| {count} | {100 * known:.0f} % (bar ≤ {100 * bar:.0f}{missed}) | {100 * own:.0f} % |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    made = section(measure(args.turns), args.turns)
    print(made)
    if args.out:
        write_section(args.out, made)


if __name__ == "__main__":
    main()
