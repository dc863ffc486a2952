"""What methods that erase by training share: steps of trajectories as samples, and the parameters that they train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from toolkit.arch.text import Text
from toolkit.runs import seeded

if TYPE_CHECKING:
    from toolkit.arch.base import Architecture

Parameters = Literal["x", "x_strict", "u", "all"]


class Samples:
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


def parameter_names(arch: Architecture, which: Parameters) -> list[str]:
    """The denoiser's parameters that are trained."""
    keys_and_values = [f"{site}.weight" for site in arch.text_linears()]
    if which == "x_strict":
        return keys_and_values
    every = [f"denoiser.{name}" for name, _ in arch.components()["denoiser"].named_parameters()]
    cross = tuple(f"{site}." for site in arch.cross_attention_sites())
    return [name for name in every if which == "all" or name.startswith(cross) == (which == "x")]
