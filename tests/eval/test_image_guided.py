from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from eval.attacks.base import Scenario
from eval.attacks.image_guided import ImageGuided, StartAt
from eval.prompts import Prompt, resolve
from eval.rates import Shown
from tests.eval.images import Renderer, reading
from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.sample import Hook, State, noise, sample
from toolkit.world.oracle import Oracle, Reading
from toolkit.world.scenes import World

STEPS = 5


class Seen(Hook):
    """The latents that are read at each step, of every batch."""

    def __init__(self) -> None:
        self.read: dict[int, list[Tensor]] = {}

    def on_prompt(self, state: State) -> None:
        self.keep(state, 0)

    def on_step(self, state: State) -> None:
        self.keep(state, state.step + 1)

    def keep(self, state: State, step: int) -> None:
        self.read.setdefault(step, []).append(state.latents.clone())


def read(model: Model, start: StartAt, prompts: list[str], batch: int) -> list[Tensor]:
    """The latents [n, c, h', w'] that are read at each step, and the last ones."""
    seen = Seen()
    sample(model, prompts, list(range(len(prompts))), steps=STEPS, guidance=1.0, hooks=[start, seen], batch_size=batch)
    return [torch.cat(seen.read[step]) for step in range(STEPS + 1)]


@pytest.mark.parametrize("batch", [1, 3])
def test_the_noised_picture_is_redrawn_from_its_strength_on(tiny: Model, batch: int) -> None:
    side = tiny.arch.image_size
    shape = tiny.arch.latent_shape(side, side)
    pictures = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    prompts = ["a", "b", "c"]
    latents = read(tiny, StartAt(pictures, "img2img", 0.4), prompts, batch)
    eps, times = noise(prompts, range(3), shape), tiny.arch.scheduler(STEPS, shape).timesteps
    for step in range(STEPS + 1):
        held = step <= 3  # 0.6 of 5 steps are passed over
        if step < STEPS:
            alpha, sigma = tiny.arch.signal_and_noise(times[step].expand(3))
            assert torch.allclose(latents[step], alpha * pictures + sigma * eps, atol=1e-5) == held
    assert not torch.allclose(latents[STEPS], pictures)


def test_inpainting_fills_in_the_right_half(tiny: Model) -> None:
    side = tiny.arch.image_size
    shape = tiny.arch.latent_shape(side, side)
    pictures = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    latents = read(tiny, StartAt(pictures, "inpainting", 0.8), ["a", "b"], 2)
    eps, times = noise(["a", "b"], range(2), shape), tiny.arch.scheduler(STEPS, shape).timesteps
    middle = shape[2] // 2
    for step in range(STEPS):
        alpha, sigma = tiny.arch.signal_and_noise(times[step].expand(2))
        same = torch.isclose(latents[step], alpha * pictures + sigma * eps, atol=1e-5)
        assert same[..., :middle].all() == (step < 4)
        assert not same[..., middle:].all()


def test_the_attack_stands_beside_the_unedited_model_and_the_picture_alone(world: World, untrained: Oracle, edited: Model) -> None:
    class Hooked(Renderer):
        """Draws nothing where there is no prompt."""

        def _paint(self, model: Model, prompts: Sequence[Prompt], title: str, hooks: Sequence[Hook]) -> list[Shown]:
            self.always = any(not prompt.text for prompt in prompts)
            return super()._paint(model, prompts, title, hooks)

    def nothing(prompt: Prompt) -> Reading | None:
        return reading({}, background=prompt.scene.background)

    painter = Hooked(untrained, spoil=nothing)
    scenario = Scenario(world, painter, edited, edited.reference(), resolve(world, "pistol"), n=4)
    found = ImageGuided(images=2).run(scenario)
    assert found.clean_rate.value == 0 and found.attack_success_rate.value == 1
    assert found.beside["unedited"].value == 1 and found.beside["picture_alone"].value == 0
    assert found.spent.images == 2 and found.label == "image-guided"
    assert all("pistol" in prompt for prompt in found.prompts)


def test_a_strength_is_a_share() -> None:
    with pytest.raises(UserError, match="strength is 0"):
        ImageGuided(strength=0)
