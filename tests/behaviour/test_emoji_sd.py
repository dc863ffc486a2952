from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from eval.cells import alone
from eval.commands.demo import CLASS_NAME, LEARNER, LEARNER_OPTIONS, STYLE, SUBJECT, TOKEN
from eval.prompts import objects, single
from eval.rates import Painter, background_right, object_right, retained, share, target_accuracy
from eval.subjects import subject
from toolkit.concepts import Concept, CustomizeTask, EraseTask
from toolkit.io.export import export
from toolkit.model import Model
from toolkit.registry import load
from toolkit.world.kept import everything_else
from toolkit.world.scenes import ASSETS, World

ERASED = "dog"


@pytest.fixture(scope="module")
def others(world: World) -> tuple[str, ...]:
    return everything_else(world, [ERASED])


def test_the_model_knows_its_world(world: World, emoji: Model, painter: Painter) -> None:
    names = world.names("scored")
    shown = painter.draw(emoji, objects(world, names[::3], 24))
    assert share(shown, object_right).value >= 0.8
    assert share(shown, background_right).value >= 0.9


def test_an_exported_lora_draws_in_diffusers_what_the_edit_draws(emoji: Model, others: tuple[str, ...], tmp_path: Path) -> None:
    edit = load("method", "uce").from_config({}).fit(emoji, EraseTask((Concept(ERASED, anchor="cat"),), preserve=others))
    export(edit, "diffusers-lora", tmp_path, emoji)
    pipe: Any = StableDiffusionPipeline.from_pretrained(ASSETS / "emoji-sd", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    plain = draw(pipe)
    with emoji.attached(edit):
        attached = draw(emoji.arch.pipe)
    pipe.load_lora_weights(tmp_path)
    assert np.abs(draw(pipe) - attached).max() < 2 / 255
    assert np.abs(plain - attached).max() > 0.1


@pytest.mark.parametrize("method", ["uce", "rece"])
def test_an_erased_object_goes_and_the_others_stay(
    method: str, world: World, emoji: Model, painter: Painter, others: tuple[str, ...]
) -> None:
    concept = Concept(ERASED, synonyms=world.things[ERASED].given)
    edit = load("method", method).from_config({}).fit(emoji, EraseTask((concept,), preserve=others))
    named, spoken = single(world, ERASED, 12), single(world, ERASED, 8, words=concept.synonyms)
    rest = objects(world, [name for name in world.names("scored") if name != ERASED][::3], 24)
    before = [painter.draw(emoji, asked) for asked in (named, rest)]
    with emoji.attached(edit):
        by_name, by_synonym, kept = (painter.draw(emoji, asked) for asked in (named, spoken, rest))
    assert target_accuracy(before[0], {ERASED}).value >= 0.9
    assert target_accuracy(by_name, {ERASED}).value <= 0.2
    assert target_accuracy(by_synonym, {ERASED}).value <= 0.25
    assert retained(before[1], kept).objects.value >= 0.85


WORD = {"num_vectors": 4, "max_train_steps": 200, "learning_rate": 0.01, "timestep_sampling": "cubic", "mixed_precision": "auto"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options", "shown", "stay"), [("textual_inversion", WORD, 0.2, 0.95), (LEARNER, LEARNER_OPTIONS, 0.6, 0.7)]
)
def test_a_learnt_subject_is_drawn_and_the_others_stay(
    world: World, emoji: Model, painter: Painter, tmp_path: Path, method: str, options: dict[str, Any], shown: float, stay: float
) -> None:
    """Not the bars of docs/methods.md, some of which are missed, but what a broken one does not reach."""
    learner = load("method", method).from_config(options)
    edit = learner.fit(emoji, CustomizeTask((subject(world, tmp_path, SUBJECT, CLASS_NAME, TOKEN, STYLE),)))
    rest = objects(world, world.names("scored")[::3], 24)
    by_class, before = painter.draw(emoji, alone(CLASS_NAME, SUBJECT, 16)), painter.draw(emoji, rest)
    with emoji.attached(edit):
        learnt, kept = painter.draw(emoji, alone(TOKEN, SUBJECT, 16)), painter.draw(emoji, rest)
    assert target_accuracy(by_class, {SUBJECT}).value == 0
    assert target_accuracy(learnt, {SUBJECT}).value >= shown
    assert retained(before, kept).objects.value >= stay


def draw(pipe: Any) -> np.ndarray:
    """One image by diffusers' own loop."""
    prompt, generator = f"a {ERASED} on a red background", torch.Generator().manual_seed(0)
    return pipe(prompt, num_inference_steps=5, generator=generator, output_type="np").images[0]
