"""How long streaming an edit into a checkpoint takes, next to copying that checkpoint, and how much memory it needs.

    python -m benchmarks.streaming FOLDER [--fraction 0.05] [--rank 20] [--repeats 5] [--check-base] [--out docs/performance.md]

Makes a random float16 checkpoint of the shapes of Stable Diffusion XL in one file (6.9 GB, or a fraction of it), and a random
low-rank edit of all its layers that read text. Then, in turns: `cp` and `sync` of the file, and `write_checkpoint`. Prints the
median times, their ratio within each turn, and the peak of resident memory over what the process had before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.page import write_section
from tests.toolkit.ldm import real_layout, real_shapes
from toolkit.arch.sdxl import SDXL
from toolkit.edits.base import EditInfo
from toolkit.edits.low_rank import LowRank
from toolkit.io.stream import write_checkpoint

SECTION = """## Streaming an edit into a checkpoint

Made by `python -m benchmarks.streaming FOLDER` (threads: {threads}): a random float16 file of {gigabytes:.1f} GB with the names and
shapes of Stable Diffusion XL, a rank {rank} edit of its {touched} layers that read text; the medians of {repeats} turns.

| | seconds | |
|---|---|---|
| `cp` and `sync` | {copy:.2f} | |
| `write_checkpoint`, fsync and rename included | {stream:.2f} | {ratio:.2f} times (bar ≤ 1.3{ratio_missed}) |

Resident memory at the peak is {peak:.0f} MB more than before, {all:.0f} MB with the interpreter and the libraries (bar ≤ 1 GB).
"""
CHUNK = np.random.default_rng(0).standard_normal(2**23, dtype=np.float32).astype(np.float16).tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write: the file, its copy and the edited one")
    parser.add_argument("--fraction", type=float, default=1.0, help="of the file's size and of the edit (default %(default)s)")
    parser.add_argument("--rank", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--check-base", action="store_true", help="with the look at what the edit was fitted on, which needs the whole file"
    )
    parser.add_argument("--out", type=Path, help="the page whose section is written anew")
    args = parser.parse_args()
    if args.check_base and args.fraction < 1:
        parser.error("--check-base looks at every tensor; leave --fraction out")
    args.folder.mkdir(parents=True, exist_ok=True)
    source, copied, edited = (args.folder / f"{name}.safetensors" for name in ("model", "copied", "edited"))
    edit = random_edit(write_model(source, args.fraction), args.rank, args.check_base)
    size, touched = source.stat().st_size, len(edit.parameter_names())
    print(f"file of {size / 1e9:.2f} GB, rank {args.rank} edit of {touched} layers")

    rows, before = [], memory("VmRSS")
    for _ in range(args.repeats):
        copy = timed(lambda: subprocess.run(["sh", "-c", 'cp "$0" "$1" && sync "$1"', source, copied], check=True), copied)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        stream = timed(lambda: write_checkpoint(source, edit, edited), edited)
        rows.append((copy, stream, stream / copy, memory("VmHWM") - before))
        print(f"cp + sync {copy:.2f} s, streaming {stream:.2f} s, {rows[-1][-1] / 1024:.0f} MB over {before / 1024:.0f} MB")
    copy, stream, ratio, peak = (statistics.median(column) for column in zip(*rows, strict=True))
    print(f"median: cp + sync {copy:.2f} s, streaming {stream:.2f} s, {ratio:.2f} times, {peak / 1024:.0f} MB")
    source.unlink()
    if args.out:
        threads = torch.get_num_threads()
        given = {"gigabytes": size / 1e9, "rank": args.rank, "touched": touched, "repeats": args.repeats, "threads": threads}
        measured = {"copy": copy, "stream": stream, "ratio": ratio, "peak": peak / 1024, "all": (peak + before) / 1024}
        write_section(args.out, SECTION.format(**given, **measured, ratio_missed="" if ratio <= 1.3 else ", **missed**"))


def write_model(path: Path, fraction: float) -> set[str]:
    """Write the random checkpoint. Returns the parameter names of the layers that read text which it holds."""
    shapes = real_shapes("sdxl")
    layout = real_layout("sdxl")
    names = [f"{site}.weight" for site in SDXL.hollow(layout.configs).text_linears()]
    slots = layout.slots(names[: round(fraction * len(names))])
    chosen, reading = ({slot.key for slot in each.values()} for each in (slots, layout.slots(names)))
    room = fraction * sum(map(numel, shapes.values())) - sum(numel(shapes[key]) for key in chosen)
    needed = [next(key for key in shapes if key.startswith(prefix)) for prefix in layout.prefixes.values()]
    for key in dict.fromkeys((*needed, *(key for key in shapes if key not in reading))):
        if key in needed or numel(shapes[key]) <= room:
            chosen.add(key)
            room -= numel(shapes[key])
    end, header = 0, {}
    for key in (key for key in shapes if key in chosen):
        begin, end = end, end + 2 * numel(shapes[key])
        header[key] = {"dtype": "F16", "shape": shapes[key], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for begin in range(0, end, len(CHUNK)):
            file.write(CHUNK[: end - begin])
    return set(slots)


def random_edit(names: set[str], rank: int, based: bool) -> LowRank:
    """A low-rank edit of these layers of Stable Diffusion XL."""
    layers = SDXL.hollow(real_layout("sdxl").configs).text_linears()
    down = torch.randn(rank, 2048) / 45
    factors = {site: (torch.randn(layer.out_features, rank) / 45, down) for site, layer in layers.items() if f"{site}.weight" in names}
    warnings.simplefilter("ignore")  # it was fitted on nothing
    return LowRank.from_factors(factors, EditInfo(base={"architecture": "sdxl"} if based else {}))


def timed(work: Callable[[], object], made: Path) -> float:
    """Seconds that the work takes, with nothing left to write before it; what it made is removed."""
    os.sync()
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    made.unlink()
    return seconds


def memory(what: str) -> int:
    """A line of /proc/self/status, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(what)))


def numel(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


if __name__ == "__main__":
    main()
