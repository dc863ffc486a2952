"""How long closed-form edits take, beside a loop that is written as the papers' codes are, on random weights of real shapes.

    python -m benchmarks.closed_form [--case NAME ...] [--repeat N] [--out docs/performance.md]

All of it in one run, so that only ratios matter. The reference follows the structure of the official codes of UCE and RECE
(per layer: sums over prompts of outer products that are materialised row by row, and one inverse), in float32 as there.
Where it would take hours it is timed on one layer of every width and on a few prompts, and multiplied; the page says so.
Text encoding is timed apart, on a random text encoder of CLIP-L's shape; the reference repeats it for every layer.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.page import write_section
from pipelines.closed_form.edit import as_edit
from pipelines.closed_form.rece import RECE
from pipelines.closed_form.rows import Placed, TaskRows
from pipelines.closed_form.uce import UCE
from toolkit.arch.text import Stream
from toolkit.edits.base import EditInfo
from toolkit.solve import closed_form, second_moment

# How many key and value projections there are of each width: [out, in] -> number.
SD1 = {(320, 768): 10, (640, 768): 10, (1280, 768): 12}
SDXL = {(640, 2048): 20, (1280, 2048): 120}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
TOKENS, TEMPLATES, CAPTIONS = 77, 5, 1000
SAMPLED = 3  # prompts that the reference is timed on for each layer, where there are more


@dataclass
class Shaped:
    """What the solver sees of a model: layers of real shapes with random weights, which read one stream of rows."""

    shapes: dict[tuple[int, int], int]
    linears: dict[str, nn.Linear] = field(init=False)

    def __post_init__(self) -> None:
        each = [shape for shape, count in self.shapes.items() for _ in range(count)]
        self.linears = {f"denoiser.{i}": linear(*shape) for i, shape in enumerate(each)}
        streams = {"hidden": Stream(self.linears, lambda text: ())}
        arch = SimpleNamespace(text_streams=lambda: streams, text_readers=dict, encoder_readers=dict)
        self.model: Any = SimpleNamespace(arch=arch, info=lambda *_, **__: EditInfo())

    @property
    def width(self) -> int:
        return next(iter(self.shapes))[1]

    @property
    def numbers(self) -> int:
        """How many weights there are."""
        return sum(out * width * count for (out, width), count in self.shapes.items())

    def per_width(self) -> Iterator[tuple[Tensor, int]]:
        """One layer of each shape, and how many there are."""
        for shape, count in self.shapes.items():
            yield next(each.weight for each in self.linears.values() if each.weight.shape == shape), count


def linear(out: int, width: int) -> nn.Linear:
    """A random layer; values as in a trained one, so that nothing underflows."""
    layer = nn.Linear(width, out, bias=False).requires_grad_(False)
    layer.weight.normal_(0, width**-0.5)
    return layer


def text(count: int, width: int) -> Tensor:
    """Rows as a CLIP text encoder gives them: of norm about 28, with a strong direction that all have."""
    rows = torch.randn(count, width)
    rows[:, 0] += 20
    return rows


# --- the papers' loops ------------------------------------------------------------------------------------------------
def reference_projections(shaped: Shaped, target: Tensor) -> None:
    """What RECE's loop computes inside every layer's turn: the target's values in all layers, of which it uses one."""
    for layer in shaped.linears.values():
        target @ layer.weight.T


def reference_sums(weight: Tensor, source: Sequence[Tensor], target: Sequence[Tensor], keep: Sequence[Tensor], lamb: float) -> None:
    """One layer: a list of prompts' rows at a time, outer products materialised and summed, one inverse."""
    left, right = lamb * weight, lamb * torch.eye(weight.shape[1])
    for context, goal in zip((*source, *keep), (*target, *keep), strict=True):
        values = (goal @ weight.T).unsqueeze(2)
        columns, rows = context.unsqueeze(2), context.unsqueeze(1)
        left = left + (values @ rows).sum(0)
        right = right + (columns @ rows).sum(0)
    left @ torch.inverse(right)


def reference(shaped: Shaped, source: Sequence[Tensor], target: Sequence[Tensor], keep: Sequence[Tensor], lamb: float = 0.5) -> float:
    """Seconds of the loop over all layers, from one layer of each width and a few prompts where there are more."""
    few, kept = source[:SAMPLED], keep[:SAMPLED]
    total = 0.0
    for weight, count in shaped.per_width():
        inverse = timed(partial(reference_sums, weight, (), (), (), lamb), 1)
        moving = timed(partial(reference_sums, weight, few, target[:SAMPLED], (), lamb), 1) - inverse
        keeping = timed(partial(reference_sums, weight, (), (), kept, lamb), 1) - inverse
        total += count * (inverse + moving * len(source) / len(few) + keeping * len(keep) / len(kept))
    return total


