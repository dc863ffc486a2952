"""What a frozen model passes through while it draws: its latents at every step, and what it predicts there.

Erasing by steering asks for the frozen model's predictions at partly denoised latents. On its way to an image the sampler makes
just these predictions, with and without the prompt, so that both are had for the price of the drawing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from toolkit.runs import progress
from toolkit.sample import Hook, State, trajectory

if TYPE_CHECKING:
    from toolkit.model import Model


@dataclass(frozen=True)
class Trajectories:
    """n drawings of `steps` steps.

    latents [n, steps, c, h', w'] before each step, t [steps] the timestep there. outputs: condition -> what the denoiser gives for it
    there, like the latents: "prompt", "negative" (no prompt), and others that were asked for. All on the CPU.
    """

    latents: Tensor
    t: Tensor
    outputs: Mapping[str, Tensor]

    @classmethod
    def of(
        cls,
        model: Model,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int,
        guidance: float,
        amp: bool = False,
        beside: Mapping[str, Sequence[str]] | None = None,
    ) -> Trajectories:
        """Of these prompts with these seeds. guidance: above 1. amp: predicted under bfloat16 autocast. beside: condition -> a prompt for
        each drawing, which is predicted too."""
        seen = _Seen(beside or {})
        with progress("trajectories") as show:
            trajectory(model, prompts, seeds, steps=steps, guidance=guidance, hooks=[seen], progress=show, amp=amp)
        joined = {name: torch.cat([torch.stack(batch, 1) for batch in batches]) for name, batches in seen.found.items()}
        return cls(joined.pop("latents"), torch.tensor(seen.times[:steps]), joined)


class _Seen(Hook):
    """found: what is seen -> for each batch, its value at every step."""

    def __init__(self, beside: Mapping[str, Sequence[str]]) -> None:
        self.beside, self.found, self.times, self.first = beside, dict[str, list[list[Tensor]]](), list[float](), 0

    def on_prompt(self, state: State) -> None:
        own = slice(self.first, self.first + len(state.prompts))
        for name, prompts in self.beside.items():
            state.texts[name] = state.model.arch.encode(list(prompts[own]))
        self.first = own.stop
        for name in ("latents", *state.texts):
            self.found.setdefault(name, []).append([])

    def on_prediction(self, state: State) -> None:
        self.times.append(state.t.item())
        for name, value in {"latents": state.latents, **state.outputs}.items():
            self.found[name][-1].append(value.cpu())
