"""What methods that erase by training share: steps of trajectories and noised latents, as samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from toolkit.arch.text import Text
from toolkit.runs import seeded

if TYPE_CHECKING:
    from toolkit.arch.base import Architecture


class TrajectorySteps:
    """Every step of every trajectory, with the prompt that is asked there and what the answer should be.

    latents, target: [n, steps, c, h', w']. t: [steps].
    """

    def __init__(self, arch: Architecture, prompts: Sequence[str], latents: Tensor, t: Tensor, target: Tensor) -> None:
        distinct = list(dict.fromkeys(prompts))
        self.text: Text = arch.encode(distinct)
        self.row = torch.tensor([distinct.index(prompt) for prompt in prompts])
        self.latents, self.t, self.target = latents, t, target

    def pick(self, *key: str | int) -> tuple[int, int]:
        """A trajectory and a step, uniformly, from the key alone."""
        draw = seeded(*key)
        return tuple(int(torch.randint(size, (), generator=draw)) for size in self.latents.shape[:2])  # pyright: ignore[reportReturnType]

    def at(self, rows: Sequence[int], steps: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor, Text, Tensor]:
        """Latents, timesteps, text and target of these steps of these trajectories."""
        i, k = torch.tensor(rows), torch.tensor(steps)
        return self.latents[i, k].to(device), self.t[k].to(device), self.text[self.row[i].to(device)], self.target[i, k].to(device)


@dataclass(frozen=True)
class Noised:
    """latents [n, c, h', w'], at t [n]. target, like the latents: what training asks of the denoiser there."""

    latents: Tensor
    t: Tensor
    target: Tensor


def noised(arch: Architecture, z: Tensor, draws: Sequence[torch.Generator], times: Sequence[int] | None = None) -> Noised:
    """Latents [n, c, h', w'] with noise, each from its own generator. times: timesteps; None draws them uniformly, before the noise."""
    t = times or [int(torch.randint(arch.train_timesteps, (), generator=draw)) for draw in draws]
    t = torch.tensor(t, device=z.device)
    noise = torch.stack([torch.randn(z.shape[1:], generator=draw) for draw in draws]).to(z)
    return Noised(arch.add_noise(z, noise, t), t, arch.target(z, noise, t))
