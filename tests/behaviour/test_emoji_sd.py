from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from eval.prompts import objects
from eval.rates import Painter, background_right, object_right, share
from toolkit.concepts import Concept, EraseTask
from toolkit.io.export import export
from toolkit.model import Model
from toolkit.registry import load
from toolkit.world.scenes import ASSETS, World

ERASED = "dog"


@pytest.fixture(scope="module")
def others(world: World) -> tuple[str, ...]:
    return tuple(name for name in world.names("scored") if name != ERASED)


def test_the_model_knows_its_world(world: World, emoji: Model, painter: Painter) -> None:
    names = world.names("scored")
    shown = painter.draw(emoji, objects(world, names[::3], 24))
    assert share(shown, object_right).value >= 0.25
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


def draw(pipe: Any) -> np.ndarray:
    """One image by diffusers' own loop."""
    prompt, generator = f"a {ERASED} on a red background", torch.Generator().manual_seed(0)
    return pipe(prompt, num_inference_steps=5, generator=generator, output_type="np").images[0]
