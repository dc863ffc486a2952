"""What a step of an attack costs beside the denoiser's own forward and backward pass.

    python -m benchmarks.attacks [--attacks concept_inversion ...] [--n 8] [--out docs/performance.md]

The embedded model forgets the pistol by `uce` and is attacked. Every call of the denoiser that gradients flow through is noted with its
time; a step is from one to the next, so that everything between them counts: the words that are drawn, the text encoder, the optimizer,
the noise. The denoiser alone is then run on the same calls and as precisely, forward and backward with respect to the text. Both in time
of the processor, one process side by side; the medians of all steps, so that the few in which an attack looks at images are left out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.page import write_section
from eval.attacks.base import Scenario
from eval.prompts import resolve
from eval.rates import Painter
from toolkit import load_model, registry
from toolkit.concepts import Concept, EraseTask
from toolkit.world.oracle import load_oracle
from toolkit.world.scenes import load_world

if TYPE_CHECKING:
    from toolkit.arch.base import Architecture

BAR = 1.3
SEARCHES: dict[str, dict[str, Any]] = {
    "concept_inversion": {"max_train_steps": 40},
    "unlearn_diff_atk": {"timesteps": 2, "steps_per_timestep": 20},
    "p4d": {"steps": 40, "steps_per_look": 40},
}
SECTION = """## Attacks

Made by `python -m benchmarks.attacks`: emoji-sd without its pistol, {n} images, threads: {threads}; the medians of all steps, in time of
the processor. A step is from one call of the denoiser to the next; beside it the denoiser alone, forward and backward.

| attack | a step | the denoiser alone | |
|---|---|---|---|
{rows}
"""


@dataclass(frozen=True)
class Call:
    """A call of the denoiser with gradients: when, on what, and in which type autocast computed, None is none."""

    begun: float
    given: tuple[Any, ...]
    autocast: torch.dtype | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attacks", nargs="+", default=list(SEARCHES), choices=list(SEARCHES), help="default: %(default)s")
    parser.add_argument("--n", type=int, default=8, help="images (default %(default)s)")
    parser.add_argument("--out", type=Path, help="the page whose section is written anew")
    args = parser.parse_args()
    model, world = load_model("emoji-sd"), load_world()
    edit = registry.load("method", "uce")().fit(model, EraseTask((Concept("pistol"),), ("knife", "dog")))
    rows = []
    with model.attached(edit):
        painter = Painter(load_oracle(), steps=2)
        scenario = Scenario(world, painter, model, model.reference(), resolve(world, "pistol"), args.n)
        for name in args.attacks:
            with noting(model.arch) as calls:
                registry.load("attack", name).from_config(SEARCHES[name]).run(scenario)
            step = statistics.median(later.begun - sooner.begun for sooner, later in pairwise(calls))
            floor = statistics.median(alone(model.arch, call) for call in calls)
            missed = "" if step <= BAR * floor else ", **missed**"
            rows.append(f"| `{name}` | {1e3 * step:.0f} ms | {1e3 * floor:.0f} ms | {step / floor:.2f} times (bar ≤ {BAR}{missed}) |")
            print(rows[-1], flush=True)
    if args.out:
        write_section(args.out, SECTION.format(n=args.n, threads=torch.get_num_threads(), rows="\n".join(rows)))


@contextmanager
def noting(arch: Architecture) -> Iterator[list[Call]]:
    """Within the block the denoiser's calls are noted."""
    calls: list[Call] = []
    predict, device = arch.predict, arch.device.type

    def noted(*given: Any, **options: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            calls.append(Call(time.process_time(), given, autocast))
        return predict(*given, **options)

    arch.predict = noted
    try:
        yield calls
    finally:
        arch.predict = predict


def alone(arch: Architecture, call: Call) -> float:
    """The processor's time for a call of the denoiser, forward and backward."""
    x, t, text = call.given
    hidden = text.hidden.detach().requires_grad_()
    start = time.process_time()
    with torch.autocast(arch.device.type, call.autocast, enabled=call.autocast is not None):
        loss = arch.predict(x, t, replace(text, hidden=hidden)).float().square().mean()
    loss.backward()
    return time.process_time() - start


if __name__ == "__main__":
    main()
