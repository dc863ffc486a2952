"""How much faster two processes measure an experiment than one, each with one thread, and that they find the same.

    python -m benchmarks.processes [--objects 8] [--n 16] [--turns 2] [--out docs/performance.md]

Runs `palimpsest bench` on two closed forms for so many objects of the embedded model, in a folder of its own each time: one process, then
two that `torchrun` starts. Wall time, start and report included; the medians count. What the cells say is compared, without what it cost.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.page import in_turns, write_section
from toolkit.world.scenes import load_world

BAR = 1.6
COSTS = ("seconds", "peak_memory_mb")
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
EXPERIMENT = """n = {n}
steps = 7 # of which the project keeps no results, that would be found
[methods.uce]
[methods.rece]
[[sections]]
title = "objects"
objects = {objects}
"""
SECTION = """## Processes

Made by `python -m benchmarks.processes` on {cores} cores: `palimpsest bench` on two closed forms for {objects} objects, one thread for each
process, from the command to the report, {turns}.

| | seconds |
|---|---|
| one process | {one:.1f} |
| two that share the folder | {two:.1f} |
| two are | {ratio:.2f} times as fast (bar ≥ {bar}{missed}) |

The {cells} results are {same}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=8, help="objects that are erased, each by two methods (default %(default)s)")
    parser.add_argument("--n", type=int, default=16, help="images of each by its name (default %(default)s)")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--out", type=Path, help="the page whose section is written anew")
    args = parser.parse_args()
    took: dict[int, list[float]] = {1: [], 2: []}
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "experiment.toml"
        file.write_text(EXPERIMENT.format(n=args.n, objects=json.dumps(load_world().names("scored")[: args.objects])))
        for turn in range(args.turns):
            for processes, seconds in took.items():
                folder = Path(temporary) / f"{processes}-{turn}"
                seconds.append(run(file, folder, processes))
                found.append(results(folder))
                print(f"{processes} processes: {seconds[-1]:.1f} s, {len(found[-1])} results", flush=True)
    one, two = (statistics.median(seconds) for seconds in took.values())
    same = "the same in all runs" if all(each == found[0] for each in found) else "**not the same in all runs**"
    section = SECTION.format(
        cores=os.cpu_count(),
        objects=args.objects,
        turns=in_turns(args.turns),
        one=one,
        two=two,
        ratio=one / two,
        bar=BAR,
        missed="" if one / two >= BAR else ", **missed**",
        cells=len(found[0]),
        same=same,
    )
    print(section)
    if args.out:
        write_section(args.out, section)


def run(file: Path, folder: Path, processes: int) -> float:
    """Seconds of the command in so many processes."""
    words = ["-m", "toolkit", "bench", str(file), "--out", str(folder)]
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    began = time.perf_counter()
    subprocess.run([sys.executable, *(LAUNCH if processes > 1 else ()), *words], check=True, env=alone, capture_output=True)
    return time.perf_counter() - began


def results(folder: Path) -> dict[str, Any]:
    """What the cells' files say, without what it cost."""
    held = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json") if not path.name.startswith("unedited")}
    return {name: {key: value for key, value in own.items() if key not in COSTS} for name, own in held.items()}


if __name__ == "__main__":
    main()
