"""A subject learnt at once: fitted, and drawn in new contexts. A run that was stopped goes on from where it was."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit import registry
from toolkit.commands import save_result
from toolkit.concepts import CustomizeTask, Subject
from toolkit.errors import UserError
from toolkit.images import grid, save_png
from toolkit.io.files import FILE_NAME
from toolkit.method import Method, fit
from toolkit.pictures import captioned, masks_of, pictures
from toolkit.runs import TrainingRun, check_writable, progress, timed, write_json
from toolkit.sample import generate

if TYPE_CHECKING:
    from PIL import Image

    from toolkit.edits.base import Edit
    from toolkit.model import Model

ASKED = "config.json"  # beside the edit, and there before it
SAMPLED = 2  # of the prompts are drawn while it trains


@dataclass(frozen=True)
class Trying:
    """How a subject that is learnt is looked at.

    prompts: {} stands for its word. images: of each, at the end. steps: of drawing them. every: steps of training after which samples are
    drawn and a checkpoint is written; 0: never.
    """

    prompts: tuple[str, ...] = (
        "a {}",
        "a {} on a red background",
        "a {} on the left on a blue background",
        "two {} on a yellow background",
    )
    images: int = 2
    steps: int = 12
    every: int = 20

    def __post_init__(self) -> None:
        for prompt in self.prompts:
            if "{}" not in prompt:
                raise UserError(f"prompt {prompt!r} has no place for the word; write {{}} where it goes")

    def of(self, token: str) -> tuple[str, ...]:
        """The prompts with the word put in."""
        return tuple(prompt.replace("{}", token) for prompt in self.prompts)


@dataclass
class Learnt:
    """edit: what was fitted. seconds: of fitting alone. shown: pictures with their prompts."""

    edit: Edit
    seconds: float
    shown: list[tuple[Image.Image, str]] = field(default_factory=list)


def learn(model: Model, method: Method, subject: Subject, out: Path, trying: Trying, origin: dict[str, Any] | None = None) -> Learnt:
    """Learn one subject, draw it, and write into `out` what `palimpsest customize` does, and learned.png.

    origin: what else config.json says, such as the model's name; that file is there from the start on, so that `stopped` knows the rest
    of a run that does not get to its end. Its checkpoints are removed when it does.
    """
    task, prompts = CustomizeTask((subject,)), trying.of(subject.token)
    config = {"method": method.name(), "config": method.config(), **(origin or {}), "task": dataclasses.asdict(task)}
    config["trying"] = dataclasses.asdict(trying)
    write_json(check_writable(out) / ASKED, config)
    sampled = prompts[:SAMPLED] if trying.every else ()
    with timed() as cost:
        edit = fit(method, model, task, TrainingRun(out, trying.every, sample_steps=trying.every if sampled else 0, sample_prompts=sampled))
    learnt = Learnt(edit, cost.seconds)
    asked = [(prompt, seed) for prompt in prompts for seed in range(trying.images)]
    if asked:
        texts, seeds = [prompt for prompt, _ in asked], [seed for _, seed in asked]
        with model.attached(edit), progress("drawing it in new contexts") as show:
            images = generate(model, texts, seeds, steps=trying.steps, progress=show)
        learnt.shown = list(zip(images, texts, strict=True))
        save_png(grid(images, trying.images), out / "learned.png")
    save_result(out, edit, config, dataclasses.asdict(cost))
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return learnt


def can_go_on(out: Path) -> bool:
    """Whether a folder has a run of `learn` that was stopped after its first checkpoint."""
    return any(out.glob("checkpoint-*")) and (out / ASKED).is_file() and not (out / FILE_NAME).is_file()


def stopped(out: Path) -> tuple[Method, Subject, Trying, dict[str, Any]]:
    """What a run was asked that `can_go_on`: the method, the subject with the pictures, masks and captions that are in its folder,
    how it is looked at, and what config.json says."""
    if not can_go_on(out):
        raise UserError(f"{out.name} is no run of learning that was stopped after a checkpoint; choose one from the list")
    asked = json.loads((out / ASKED).read_text(encoding="utf-8"))
    told, (subject,) = asked["trying"], asked["task"]["subjects"]
    trying = Trying(**{**told, "prompts": tuple(told["prompts"])})
    method = registry.load("method", asked["method"]).from_config(asked["config"])
    images, captions = captioned(pictures(out / "images"), out / "images", subject["token"])
    masks = masks_of(images, out / "masks") if subject["masks"] else ()
    return method, Subject(subject["token"], subject["class_name"], images, masks, captions), trying, asked
