"""Measures masks made of attention on the embedded model and writes their page: `python -m eval.masks_report [--n N] [--out FILE]`.

`concept_express` is given rendered pictures of one to four objects and nothing else, `attencraft` those of two with a class name for each.
Both make their masks before they train. The renders' own masks are the truth.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from eval.intervals import mean, rate
from eval.overlap import at_places, iou, partners
from eval.subjects import Lesson, Portrait
from eval.world_report import Line
from toolkit.concepts import CustomizeTask, Subject
from toolkit.errors import PalimpsestError, UserError
from toolkit.images import save_png
from toolkit.runs import progress, seeded, timed, write_atomic
from toolkit.world.scenes import SIZE, Scene, World, load_world, random_scene
from trainers.customize.attencraft import TEMPLATE, AttenCraft, Crafting
from trainers.customize.concept_express import ConceptExpress

if TYPE_CHECKING:
    from toolkit.model import Model

BARS = {"IoU": 0.6, "found": 0.8}
ROLES = {"scored": "known objects", "held_out": "new objects"}
COUNTS = (1, 2, 3, 4)
ORDERS = {"named from left to right": (0, 1), "named from right to left": (1, 0)}
CHOSEN: dict[str, Any] = {"mask_draws": 6, "mask_shares": True, "mask_threshold": 0.05}  # on known and "extra" objects, in other pictures
SETTINGS: dict[str, dict[str, Any]] = {
    "no captions": {},
    "captions": {"captioned": True},
    "captions, chosen options": {"captioned": True, **CHOSEN},
}
TOKENS = ("<toy>", "<pal>")
NEAREST = {
    "butterfly": "bee",
    "octopus": "crab",
    "penguin": "bird",
    "watermelon": "tangerine",
    "doughnut": "cookie",
    "cactus": "tulip",
    "rocket": "airplane",
    "tractor": "truck",
    "scissors": "knife",
    "magnet": "bolt",
    "key": "lock",
    "umbrella": "parachute",
    "castle": "house",
    "balloon": "kite",
    "snowman": "teddy bear",
    "anchor": "hook",
}  # held-out object -> what it is nearest to among what the model knows


@dataclass(frozen=True)
class Truth:
    """A rendered picture. masks: of its objects, in the scene's order [k, 64, 64] bool. seed: of what a method draws for it."""

    scene: Scene
    image: Path
    masks: Tensor
    seed: int


@dataclass(frozen=True)
class Overlap:
    """A picture's objects in what was found. at_places, in_pixels: each object's IoU with its mask. best: what in_pixels would be of the
    true masks at the same places. right: as many are found as there are, or where each has a name, each is its own partner."""

    at_places: Sequence[float]
    in_pixels: Sequence[float]
    best: Sequence[float]
    right: bool


def rendered(world: World, role: str, count: int, n: int, seed: int, folder: Path) -> list[Truth]:
    """n pictures of so many objects of a role, in any style, on any background."""
    rng, made = np.random.default_rng(seeded("found masks", role, count, seed).initial_seed()), []
    for number in range(n):
        scene = random_scene(world, world.names(role), rng, count=count)
        pixels, masks = world.render(scene, rng)
        image = save_png(Image.fromarray(pixels), folder / f"{role}-{count}-{number}.png")
        made.append(Truth(scene, image, torch.from_numpy(masks), number))
    return made


# --- of one picture ---------------------------------------------------------------------------------------------------
def in_pixels(masks: Tensor) -> Tensor:
    """Masks [k, h, w] at the size of a picture, each place a square."""
    return F.interpolate(masks[:, None].float(), (SIZE, SIZE), mode="nearest")[:, 0] > 0.5