def reference_rece(shaped: Shaped, source: Tensor, target: Tensor, epochs: int) -> float:
    """Seconds: in each epoch the adversarial rows from sums over all layers, then the loop above."""

    def derive() -> None:
        width = shaped.width
        system, mixed = 0.1 * torch.eye(width), torch.zeros(width, width)
        for layer in shaped.linears.values():
            system = system + layer.weight.T @ layer.weight
            mixed = mixed + layer.weight.T @ layer.weight
        torch.inverse(system) @ mixed @ source.T

    projections = len(shaped.linears) * timed(lambda: reference_projections(shaped, target), 1)
    uce = projections + reference(shaped, [source], [target], [target])
    return uce + epochs * (timed(derive, 1) + projections + reference(shaped, [source], [target], [target], 0.1))


# --- ours -------------------------------------------------------------------------------------------------------------
def solve_and_factor(shaped: Shaped, source: Tensor, target: Tensor, keep: Tensor, prior: Tensor | None = None) -> None:
    """What `uce` does after its prompts are encoded."""
    change = closed_form(source, target, keep, preserve_scale=0.1, lamb=0.5, prior=prior)
    as_edit(shaped.model, UCE(), {"hidden": change})


def rece(shaped: Shaped, source: Tensor, target: Tensor, epochs: int) -> None:
    """What `rece` does after its prompts are encoded: one prompt of 77 tokens towards the empty one."""
    method = RECE(epochs=epochs)
    empty = Placed(target, 1, 1, ids=(0, 1))
    rows = TaskRows(((Placed(source, 5, 6, ids=tuple(range(7))), empty),), (), (empty,))
    as_edit(shaped.model, method, {"hidden": method.epochs_of(rows, shaped.linears)[-1]})


# --- measuring --------------------------------------------------------------------------------------------------------
def timed(run: Callable[[], object], repeat: int) -> float:
    """The median of the seconds that a call takes."""
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def one_pass(shaped: Shaped, repeat: int) -> float:
    """Seconds to read and write all touched weights once."""
    weights = [layer.weight for layer in shaped.linears.values()]
    copies = [weight.clone() for weight in weights]
    return timed(lambda: [copy.copy_(weight) for copy, weight in zip(copies, weights, strict=True)], max(repeat, 5))


def gemm(dtype: torch.dtype, size: int = 1536) -> float:
    """Floating-point operations per second of a square product."""
    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    return 2 * size**3 / timed(lambda: a @ b, 5)


@torch.no_grad()
def encoding(prompts: int = 8) -> float:
    """Seconds for one prompt in a text encoder of CLIP-L's shape."""
    encoder = CLIPTextModel(CLIPTextConfig(**CLIP_L)).eval()
    ids = torch.randint(1000, (prompts, TOKENS))
    return timed(lambda: encoder(ids), 3) / prompts


@dataclass(frozen=True)
class Result:
    """A case: seconds of ours and of the reference, of one pass over the weights, and the bars."""

    name: str
    ours: float
    one_pass: float
    flops: float  # in float64, that the method cannot do without
    reference: float | None = None
    passes_at_most: float | None = None
    faster_at_least: float | None = None

    def row(self, rate: float) -> list[str]:
        """The cells of the table. rate: float64 operations per second."""
        passes, faster = self.ours / self.one_pass, self.reference / self.ours if self.reference else None
        floor = max(self.one_pass / 2, self.flops / rate)
        return [
            self.name,
            f"{self.ours * 1000:,.0f} ms",
            _against(f"{passes:.1f}", self.passes_at_most, passes, below=True),
            "" if faster is None else _against(f"{faster:,.0f}", self.faster_at_least, faster, below=False),
            f"{self.ours / floor:.1f}",
        ]


def _against(text: str, bar: float | None, value: float, *, below: bool) -> str:
    if bar is None:
        return text
    met = value <= bar if below else value >= bar
    return f"{text} (bar {'≤' if below else '≥'} {bar:g}{'' if met else ', **missed**'})"


