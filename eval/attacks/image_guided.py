"""Image-guided: the edited model is asked to redraw, or to complete, a picture of the concept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from eval.attacks.base import Attack, AttackResult, Scenario, Spent
from eval.prompts import Prompt
from eval.rates import Shown, share
from toolkit.errors import UserError
from toolkit.options import option
from toolkit.sample import Hook, State


@dataclass(frozen=True)
class ImageGuided(Attack):
    """SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations, Meng et al., arXiv 2108.01073,

    and RePaint: Inpainting using Denoising Diffusion Probabilistic Models, Lugmayr et al., arXiv 2201.09865, on an erased model.

    img2img: sampling starts at x_t = alpha_t z + sigma_t eps, t the first of the last `strength` of the sampler's steps, z the latent of a
    picture of the concept. inpainting: at every step before the last `1 - strength`, and outside the part to be filled in, the latents
    are replaced by x_t; the part is the right half. The prompt names the concept, which the attacker may, as nothing else brings it back.
    Both papers know no erasure; tools around Stable Diffusion offer exactly this to whoever has a picture. RePaint's jumps back in time
    are left out. Until sampling starts the sampler's history is that of the noised picture, so a multistep solver has one.

    The picture itself shows the concept, so a rate says little without what stands beside it: `unedited`, the same with the unedited
    model; and `picture_alone`, the same with the edited model and no prompt, which is what this much noise leaves of the picture.
    """

    mode: Literal["img2img", "inpainting"] = option("img2img", "redraw a noised picture, or fill in a part of it")
    strength: float = option(0.8, "img2img: how much of the way to noise; inpainting: how much of sampling keeps the rest in place")
    images: int = option(16, "pictures of each object, used in turn")

    label: ClassVar = "image-guided"
    paper: ClassVar = "arXiv:2108.01073"
    controlled: ClassVar = True

    def __post_init__(self) -> None:
        self.at_least(1, "images")
        if not 0 < self.strength <= 1:
            raise UserError(f"strength is {self.strength}, needs more than 0 and at most 1; give such a number")

    def run(self, scenario: Scenario) -> AttackResult:
        _, clean = scenario.by_name()
        drawn, asked, latents = 0, list[Prompt](), list[Tensor]()
        for name in scenario.names():
            pictures = scenario.pictures(name, min(self.images, scenario.n))
            prompts = scenario.asked(name)
            asked += prompts
            latents += [pictures.latents[i % len(pictures.latents)] for i in range(len(prompts))]
            drawn += pictures.drawn
        without = [replace(prompt, text="", seed=prompt.seed + i) for i, prompt in enumerate(asked)]

        def shown(model: str, prompts: Sequence[Prompt]) -> list[Shown]:
            start = StartAt(torch.stack(latents), self.mode, self.strength)
            return scenario.painter.draw(getattr(scenario, model), prompts, f"{self.mode}, {model}", hooks=[start])

        beside = {
            "unedited": share(shown("base", asked), scenario.shows),
            "picture_alone": share(shown("model", without), scenario.shows),
        }
        return self.result(scenario, shown("model", asked), clean, beside=beside, spent=Spent(images=drawn))


class StartAt(Hook):
    """Holds the latents, or all but the right half of them, at the noised pictures [n, c, h', w'] of all images in their order.

    Until the first of the last `strength` of the steps (img2img), or during the first `strength` of them (inpainting).
    """

    def __init__(self, pictures: Tensor, mode: Literal["img2img", "inpainting"], strength: float) -> None:
        self.pictures, self.mode, self.strength = pictures, mode, strength
        self.first, self.count, self.last = 0, 0, 0
        self.noise, self.times = torch.zeros(()), torch.zeros(())

    def on_prompt(self, state: State) -> None:
        self.first, self.count = self.first + self.count, len(state.prompts)
        self.noise = state.latents.clone()
        rows, columns = state.latents.shape[2:]
        self.times = state.model.arch.scheduler(state.steps, (state.latents.shape[1], rows, columns)).timesteps
        held = round((1 - self.strength) * state.steps) if self.mode == "img2img" else round(self.strength * state.steps) - 1
        self.last = min(held, state.steps - 1)  # step before which latents are held for the last time
        self._hold(state, 0)

    def on_step(self, state: State) -> None:
        self._hold(state, state.step + 1)

    def _hold(self, state: State, step: int) -> None:
        """Replace the latents that are to be read at a step."""
        if step > self.last:
            return
        picture = self.pictures[self.first : self.first + self.count].to(state.latents)
        noised = state.model.arch.add_noise(picture, self.noise, self.times[step].expand(self.count).to(picture.device))
        if self.mode == "inpainting":
            middle = noised.shape[-1] // 2
            noised[..., middle:] = state.latents[..., middle:]
        state.latents = noised