def compared(truth: Truth, masks: Tensor, *, named: bool) -> Overlap:
    """Objects with their partners among masks [n, h, w], or with their own where these are named; one that has none overlaps by 0."""
    small = at_places(truth.masks, (masks.shape[1], masks.shape[2]))
    coarse, fine = iou(small, masks), iou(truth.masks, in_pixels(masks))
    matched = partners(coarse)
    own = list(range(len(masks))) if named else matched

    def of_own(overlap: Tensor) -> list[float]:
        return [0.0 if column is None else float(overlap[row, column]) for row, column in enumerate(own)]

    best = iou(truth.masks, in_pixels(small)).diagonal().tolist()
    return Overlap(of_own(coarse), of_own(fine), best, matched == own if named else len(masks) == len(small))


def expressed(model: Model, truth: Truth) -> Overlap:
    """What `concept_express` finds in a picture."""
    return compared(truth, ConceptExpress(seed=truth.seed).find(model, truth.image).masks > 0.5, named=False)


def crafted(model: Model, truth: Truth, order: tuple[int, int] = (0, 1), *, captioned: bool = False, **options: Any) -> Overlap:
    """The first masks that `attencraft` makes for a picture of two, each object with its own word's. Not told apart they are empty.

    order: in which the prompt names them, by number. captioned: whether it says where each is, and on what.
    """
    items = [truth.scene.items[i] for i in order]
    called = tuple(Portrait(name, NEAREST.get(name, name), TOKENS[i]) for i, (_, name) in zip(order, items, strict=True))
    caption = Lesson(called, (truth.scene,)).caption(replace(truth.scene, items=tuple(items)))
    captions = (caption,) if captioned else ()
    task = CustomizeTask(tuple(Subject(one.token, one.class_name, (truth.image,), (), captions) for one in called))
    method = AttenCraft(seed=truth.seed, prior="none", **options)  # what it is trained beside has no part in its masks
    try:
        with method.objective(model, task) as (made, _):
            assert isinstance(made, Crafting)
            masks = torch.cat([mask[0] for mask in made.pictures.masks_of[0] if mask is not None])[list(order)] > 0.5
    except UserError:
        raise
    except PalimpsestError:
        side = model.arch.image_size
        masks = torch.zeros(len(order), *model.arch.latent_shape(side, side)[1:], dtype=torch.bool)
    return compared(truth, masks, named=True)


# --- of many ----------------------------------------------------------------------------------------------------------
def overlap_lines(what: str, overlaps: Sequence[Overlap], *, barred: bool = True) -> list[Line]:
    """The mean IoU of all objects, clustered by picture: at the places of the masks and in pixels, and what is possible there."""
    at = [i for i, one in enumerate(overlaps) for _ in one.at_places]

    def line(name: str, values: Sequence[Sequence[float]], bar: float | None = None) -> Line:
        return Line(f"{what}: {name}", mean([value for own in values for value in own], at), bar, unit="")

    return [
        line("IoU at the masks' places", [one.at_places for one in overlaps], BARS["IoU"] if barred else None),
        line("IoU in pixels", [one.in_pixels for one in overlaps]),
        line("IoU in pixels of the true masks at these places", [one.best for one in overlaps]),
    ]


def express_lines(role: str, of: dict[int, list[Overlap]]) -> list[Line]:
    """All pictures of a role, and then by how many objects they show."""
    every = [one for overlaps in of.values() for one in overlaps]
    lines = [Line(f"{ROLES[role]}: number found right", rate([one.right for one in every]), BARS["found"])]
    lines += overlap_lines(ROLES[role], every)
    for count, overlaps in of.items():
        what = f"{ROLES[role]}, {count} in a picture"
        lines.append(Line(f"{what}: number found right", rate([one.right for one in overlaps])))
        lines.append(overlap_lines(what, overlaps, barred=False)[0])
    return lines


def craft_lines(what: str, overlaps: Sequence[Overlap]) -> list[Line]:
    """Pictures of two."""
    own = Line(f"{what}: both words at their own objects", rate([one.right for one in overlaps]), BARS["found"])
    return [own, overlap_lines(what, overlaps)[0]]


