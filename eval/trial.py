"""An erasing edit tried at once: fitted, drawn before and after, and measured where an oracle knows the answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval import prompts as make
from eval.commands.evaluate import knows_world
from eval.intervals import Estimate
from eval.pictures import as_images, spread
from eval.rates import Painter, Shown, background_right, draws, object_right, relative, share
from toolkit.commands import save_result
from toolkit.concepts import EraseTask
from toolkit.errors import UserError
from toolkit.images import grid, save_png
from toolkit.method import Method, fit
from toolkit.runs import TrainingRun, progress, timed, write_json
from toolkit.sample import generate

if TYPE_CHECKING:
    from PIL import Image

    from eval.prompts import Prompt, Target
    from toolkit.edits.base import Edit
    from toolkit.model import Model
    from toolkit.world.scenes import World

OTHERS = 8  # objects of the embedded world that are looked at besides those that the task preserves
SHOWN = 4  # pictures of each kind in a gallery
HEADINGS = ("what", "before", "after", "images")


@dataclass(frozen=True)
class Pair:
    """The same prompt and seed before and after."""

    prompt: str
    before: Image.Image
    after: Image.Image


@dataclass
class Trial:
    """edit: what was fitted. erased, retained: pictures of what should be gone and of what should stay. rows: `HEADINGS` of what was
    measured, as text. unmeasured: why nothing was. seconds: of fitting alone."""

    edit: Edit
    seconds: float
    erased: list[Pair] = field(default_factory=list)
    retained: list[Pair] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    unmeasured: str = ""


def erase(
    model: Model,
    method: Method,
    task: EraseTask,
    out: Path,
    *,
    everything_else: bool = False,
    images: int = 8,
    steps: int = 12,
    run: TrainingRun | None = None,
    origin: dict[str, Any] | None = None,
) -> Trial:
    """Fit an erasing edit, write it into `out` as `palimpsest erase` does, and show and measure what it did.

    everything_else: preserve all that the embedded world has besides, too; of another model that is a UserError.
    images: of each erased concept by its name, four times as many of what should stay; 0 measures nothing. steps: of drawing them.
    origin: what else config.json says, such as the model's name. report.json and pictures are written beside the edit.
    """
    world, targets, why = _known(model, task)
    asked = task  # what is named to be preserved is looked at first
    if everything_else:
        task = _with_everything_else(model, task, targets)
    with timed() as cost:
        edit = fit(method, model, task, run)
    trial = Trial(edit, cost.seconds, unmeasured=why)
    if world is not None and images:
        _measure(trial, model, asked, world, targets, images, steps)
    else:
        _draw(trial, model, asked, steps)
        trial.unmeasured = why or "nothing was measured, as asked"
    config = {"method": method.name(), "config": method.config(), **(origin or {}), "task": dataclasses.asdict(task)}
    save_result(out, edit, config, dataclasses.asdict(cost))
    write_json(out / "report.json", {"headings": HEADINGS, "rows": trial.rows, "unmeasured": trial.unmeasured})
    for name, pairs in (("erased", trial.erased), ("retained", trial.retained)):
        if pairs:
            save_png(grid([*(pair.before for pair in pairs), *(pair.after for pair in pairs)], len(pairs)), out / f"{name}.png")
    return trial


def _known(model: Model, task: EraseTask) -> tuple[World | None, list[Target], str]:
    """The embedded world and what the task's concepts are there; None and why, when the oracle cannot say what the model draws."""
    from toolkit.world.scenes import load_world

    if not knows_world(model):
        return None, [], f"there is no oracle for what {model.source} draws: look at the pictures"
    world = load_world()
    try:
        return world, [make.resolve(world, concept.name) for concept in task.concepts], ""
    except UserError as error:
        return None, [], f"the oracle cannot measure this: {error}"


def _with_everything_else(model: Model, task: EraseTask, targets: Sequence[Target]) -> EraseTask:
    """The task that preserves what the embedded world has, except what is erased by any of its names."""
    from toolkit.world.kept import everything_else
    from toolkit.world.scenes import load_world

    if not knows_world(model):
        raise UserError(f"{model.source} does not draw the embedded world, so what else it draws is not known; name what to preserve")
    erased = {name for target in targets for name in target.names} | {word for concept in task.concepts for word in concept.words}
    return replace(task, preserve=tuple(dict.fromkeys((*task.preserve, *everything_else(load_world(), erased)))))


