"""What a picture shows, without being told: regions that attend to themselves (the first part of ConceptExpress, arXiv 2407.07077)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.attention import AttentionMaps, attention_maps, grid_of, self_attention_sites
from toolkit.runs import seeded
from trainers.attention_masks import minmax
from trainers.clusters import agglomerate, touching

if TYPE_CHECKING:
    from collections.abc import Sequence

    from toolkit.arch.base import Architecture

Foreground = Literal["spread", "end_of_text"]


@dataclass(frozen=True)
class Attended:
    """What a picture's places attend to when the prompt is empty.

    among: [places, places], each row a distribution over the places of `grid`. words: how much each attends to the end of the text
    [places]. spread: how far it attends, the entropy of its row in the finest maps [places].
    """

    among: Tensor
    words: Tensor
    spread: Tensor
    grid: tuple[int, int]


@dataclass(frozen=True)
class Found:
    """masks: [k, h, w] in {0, 1}, one for each concept, the largest first. features: [k, h, w], what its places attend to on average."""

    masks: Tensor
    features: Tensor


@torch.no_grad()
def attended(arch: Architecture, latent: Tensor, level: float, draws: int, seed: int) -> Attended:
    """Reads attention at a noise level (a part of all timesteps), mean over as many noises; at level 0 the latent [1, c, h', w'] is clean.

    Self-attention is that of all layers, each enlarged to the finest and weighted by its side, as in the official code.
    """
    cross, own = list(arch.cross_attention_sites()), self_attention_sites(arch)
    size = (latent.shape[2], latent.shape[3])
    text, t = arch.encode([""]), torch.tensor([int(level * arch.train_timesteps)], device=latent.device)
    end = int(text.length[0]) - 1
    among, words, spread = [], [], []
    for number in range(draws):
        noise = torch.randn(latent.shape, generator=seeded("concepts", seed, number)).to(latent)
        with attention_maps(arch, [*cross, *own]) as maps:
            arch.predict(arch.add_noise(latent, noise, t) if level else latent, t, text)
            finest = maps.near(max(size), own)
            fine = maps.mean(finest)[0].float()
            grid = grid_of(len(fine), size)
            among.append(_of_all(maps, own, size, grid))
            seen = maps.mean(maps.near(max(grid), cross))[0, :, end].float()
            words.append(F.interpolate(seen.unflatten(0, grid_of(len(seen), size))[None, None], grid, mode="bilinear").flatten())
            spread.append(fine)
    row = torch.stack(spread).mean(0)
    return Attended(torch.stack(among).mean(0), torch.stack(words).mean(0), torch.special.entr(row).sum(-1), grid)


def _of_all(maps: AttentionMaps, sites: Sequence[str], size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Self-attention [places, places] of all sites of one picture at the places of a grid."""
    total = torch.zeros(())
    for site in sites:
        seen = maps.probabilities(site)[0].mean(0).float()
        rows, columns = grid_of(len(seen), size)
        seen = F.interpolate(seen.unflatten(1, (rows, columns))[None], grid, mode="bilinear")[0].flatten(1)
        seen = F.interpolate(seen.T.unflatten(1, (rows, columns))[None], grid, mode="nearest")[0].flatten(1).T
        total = total.to(seen) + rows * seen / seen.sum(-1, keepdim=True)
    return total / total.sum(-1, keepdim=True)


def find(seen: Attended, *, regions: int, foreground: Foreground, limit: float, least: float, most: int | None = None) -> Found:
    """Concepts: regions of the foreground, merged with their neighbours while they attend to the same.

    regions: how many the picture is cut into first. foreground: "spread", whose places attend less far than the picture's mean, or
    "end_of_text", who attend more to it. limit: Jensen-Shannon divergence up to which neighbours are one. least: the smallest part
    of the picture that is a concept. most: no more than these, the largest, and neighbours stay apart when they are as few.
    """
    rows, grid = seen.among.double().cpu().numpy(), seen.grid
    places = np.arange(len(rows)).reshape(grid)
    region = agglomerate(rows, [1] * len(rows), touching(places), until=regions)
    score = minmax(-seen.spread if foreground == "spread" else seen.words).double().cpu().numpy()
    kept = [one for one in range(region.max() + 1) if score[region == one].mean() > score.mean()]
    number = np.full(region.max() + 1, -1)
    number[kept] = np.arange(len(kept))
    means = np.stack([rows[region == one].mean(0) for one in kept]) if kept else np.zeros((0, len(rows)))
    sizes = [int((region == one).sum()) for one in kept]
    if not kept:
        return Found(torch.zeros(0, *grid), torch.zeros(0, *grid))
    concept = agglomerate(means, sizes, touching(number[region].reshape(grid)), until=most or 1, limit=limit, evenly=True)
    members = [np.isin(region, np.array(kept)[concept == one]) for one in range(concept.max() + 1)]
    members = sorted((one for one in members if one.mean() >= least), key=lambda one: -int(one.sum()))[:most]
    masks = np.array(members).reshape(-1, *grid)
    features = np.array([rows[one].mean(0) for one in members]).reshape(-1, *grid)
    return Found(torch.from_numpy(masks).float(), torch.from_numpy(features).float())