# --- cases ------------------------------------------------------------------------------------------------------------
def one_row(repeat: int) -> Result:
    shaped = Shaped(SD1)
    source, target, keep = (text(count, shaped.width) for count in (1, 1, TOKENS))
    return Result(
        "SD 1.4, 1 concept, 1 row",
        timed(lambda: solve_and_factor(shaped, source, target, keep), repeat),
        one_pass(shaped, repeat),
        2.0 * shaped.numbers,
        reference(shaped, [source], [target], [keep]),
        passes_at_most=5,
        faster_at_least=50,
    )


def with_prior(concepts: int, repeat: int) -> Result:
    """All rows of five templates; the prior's moment of 1,000 captions is computed anew each time."""
    shaped = Shaped(SD1)
    rows = concepts * TEMPLATES * (TOKENS - 1)
    source, target, captions = (text(count, shaped.width) for count in (rows, rows, CAPTIONS * TOKENS))
    return Result(
        f"SD 1.4, {concepts:,} concepts, all rows, prior of {CAPTIONS:,} captions",
        timed(lambda: solve_and_factor(shaped, source, target, captions[:TOKENS], 0.1 * second_moment(captions)), repeat),
        one_pass(shaped, repeat),
        shaped.width**2 * (3.0 * rows + len(captions)) + 2.0 * shaped.numbers * shaped.width,  # of second moments one triangle
        reference(shaped, source.split(TOKENS - 1), target.split(TOKENS - 1), captions.split(TOKENS)),
        faster_at_least=20,
    )


def hundred(repeat: int) -> Result:
    return with_prior(100, repeat)


def thousand(repeat: int) -> Result:
    return with_prior(1000, 1)


def rece_epochs(repeat: int) -> Result:
    shaped = Shaped(SD1)
    source, target = text(TOKENS, shaped.width), text(TOKENS, shaped.width)
    return Result(
        "SD 1.4, `rece`, 77 rows, 3 epochs",
        timed(lambda: rece(shaped, source, target, 3), repeat),
        one_pass(shaped, repeat),
        2.0 * shaped.numbers * shaped.width,
        reference_rece(shaped, source, target, 3),
        faster_at_least=50,
    )


def sdxl(repeat: int) -> Result:
    shaped = Shaped(SDXL)
    source, target, keep = (text(count, shaped.width) for count in (10, 10, TOKENS))
    return Result(
        "SDXL, 10 concepts, 1 row each",
        timed(lambda: solve_and_factor(shaped, source, target, keep), repeat),
        one_pass(shaped, repeat),
        2.0 * shaped.numbers * 10,
        passes_at_most=5,
    )


CASES: dict[str, Callable[[int], Result]] = {"one": one_row, "hundred": hundred, "thousand": thousand, "rece": rece_epochs, "sdxl": sdxl}

SECTION = """## Closed-form editing

Made by `{command}`: {threads} threads, PyTorch {torch}, float32 weights of the real shapes with random values.
Memory: {bandwidth:.1f} GB/s for reading and writing. Products of 1536 x 1536: {single:.0f} GFLOP/s in float32, {double:.0f} in float64.
One prompt in a text encoder of CLIP-L's shape takes {encoding:.0f} ms; it is not part of the times below. The official codes
encode every prompt once per layer (32 times on SD 1.4), this library once.

| case | solve and factors | in passes over the weights | times faster than the papers' loop | in floors |
|---|---|---|---|---|
{rows}

A pass reads and writes the touched weights once. The floor is the larger of reading them once and the float64 operations that
the equations need, at the rates above. The papers' loop is timed on one layer of each width and on at most {sampled} prompts
for the moved and the kept ones each, and multiplied by how many there are.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; with --out write the section of a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=f"of {', '.join(CASES)}")
    parser.add_argument("--repeat", type=int, default=5, help="the median of so many runs (default %(default)s)")
    parser.add_argument("--out", type=Path, help="the page whose section is written anew")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    rate, single = gemm(torch.float64), gemm(torch.float32)
    shaped = Shaped(SD1)
    bandwidth = 8 * shaped.numbers / one_pass(shaped, args.repeat) / 1e9
    rows = []
    for name in args.case:
        rows.append(CASES[name](args.repeat).row(rate))
        print(" | ".join(rows[-1]), flush=True)
    section = SECTION.format(
        command="python -m benchmarks.closed_form",
        threads=torch.get_num_threads(),
        torch=torch.__version__.partition("+")[0],
        bandwidth=bandwidth,
        single=single / 1e9,
        double=rate / 1e9,
        encoding=1000 * encoding(),
        rows="\n".join(f"| {' | '.join(row)} |" for row in rows),
        sampled=SAMPLED,
    )
    if args.out:
        write_section(args.out, section)
    else:
        print(section)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