def _draw(trial: Trial, model: Model, task: EraseTask, steps: int) -> None:
    """Pictures of the concepts and of what is preserved, each in the first templates of its kind."""
    asked = [template.format(concept.name) for concept in task.concepts for template in concept.templates[1:3]]
    kept = [f"a {word}" for word in task.preserve[: 2 * SHOWN]]
    for prompts, pairs in ((asked, trial.erased), (kept, trial.retained)):
        seeds = [0] * len(prompts)
        with progress("drawing before") as show:
            before = generate(model, prompts, seeds, steps=steps, progress=show)
        with model.attached(trial.edit), progress("drawing after") as show:
            after = generate(model, prompts, seeds, steps=steps, progress=show)
        pairs += [Pair(*row) for row in zip(prompts, before, after, strict=True)]


def _measure(trial: Trial, model: Model, task: EraseTask, world: World, targets: Sequence[Target], images: int, steps: int) -> None:
    """Rates with intervals as the oracle reads them, and the pictures that they were counted in."""
    from toolkit.world.oracle import load_oracle

    painter = Painter(load_oracle(), steps=steps, guidance=model.guidance)
    erased = {name for target in targets for name in target.names}

    def both(prompts: Sequence[Prompt], title: str) -> tuple[list[Shown], list[Shown]]:
        before = painter.draw(model, prompts, f"{title}, before")
        with model.attached(trial.edit):
            return before, painter.draw(model, prompts, f"{title}, after")

    def row(what: str, sides: tuple[list[Shown], list[Shown]], test: Callable[[Shown], bool | None]) -> None:
        trial.rows.append([what, *(percent(share(side, test)) for side in sides), str(len(sides[0]))])

    for target in targets:
        if target.kind == "style":
            sides = both(make.in_style(target.name, world.names("scored"), images), target.name)
        else:
            sides = both([prompt for name in target.names for prompt in make.single(world, name, images)], target.name)
        row(f"{target.name} is drawn, asked by name", sides, lambda shown: draws(shown, erased))
        trial.erased += _pairs(*sides)
        for words, which in _synonyms(world, task, target):
            prompts = make.single(world, target.names[0], images, words=words)
            row(f"{target.name} is drawn, asked by {which}", both(prompts, which), lambda shown: draws(shown, erased))
    stay = [name for name in _stay(world, task) if name not in erased]
    sides = both(make.objects(world, stay, 4 * images, without=erased), "what stays")
    row("other objects are right", sides, object_right)
    row("their backgrounds are right", sides, background_right)
    trial.rows.append(["other objects, after relative to before", "", percent(relative(*sides, object_right)), str(len(sides[0]))])
    trial.retained += _pairs(*sides)


def _synonyms(world: World, task: EraseTask, target: Target) -> list[tuple[tuple[str, ...], str]]:
    """Other words for an object: those that the task names, and those of the world that it does not."""
    if target.kind == "style" or len(target.names) != 1:
        return []
    given = {word for concept in task.concepts for word in concept.words}
    known = world.things[target.names[0]].synonyms
    sides = (tuple(word for word in known if word in given), "given synonyms"), (tuple(set(known) - given), "other synonyms")
    return [(tuple(sorted(words)), which) for words, which in sides if words]


def _stay(world: World, task: EraseTask) -> list[str]:
    """Objects to look at: preserved ones, then others spread over the world."""
    preserved = [thing.name for word in task.preserve if (thing := make.find(world, word))]
    scored = world.names("scored")
    return list(dict.fromkeys([*preserved, *scored[:: max(1, len(scored) // OTHERS)]]))[: max(OTHERS, len(preserved))]


def _pairs(before: Sequence[Shown], after: Sequence[Shown]) -> list[Pair]:
    """Some of the pictures, spread evenly."""
    old, new = spread(before, SHOWN), spread(after, SHOWN)
    return [Pair(item.prompt.text, *images) for item, *images in zip(old, as_images(old), as_images(new), strict=True)]


def percent(estimate: Estimate) -> str:
    """A rate with its interval."""
    from eval.bench_results import short

    return short(estimate) or "not measured"
