"""Whether images look like the world's own pictures, whatever they show (oracle-KID), and how far they have moved.

Kernel Inception Distance (Binkowski et al., Demystifying MMD GANs, arXiv 1801.01401) is the unbiased squared maximum mean
discrepancy under the kernel k(x, y) = (x^T y / d + 1)^3. Here the features are the oracle's instead of Inception's, so its
values compare only with each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from eval.intervals import NOTHING, Estimate, jackknife
from eval.rates import Shown
from toolkit.runs import seeded
from toolkit.world.oracle import Oracle, as_pixels, windows
from toolkit.world.scenes import BACKGROUNDS, Scene, World


def polynomial_mmd(x: Tensor, y: Tensor) -> Estimate:
    """The unbiased MMD^2 of features x, y [n, d] (equally many), with its jackknife interval over pairs of rows."""
    n, d = x.shape
    if n < 3:
        return NOTHING
    x, y = x.double(), y.double()
    xx, yy, xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    # The U-statistic of h((x, y), (x', y')) = k(x, x') + k(y, y') - k(x, y') - k(x', y) over pairs of different rows.
    h = xx + yy - xy - xy.T
    h.fill_diagonal_(0)
    total, rows = h.sum(), h.sum(1)
    left_out = (total - 2 * rows) / ((n - 1) * (n - 2))
    return jackknife(float(total / (n * (n - 1))), left_out.tolist())


def unpaired_mmd(x: Tensor, y: Tensor) -> Estimate:
    """The unbiased MMD^2 of features x [n, d] and y [m, d], with the normal interval of both samples' jackknifes."""
    (n, d), m = x.shape, len(y)
    if min(n, m) < 3:
        return NOTHING
    x, y = x.double(), y.double()
    xx, yy, xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    value, half = -2 * float(xy.mean()), 0.0
    for own, across in ((xx, xy), (yy, xy.T)):
        k, (_, others) = len(own), across.shape
        own = own.fill_diagonal_(0)
        total, rows = own.sum(), own.sum(1)
        value += float(total / (k * (k - 1)))
        left_out = (total - 2 * rows) / ((k - 1) * (k - 2)) - 2 * (across.sum() - across.sum(1)) / ((k - 1) * others)
        half = math.hypot(half, jackknife(0.0, left_out.tolist()).high)  # the samples are independent: variances add up
    return Estimate(value, value - half, value + half, n)


@torch.no_grad()
def features(oracle: Oracle, images: Tensor) -> Tensor:
    """Images [n, 3, h, w] in [0, 1] -> the oracle's features of every place, side by side [n, 7 * 224]."""
    device = next(oracle.parameters()).device
    parts = [oracle.trunk(windows(part.to(device)).flatten(0, 1)).mean((2, 3)).cpu() for part in as_pixels(images).split(128)]
    return torch.cat(parts).view(len(images), -1)


def oracle_kid(world: World, oracle: Oracle, shown: Sequence[Shown]) -> Estimate:
    """Distance of images to renders of what the oracle reads in them: 0 for the world's own pictures.

    An image without any readable object is compared with the empty background, so that a smear is far from it.
    """
    if not shown:
        return NOTHING
    renders = [world.render(scene_of(world, item), _rng(item))[0] for item in shown]
    legitimate = torch.from_numpy(np.stack(renders)).permute(0, 3, 1, 2).float() / 255
    images = torch.stack([item.pixels for item in shown]).float() / 255
    return polynomial_mmd(features(oracle, images), features(oracle, legitimate))


def drift(before: Sequence[Shown], after: Sequence[Shown]) -> list[float]:
    """How far each image has moved from its fellow: the root mean square of its pixels' differences, in parts of their range."""
    pairs = zip(before, after, strict=True)
    return [((a.pixels.float() - b.pixels.float()) / 255).square().mean().sqrt().item() for a, b in pairs]


def scene_of(world: World, shown: Shown) -> Scene:
    """The scene that the oracle reads in an image; what it cannot read is as asked for."""
    reading, asked = shown.reading, shown.prompt.scene
    styles = [*reading.styles.values(), *([asked.style] if asked.style else world.styles)]
    background = reading.background if reading.background in BACKGROUNDS else asked.background
    return Scene(background, max(styles, key=styles.count), tuple(reading.present().items()))


def _rng(shown: Shown) -> np.random.Generator:
    return np.random.default_rng(seeded("legitimate", shown.prompt.text, shown.prompt.seed).initial_seed())
