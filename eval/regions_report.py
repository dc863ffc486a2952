"""Measures what regions draw on the embedded model and writes its page: `python -m eval.regions_report [--n N] [--out FILE]`.

Known objects, none of them learnt, in two, three and four boxes. Each box has a prompt of its own; the image's prompt names all of
them with their places, as captions of the world do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eval import prompts as make
from eval.intervals import Estimate, rate
from eval.prompts import Prompt
from eval.rates import Painter, Shown, background_right, place_right, share
from eval.world_report import Line
from pipelines.attention.regional import Region, regional
from toolkit.runs import timed, write_atomic
from toolkit.world.captions import AT
from toolkit.world.oracle import load_oracle
from toolkit.world.scenes import load_world

if TYPE_CHECKING:
    from toolkit.model import Model

BARS = {2: 0.85, 3: 0.75, 4: 0.65}  # of boxes with the right object, by the number of boxes
COUNTS = {2: "two", 3: "three", 4: "four"}
BOXES = {
    "left": (0.0, 0.0, 0.5, 1.0),
    "right": (0.5, 0.0, 1.0, 1.0),
    "top left": (0.0, 0.0, 0.5, 0.5),
    "top right": (0.5, 0.0, 1.0, 0.5),
    "bottom left": (0.0, 0.5, 0.5, 1.0),
    "bottom right": (0.5, 0.5, 1.0, 1.0),
}
WORDINGS = {
    "none": "without regions",
    "alone": "a region's prompt is of its object alone, at its place",
    "everywhere": "a region's prompt is the image's with its object at every place",
}


def regions_of(prompt: Prompt, wording: str) -> list[Region]:
    """A box for each object of a prompt for several; see `WORDINGS`, of which "none" gives none."""
    made = []
    for place, name in prompt.scene.items if wording != "none" else ():
        said = f"a {name} {AT[place][0]} on a {prompt.scene.background} background"
        if wording == "everywhere":
            said = prompt.text
            for other_place, other in prompt.scene.items:
                said = said.replace(f"a {other} {AT[other_place][0]}", f"a {name} {AT[other_place][0]}")
        made.append(Region(said, box=BOXES[place]))
    return made


def drawn(model: Model, painter: Painter, prompts: Sequence[Prompt], wording: str) -> list[Shown]:
    """The image of every prompt, with its regions."""
    if wording == "none":
        return painter.draw(model, prompts)
    shown = []
    for prompt in prompts:
        with regional(model, regions_of(prompt, wording)) as acting:
            shown += painter.draw(model, [prompt], hooks=[acting])
    return shown


def boxes_right(shown: Sequence[Shown]) -> Estimate:
    """How many boxes show their object, clustered by image."""
    each = [(item.reading.objects[place] == name, i) for i, item in enumerate(shown) for place, name in item.prompt.scene.items]
    return rate([right for right, _ in each], [i for _, i in each])


def measure(model: Model, painter: Painter, n: int, seed: int, counts: Sequence[int], wordings: Sequence[str]) -> list[Line]:
    """For each wording and number of boxes, of n images: boxes that are right, images in which all are, and backgrounds."""
    names, lines = load_world().names("scored"), []
    for wording in wordings:
        for count in counts:
            shown = drawn(model, painter, make.several(count, names, n, seed=seed), wording)
            what = f"{WORDINGS[wording]}, {COUNTS[count]}"
            bar = BARS[count] if wording == "everywhere" else None
            lines.append(Line(f"{what}: right object in the box", boxes_right(shown), bar))
            lines.append(Line(f"{what}: all of them in one image", share(shown, place_right)))
            lines.append(Line(f"{what}: background right", share(shown, background_right)))
            print(*lines[-3:], sep="\n", file=sys.stderr, flush=True)
    return lines


PAGE = """# Regions, measured

Written by `python -m eval.regions_report` on the embedded model, with objects that it knows: nothing is learnt here. {n} images for
each line, in {steps} steps with guidance {guidance}; 95 % intervals, Wilson's at the effective sample size, boxes clustered by image.
Two boxes are the halves of an image, three and four are quarters. Without regions "the box" is the place that the prompt names.

| what | bar | measured | n |
|---|---|---|---|
{table}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the page."""
    from toolkit.model import load_model

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=32, help="images for each line (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1000, help="of the objects, places and images (default %(default)s)")
    parser.add_argument("--count", type=int, nargs="+", choices=COUNTS, default=list(COUNTS))
    parser.add_argument("--wording", nargs="+", choices=WORDINGS, default=list(WORDINGS))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("docs/regions-measured.md"))
    args = parser.parse_args(argv)
    painter = Painter(load_oracle(), steps=args.steps)
    with timed() as cost:
        lines = measure(load_model(), painter, args.n, args.seed, args.count, args.wording)
    table = "\n".join(map(str, lines))
    write_atomic(args.out, PAGE.format(n=args.n, steps=painter.steps, guidance=painter.guidance, table=table))
    missed = [line.what for line in lines if not line.met]
    print(f"{args.out}: {len(lines)} lines in {cost.seconds:.0f} s; bars missed: {'; '.join(missed) or 'none'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
