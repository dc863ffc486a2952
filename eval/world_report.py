"""Measures the shipped embedded model and writes its page: `python -m eval.world_report [--n N] [--out docs/emoji-sd.md]`."""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from eval import prompts as make
from eval.alignment import Clip, load_metric_clip, world_pairs
from eval.intervals import NOTHING, Estimate, mean, rate
from eval.rates import Painter, Shown, background_right, by_object, object_right, place_right, share, style_right, version
from toolkit.runs import seeded, timed, write_atomic
from toolkit.world.oracle import NONE, Oracle, load_oracle
from toolkit.world.scenes import BACKGROUNDS, PLACES, Scene, World, blank, held_out_triple, load_world, pick, random_scene
from trainers.world import clip as clip_recipe
from trainers.world import oracle as oracle_recipe
from trainers.world import unet as unet_recipe
from trainers.world import vae as vae_recipe

if TYPE_CHECKING:
    from toolkit.model import Model

PLACED = ("left", "right", "top left", "top right", "bottom left", "bottom right")


@dataclass(frozen=True)
class Line:
    """One line of the table. bar: what the estimate should reach; below: it should stay under it. None has no bar."""

    what: str
    estimate: Estimate
    bar: float | None = None
    below: bool = False
    unit: str = "%"

    @property
    def met(self) -> bool:
        """Whether the measured value reaches the bar."""
        return self.bar is None or (self.estimate.value <= self.bar if self.below else self.estimate.value >= self.bar)

    def __str__(self) -> str:
        sign = "≤" if self.below else "≥"
        bar = "" if self.bar is None else f"{sign} {self._number(self.bar)}{'' if self.met else ' (missed)'}"
        e = self.estimate
        return f"| {self.what} | {bar} | {self._number(e.value)} [{self._number(e.low)}, {self._number(e.high)}] | {e.n} |"

    def _number(self, value: float) -> str:
        return f"{100 * value:.1f} %" if self.unit == "%" else f"{value:.2f} {self.unit}".rstrip()


# --- autoencoder and oracle -----------------------------------------------------------------------------------------
def unseen_scenes(world: World, n: int) -> list[Scene]:
    """n scenes of one to four objects with a combination that no training image shows."""
    rng = np.random.default_rng(seeded("unseen", n).initial_seed())
    names = world.names("scored")
    scenes: list[Scene] = []
    while len(scenes) < n:
        scene = random_scene(world, names, rng, count=1 + len(scenes) % 4)
        place, name = scene.items[int(rng.integers(len(scene.items)))]
        unseen = [background for background in BACKGROUNDS if held_out_triple(name, background, place)]
        if unseen:
            scenes.append(replace(scene, background=pick(rng, unseen)))
    return scenes


