"""Masks of several subjects in one picture, made of what the denoiser attends to (AttenCraft, Chen et al., arXiv 2405.17965)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.attention import attention_maps, grid_of, self_attention_sites, token_places
from toolkit.errors import UserError
from toolkit.runs import seeded

if TYPE_CHECKING:
    from toolkit.arch.base import Architecture
    from toolkit.arch.text import Text

POWER = 4  # how many times attention is passed on between places
LEVELS = (0.2, 0.4, 0.6)  # parts of the noise at which a single word is looked for
WINDOW, STABLE = 7, (0.01**2, 0.03**2)  # of the structural similarity: its window, and what keeps its quotients finite


@torch.no_grad()
def spread(
    arch: Architecture, latents: Tensor, t: Tensor, text: Text, tokens: Tensor, sides: tuple[int, int], rivals: int = 0
) -> tuple[Tensor, Tensor]:
    """How much each place of a noised picture belongs to each of some words, from 0 to 1.

        M_i = minmax( A C_i^2 ),    A = minmax( minmax(S)^4 )

    with C_i the cross-attention to the word, S the self-attention, means over heads and layers near a side, and minmax the map from
    its smallest value to its largest. What a place attends to is thereby passed on to places that attend to it.
    rivals: so many of the first words share places among them, M_i has C_i^2 / (C_1 + C_2 + ...) in place of their C_i; 0: none do.

    latents, t, text: of one picture. tokens: [k, L], True for those of each word. sides: of the maps of cross- and self-attention.
    Returns M and C, [k, h, w] at the size of the latter.
    """
    cross, own = list(arch.cross_attention_sites()), self_attention_sites(arch)
    size = (latents.shape[2], latents.shape[3])
    with attention_maps(arch, [*cross, *own]) as maps:
        arch.predict(latents, t, text)
        seen = maps.mean(maps.near(sides[0], cross)).float()[0] @ tokens.T.to(latents.device, torch.float32)  # [places, k]
        among = maps.mean(maps.near(sides[1], own)).float()[0]  # [places, places]
    shared = torch.cat([seen[:, :rivals] * F.normalize(seen[:, :rivals], p=1), seen[:, rivals:]], 1)
    grid = grid_of(len(among), size)
    maps_of = torch.cat([seen, shared], 1).T.unflatten(1, grid_of(len(seen), size))[:, None]
    looked, shared = F.interpolate(maps_of, grid, mode="bicubic").flatten(1).chunk(2)  # [k, places] each
    sharp = minmax(minmax(shared).square())
    together = minmax(torch.linalg.matrix_power(minmax(among.flatten()).view_as(among), POWER).flatten()).view_as(among)
    return minmax(sharp @ together.T).unflatten(1, grid), looked.unflatten(1, grid)


def minmax(values: Tensor) -> Tensor:
    """Along the last axis, from 0 at the smallest to 1 at the largest."""
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    return (values - low) / (high - low).clamp(min=1e-12)


def apart(belongs: Tensor, threshold: float) -> Tensor | None:
    """Masks [k - 1, h, w] of all words but the last, which is the background's, from how much places belong to each [k, h, w].

    A place is a word's when it belongs to it by the threshold more than to any other. None when a mask is empty, or lies more
    on another word than on its own, so that the words are not told apart.
    """
    best, second = belongs.topk(2, dim=0).values
    masks = F.one_hot(belongs.argmax(0), len(belongs)).movedim(-1, 0) * (best - second > threshold)
    overlap = masks[:-1].to(belongs).flatten(1) @ belongs[:-1].flatten(1).T
    right = masks[:-1].flatten(1).any(1).all() and (overlap.argmax(1) == torch.arange(len(overlap), device=belongs.device)).all()
    return masks[:-1].to(belongs) if right else None


@torch.no_grad()
def foreground(arch: Architecture, latents: Tensor, class_name: str, sides: tuple[int, int] = (16, 32)) -> Tensor:
    """Where a thing of this class is in pictures, from 0 to 1 at the places of their latents [n, c, h, w]: [n, h, w].

    `spread` for one word, the mean over `LEVELS` of noise; what belongs to it by less than half is 0, the rest 1. Each picture has some.
    """
    prompt = f"a {class_name}"
    tokens = token_places(arch, [prompt], [class_name])
    if not tokens.any():
        raise UserError(f"{class_name!r} is no words that the model reads; give a class name such as dog")
    text, found = arch.encode([prompt]), []
    for number, latent in enumerate(latents.split(1)):
        noise = torch.randn(latent.shape, generator=seeded("foreground", number)).to(latent)
        maps = []
        for level in LEVELS:
            t = torch.tensor([int(level * arch.train_timesteps)], device=latent.device)
            maps.append(spread(arch, arch.add_noise(latent, noise, t), t, text, tokens, sides)[0])
        belongs = minmax(torch.stack(maps).mean(0).flatten(1)).unflatten(1, maps[0].shape[1:])
        found.append(F.interpolate(belongs[None], latent.shape[2:], mode="bilinear")[0, 0].gt(0.5).float())
    return torch.stack(found)


def similarity(one: Tensor, other: Tensor) -> Tensor:
    """The structural similarity of masks [k, h, w], each with its fellow [k] (Wang et al. 2004), over square windows."""

    def mean(values: Tensor) -> Tensor:
        return F.avg_pool2d(values[:, None], min(WINDOW, *values.shape[1:]), stride=1)[:, 0]

    a, b = mean(one), mean(other)
    varies, varied, along = mean(one * one) - a * a, mean(other * other) - b * b, mean(one * other) - a * b
    first, second = STABLE
    ssim = (2 * a * b + first) * (2 * along + second) / ((a * a + b * b + first) * (varies + varied + second))
    return ssim.flatten(1).mean(1)