def measure(model: Model, n: int, seed: int, folder: Path) -> tuple[list[Line], list[Line]]:
    """Lines of `concept_express`, from n pictures of each number of objects, and of `attencraft`, from those of two."""
    world, express, craft = load_world(), list[Line](), list[Line]()
    for role in ROLES:
        pictures = {count: rendered(world, role, count, n, seed, folder) for count in COUNTS}
        of: dict[int, list[Overlap]] = {count: [] for count in COUNTS}
        with progress(ROLES[role]) as show:
            for done, (count, truth) in enumerate((count, truth) for count, own in pictures.items() for truth in own):
                of[count].append(expressed(model, truth))
                show(done + 1, n * len(COUNTS))
        express += express_lines(role, of)
        for (name, order), (setting, given) in product(ORDERS.items(), SETTINGS.items()):
            craft += craft_lines(f"{ROLES[role]} {name}, {setting}", [crafted(model, truth, order, **given) for truth in pictures[2]])
    return express, craft


PAGE = """# Masks made of attention, measured

Written by `python -m eval.masks_report` on the embedded model: {n} rendered pictures for each number of objects, in all styles and on
all backgrounds (seed {seed}), none of which any option was chosen on. Known objects are those that the model is scored on, new objects it
has never seen. The masks are those before training; what a method draws is drawn anew for each picture.

IoU is intersection over union, the mean over objects, an object that is missed counting 0; 95 % intervals, Wilson's for shares, for
means by bootstrap over pictures. Masks are made at the places of a latent, {rows} × {columns} for {size} × {size} pixels, and used there
by training. So that is where the bar is; a true mask has the places that it covers by more than half. In pixels a place is a square, and
a line says what the true masks at these places reach there themselves.

## concept_express

With its defaults. It is told neither what is in a picture nor how much. Masks are given to objects one to one so that the sum of IoU is
largest; those that are left over count in the number found.

| what | bar | measured | n |
|---|---|---|---|
{express}

## attencraft

It is given pictures of two objects, side by side, and a class name for each: the object's own, or of a new object what it is nearest to
among what the model knows, such as bird for penguin. Without captions its prompt is `{template}`, a caption is such as
`a <toy> on the left and a <pal> on the right on a blue background`. An object's mask is its own word's. Where words are not told apart,
which the method says, both count 0. Chosen options are `{chosen}`, chosen without captions on
other pictures, of known objects and of objects called by another one's name; captions were tried on other pictures of new objects too.

In the captions that the embedded model was trained on the left one of two comes first, and it reads prompts so, whatever places they name:
the right one first says something wrong to it, and attention follows the prompt.

| what | bar | measured | n |
|---|---|---|---|
{craft}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the page."""
    from toolkit.model import load_model

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=64, help="pictures of each number of objects (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1000, help="of the objects, places and backgrounds (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/found-masks-measured.md"))
    args = parser.parse_args(argv)
    model = load_model()
    with timed() as cost, tempfile.TemporaryDirectory() as folder:
        express, craft = measure(model, args.n, args.seed, Path(folder))
    _, rows, columns = model.arch.latent_shape(model.arch.image_size, model.arch.image_size)
    text = PAGE.format(
        n=args.n,
        seed=args.seed,
        rows=rows,
        columns=columns,
        size=SIZE,
        express="\n".join(map(str, express)),
        template=TEMPLATE.format(" and ".join(TOKENS)),
        chosen=" ".join(f"{name}={str(value).lower()}" for name, value in CHOSEN.items()),
        craft="\n".join(map(str, craft)),
    )
    write_atomic(args.out, text)
    missed = [line.what for line in (*express, *craft) if not line.met]
    print(
        f"{args.out}: {len(express) + len(craft)} lines in {cost.seconds:.0f} s; bars missed: {'; '.join(missed) or 'none'}",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