def rendered(world: World, scenes: Sequence[Scene]) -> torch.Tensor:
    """Renders [n, 3, 64, 64] in [0, 1]."""
    images = [world.render(scene, np.random.default_rng(seeded("render", i).initial_seed()))[0] for i, scene in enumerate(scenes)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def autoencoder_line(world: World, model: Model, n: int) -> Line:
    """PSNR of encoding and decoding renders, the mean over images."""
    images = rendered(world, unseen_scenes(world, n))
    with torch.no_grad():
        parts = [model.arch.decode_latents(model.arch.encode_images(part * 2 - 1)) for part in images.split(64)]
    errors = ((torch.cat(parts).float() / 2 + 0.5).clamp(0, 1) - images).square().mean((1, 2, 3))
    return Line("VAE reconstruction of unseen compositions, PSNR", mean((-10 * errors.log10()).tolist()), 28.0, unit="dB")


def oracle_lines(world: World, oracle: Oracle, n: int) -> list[Line]:
    """What the oracle reads in renders of unseen compositions, and in spoilt objects."""
    scenes = unseen_scenes(world, n)
    readings = oracle.read(rendered(world, scenes))
    placed = [(r, place, name, i) for i, (scene, r) in enumerate(zip(scenes, readings, strict=True)) for place, name in scene.items]
    at = [i for *_, i in placed]
    exact = [r.present() == dict(scene.items) for scene, r in zip(scenes, readings, strict=True)]
    false = called_objects(world, oracle, n)
    return [
        Line("oracle, unseen compositions: object", rate([r.objects[place] == name for r, place, name, _ in placed], at), 0.98),
        Line("oracle: style", rate([r.styles.get(place) == scenes[i].style for r, place, _, i in placed], at), 0.98),
        Line("oracle: background", rate([r.background == s.background for s, r in zip(scenes, readings, strict=True)]), 0.99),
        Line("oracle: place (all objects there, none elsewhere)", rate(exact), 0.98),
        Line(f"oracle: spoilt objects called the same object, worst ({false[0]})", false[1], 0.01, below=True),
        Line("oracle: spoilt objects called any object", false[2]),
    ]


def called_objects(world: World, oracle: Oracle, n: int) -> tuple[str, Estimate, Estimate]:
    """Images of one spoilt object each: the object they are most often called, how often, and how often any."""
    rng = np.random.default_rng(seeded("spoilt", n).initial_seed())
    canvases, places = [], []
    for _ in range(n):
        canvas, place = blank(pick(rng, list(BACKGROUNDS)), rng), pick(rng, list(PLACES))
        name, style = pick(rng, world.names("scored", "held_out")), pick(rng, list(world.styles))
        oracle_recipe.place_loosely(canvas, place, world, name, style, rng, True)
        canvases.append(canvas)
        places.append(place)
    read = [reading.objects[place] for reading, place in zip(oracle.read(canvases), places, strict=True)]
    found = Counter(name for name in read if name != NONE)
    worst = found.most_common(1)[0][0] if found else NONE
    return worst, rate([name == worst and name != NONE for name in read]), rate([name != NONE for name in read])


# --- generator ------------------------------------------------------------------------------------------------------
def generator_lines(world: World, painter: Painter, model: Model, n: int) -> tuple[list[Line], dict[str, list[Shown]]]:
    """One object by name, from synonyms, in other places; several objects. n: images per object. And the images by object."""
    names = world.names("scored")
    one = painter.draw(model, make.objects(world, names, n * len(names)), "one object")
    groups = by_object(one)
    worst = min(groups, key=lambda name: share(groups[name], object_right).value)
    called = [
        prompt
        for name in names
        if world.things[name].synonyms
        for prompt in make.single(world, name, max(1, n // 2), words=world.things[name].synonyms)
    ]
    placed = [prompt for name in names for prompt in make.single(world, name, max(1, n // 2), places=PLACED)]
    by_synonym, elsewhere = painter.draw(model, called, "synonyms"), painter.draw(model, placed, "places")
    lines = [
        Line("one object: object right", share(one, object_right), 0.90),
        Line("one object: style right", share(one, style_right), 0.90),
        Line("one object: background right", share(one, background_right), 0.95),
        Line(f"one object: the worst object ({worst})", share(groups[worst], object_right), 0.50),
        Line("one object from a synonym: object right", share(by_synonym, object_right), 0.80),
        Line("one object at a place: place right", share(elsewhere, place_right)),
        Line("held-out triples: object right, relative to the others", held_out_ratio([*one, *elsewhere]), 0.95),
        Line("empty background: nothing drawn", share(painter.draw(model, make.empty(8 * n), "empty"), object_right)),
    ]
    for count, word in ((2, "two"), (3, "three"), (4, "four")):
        shown = painter.draw(model, make.several(count, names, 16 * n), f"{word} objects")
        lines.append(Line(f"{word} objects: all drawn, each at its place", share(shown, place_right), 0.60 if count == 2 else None))
        lines.append(Line(f"{word} objects: all drawn", share(shown, object_right)))
    return lines, groups


def held_out_ratio(shown: Sequence[Shown]) -> Estimate:
    """Accuracy on held-out combinations over accuracy on seen ones; the interval is the normal one of the log ratio."""
    unseen, seen = ([object_right(item) for item in shown if item.prompt.held_out is held_out] for held_out in (True, False))
    first, second = sum(unseen), sum(seen)
    if not first or not second:
        return NOTHING
    value = (first / len(unseen)) / (second / len(seen))
    spread = 1.96 * math.sqrt(1 / first - 1 / len(unseen) + 1 / second - 1 / len(seen))
    return Estimate(value, value * math.exp(-spread), value * math.exp(spread), len(unseen))


# --- the page -------------------------------------------------------------------------------------------------------
def measure(world: World, painter: Painter, model: Model, clip: Clip, n: int) -> tuple[list[Line], dict[str, list[Shown]]]:
    """Every line of the table; n: images per object."""
    lines, groups = generator_lines(world, painter, model, n)
    top1 = clip.top1(*world_pairs(world, 64 * n))
    measured = [autoencoder_line(world, model, 32 * n), *oracle_lines(world, painter.oracle, 256 * n), *lines]
    return [*measured, Line("metric CLIP: a render's own caption is the nearest of 64", top1, 0.90)], groups


def page(world: World, model: Model, painter: Painter, clip: Clip, lines: list[Line], groups: dict[str, list[Shown]]) -> str:
    """The markdown page."""
    parts = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in model.arch.components().items()}
    sizes = ", ".join(f"{name.replace('_', ' ')} {count:.1f} M" for name, count in parts.items())
    counts = {role: len(world.names(role)) for role in ("scored", "extra", "held_out")}
    per_object = [(name, share(items, object_right), share(items, style_right)) for name, items in groups.items()]
    rows = [
        f"| {name} | {world.things[name].group} | {100 * right.value:.0f} % [{100 * right.low:.0f}, {100 * right.high:.0f}] "
        f"| {100 * style.value:.0f} % | {right.n} |"
        for name, right, style in sorted(per_object, key=lambda row: row[1].value)
    ]
    return PAGE.format(
        sizes=sizes,
        **counts,
        styles=", ".join(world.styles),
        backgrounds=", ".join(BACKGROUNDS),
        vae=vae_recipe.CONFIG["block_out_channels"],
        unet=unet_recipe.CONFIG["block_out_channels"],
        clip=f"{clip_recipe.LAYERS} layers of width {clip_recipe.WIDTH}",
        spoilt=round(100 * oracle_recipe.SPOILT),
        steps=painter.steps,
        guidance=painter.guidance,
        oracle=version(painter.oracle),
        threshold=painter.oracle.threshold,
        metric=clip.measured_by["version"],
        table="\n".join(map(str, lines)),
        objects="\n".join(rows),
    )


PAGE = """# emoji-sd

A small text-to-image model that is shipped with the project, in the ordinary Stable Diffusion folder layout, so that every
method can be tried and measured offline on two CPU cores. It draws emoji objects on plain backgrounds, 64x64 pixels on a 16x16
latent grid, and nothing else. This page is written by `python -m eval.world_report`; every number on it is measured.

## The world

{scored} scored objects, {extra} more that it was only trained on, and {held_out} that neither it nor its CLIP has ever seen (new
subjects); {styles} as styles; {backgrounds} as backgrounds; one to four objects in an image, at named places. One in ten
combinations of object, background and place is held out of training. Half of every object's synonyms are never given to a method.

## The parts

Parameters: {sizes}. Autoencoder of widths {vae}; text encoder of {clip}, trained as one half of a CLIP on the world and then
frozen; UNet of widths {unet}, v-prediction, with cross- and self-attention at the latent grid, 10 % of captions dropped for
classifier-free guidance. The oracle, which says what an image shows at each of the seven places, is trained on renders only, of
which {spoilt} % of the objects are spoilt (blends, halves, blurs, noise, shuffled tiles) and count as none. A second CLIP with
another seed measures alignment. A leg of the UNet's training, 2,000 steps of 32 scenes, takes 80 minutes on two cores that do
not compute in bf16; several were needed. The recipes are in `trainers/world/`; `python -m trainers.world.build STAGE` runs them.

## Measured

95 % intervals: Wilson's at the effective sample size for rates (clustered by prompt), a bootstrap for means. Images are drawn in
{steps} steps with guidance {guidance}. Oracle {oracle} at threshold {threshold}; metric CLIP {metric}. "Object right": every object
asked for is drawn, anywhere. "Style right": whatever is drawn has the style asked for.

| what | bar | measured | n |
|---|---|---|---|
{table}

## By object

From the worst to the best, one object asked for by name.

| object | group | object right | style right | n |
|---|---|---|---|---|
{objects}

## Limits

- A style here is a label over known sprites, not a manner that transfers to anything else: erasing one says little about artists.
- Prompts follow the captions it was trained on; free text does not work. Its words are those of the emoji names.
- The oracle and the metric CLIP know this world only. Their numbers compare edits with each other, not with published ones.
- Oracle-KID is Kernel Inception Distance on the oracle's features, so it too compares only within this world.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the page."""
    from toolkit.model import load_model

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=16, help="images per object (default %(default)s)")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("docs/emoji-sd.md"))
    args = parser.parse_args(argv)
    world, model, painter, clip = load_world(), load_model(), Painter(load_oracle(), steps=args.steps), load_metric_clip()
    with timed() as cost:
        lines, groups = measure(world, painter, model, clip, args.n)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out, page(world, model, painter, clip, lines, groups))
    missed = [line.what for line in lines if not line.met]
    print(f"{args.out}: {len(lines)} lines in {cost.seconds:.0f} s; bars missed: {'; '.join(missed) or 'none'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
