from __future__ import annotations

import pytest
import torch

from eval.attacks.base import Scenario
from eval.attacks.relearn import Relearn
from eval.prompts import Prompt, resolve
from tests.eval.images import Renderer, reading
from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.world.oracle import Oracle, Reading
from toolkit.world.scenes import World

SMALL = {"images": 2, "train_batch_size": 2, "rank": 2, "learning_rate": 0.01}


def scenario(world: World, untrained: Oracle, model: Model) -> Scenario:
    def erased(prompt: Prompt) -> Reading | None:
        """Until the model has learnt again: then two edits are attached."""
        return reading({}, background=prompt.scene.background) if len(model.edits) == 1 else None

    return Scenario(world, Renderer(untrained, spoil=erased), model, model.reference(), resolve(world, "pistol"), n=4)


def test_the_edited_model_is_trained_and_asked_after_each_number_of_steps(world: World, untrained: Oracle, edited: Model) -> None:
    before = {name: value.clone() for name, value in edited.arch.components()["denoiser"].named_parameters()}
    found = Relearn(steps=(1, 3), **SMALL).run(scenario(world, untrained, edited))
    assert found.clean_rate.value == 0 and found.attack_success_rate.value == 1
    assert set(found.beside) == {"after_1_steps"} and found.spent.steps == 3 and found.label == "fine-tuning"
    assert all("pistol" in prompt for prompt in found.prompts), "it is asked for by its own name"
    assert len(edited.edits) == 1
    after = dict(edited.arch.components()["denoiser"].named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_it_learns_the_pictures_on_top_of_the_edit(world: World, untrained: Oracle, edited: Model) -> None:
    tried = scenario(world, untrained, edited)
    pictures = tried.pictures("pistol", 2)
    captions = [caption.format("pistol") for caption in pictures.captions]
    edits = Relearn(steps=(1, 30), **SMALL).trained(tried, pictures.latents, captions)
    assert list(edits) == [1, 30]

    def error() -> float:
        draw, t = torch.Generator().manual_seed(0), torch.linspace(50, 950, 32).long()
        z = pictures.latents[torch.arange(32) % 2]
        noise = torch.randn(z.shape, generator=draw)
        with torch.no_grad():
            text = edited.arch.encode([captions[i % 2] for i in range(32)])
            return float(
                (edited.arch.predict(edited.arch.add_noise(z, noise, t), t, text) - edited.arch.target(z, noise, t)).square().mean()
            )

    errors = [error()]
    for edit in edits.values():
        with edited.attached(edit):
            errors.append(error())
    assert errors[2] < errors[1] and errors[2] < errors[0]


@pytest.mark.parametrize("steps", [(), (0,), (3, 2), (2, 2)])
def test_steps_grow(steps: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="growing numbers"):
        Relearn(steps=steps)
