"""Stage "oracle": train the classifier that says what an image shows, on renders only.

Half of what it should call `none` comes from spoilt objects: blends of two, halves, blurs, noise, shuffled tiles; the other
half from places where nothing is.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from torch import Tensor

from toolkit.runs import TrainingRun
from toolkit.world.oracle import NONE, Oracle, windows
from toolkit.world.scenes import PLACES, Scene, World, blank, load_world, paste, pick, random_scene
from trainers.loop import Batch, LoopConfig, Objective, train
from trainers.world.legs import next_leg
from trainers.world.vae import to_pixels

SPOILT = 0.15  # share of objects that are spoilt


def spoil(world: World, sprite: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Something of the size of an object that is none: a blend, a half, a blur, noise or shuffled tiles."""
    side = sprite.width
    kind = int(rng.integers(5))
    if kind == 0:
        other = world.sprite(pick(rng, list(world.things)), pick(rng, list(world.styles)), side)
        return Image.blend(sprite, other, float(rng.uniform(0.4, 0.6)))
    if kind == 1:
        turned = sprite.rotate(90 * int(rng.integers(4)))
        turned.paste((0, 0, 0, 0), (0, 0, side // 2, side))
        return turned
    if kind == 2:
        return sprite.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.14, 0.25)) * side))
    pixels = np.asarray(sprite).copy()
    if kind == 3:
        coarse = rng.integers(0, 256, size=(int(rng.integers(3, 12)),) * 2 + (4,), dtype=np.uint8)
        coarse[..., 3] = np.maximum(coarse[..., 3], 64)
        return Image.fromarray(coarse, "RGBA").resize((side, side), Image.Resampling.BICUBIC)
    n = int(rng.integers(2, 4))
    cut = side // n
    tiles = [pixels[i * cut : (i + 1) * cut, j * cut : (j + 1) * cut].copy() for i in range(n) for j in range(n)]
    order = np.roll(np.arange(n * n), int(rng.integers(1, n * n)))
    for slot, tile in enumerate(order):
        i, j = divmod(slot, n)
        pixels[i * cut : (i + 1) * cut, j * cut : (j + 1) * cut] = tiles[tile]
    return Image.fromarray(pixels, "RGBA")


def draw(world: World, scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, str]]:
    """Pixels [64, 64, 3] and what is at each place; some objects are spoilt and count as none."""
    canvas = blank(scene.background, rng)
    truth = dict.fromkeys(PLACES, NONE)
    for place, name in scene.items:
        spoilt = rng.random() < SPOILT
        place_loosely(canvas, place, world, name, scene.style, rng, spoilt)
        truth[place] = NONE if spoilt else name
    return np.asarray(canvas), truth


def place_loosely(canvas: Image.Image, place: str, world: World, name: str, style: str, rng: np.random.Generator, spoilt: bool) -> None:
    """Draw an object, spoilt or not, up to 3 pixels (4 in the middle) beside its place and up to 2 larger or smaller."""
    sprite = world.sprite(name, style, PLACES[place][2] + int(rng.integers(-2, 3)))
    reach = 4 if place == "center" else 3
    dx, dy = rng.integers(-reach, reach + 1, size=2)
    paste(canvas, place, spoil(world, sprite, rng) if spoilt else sprite, (int(dx), int(dy)))


def blemish(pixels: Tensor) -> Tensor:
    """Slight blur, noise and colour shifts, as any generator leaves them."""
    n = len(pixels)
    soft = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = torch.rand(n, 1, 1, 1) * 0.8
    pixels = (1 - share) * pixels + share * soft
    pixels = pixels + torch.randn(n, 3, 1, 1) * 0.03 + torch.randn_like(pixels) * torch.rand(n, 1, 1, 1) * 0.06
    return pixels.clamp(-1, 1)


class OracleObjective(Objective):
    """Cross-entropy of objects, styles and backgrounds."""

    def __init__(self, leg: int = 0, batch_size: int = 96) -> None:
        self.module: Oracle = Oracle()
        self.world, self.leg, self.batch_size = load_world(), leg, batch_size

    def batch(self, rng: np.random.Generator) -> tuple[Tensor, list[Scene], list[dict[str, str]]]:
        """Pixels, scenes and what each place shows."""
        all_names, main = self.world.names("scored", "held_out", "extra"), self.world.names("scored", "held_out")
        scenes = [random_scene(self.world, main if rng.random() < 0.6 else all_names, rng) for _ in range(self.batch_size)]
        drawn = [draw(self.world, scene, rng) for scene in scenes]
        return blemish(to_pixels(np.stack([image for image, _ in drawn]))), scenes, [truth for _, truth in drawn]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([5, self.leg, batch.number])
        device = self.module.object_head.weight.device
        pixels, scenes, truths = self.batch(rng)
        rows, names, styles = [], [], []
        for i, (scene, truth) in enumerate(zip(scenes, truths, strict=True)):
            places = {place for place, _ in scene.items} | {pick(rng, list(PLACES))}
            for j, place in enumerate(PLACES):
                if place in places:
                    rows.append(7 * i + j)
                    names.append(self.module.names.index(truth[place]))
                    styles.append(self.module.styles.index(scene.style) if truth[place] != NONE else -100)
        ruined = torch.from_numpy(rng.random(len(pixels)) < 0.06)  # no background to name: coarse noise instead of an image
        noise = F.interpolate(torch.randn(len(pixels), 3, 8, 8), (64, 64), mode="bicubic").clamp(-1, 1)
        seen = torch.where(ruined[:, None, None, None], noise, pixels).to(device)
        grounds = torch.tensor([self.module.backgrounds.index(scene.background) for scene in scenes])
        grounds[ruined] = self.module.backgrounds.index(NONE)
        objects, drawn = self.module(windows(pixels.to(device)).flatten(0, 1)[rows])
        truth_names, truth_styles = torch.tensor(names, device=device), torch.tensor(styles, device=device)
        loss = F.cross_entropy(objects.float(), truth_names) + F.cross_entropy(drawn.float(), truth_styles)
        loss = loss + 0.3 * F.cross_entropy(self.module.background(seen).float(), grounds.to(device))
        known = truth_styles >= 0
        return loss, {
            "object": (objects.argmax(-1) == truth_names).float().mean().item(),
            "style": (drawn.argmax(-1) == truth_styles)[known].float().mean().item(),
        }


def run(work: Path, steps: int | None) -> None:
    """Train and write `work/oracle.safetensors`. Where it exists, this is another leg."""
    final = work / "oracle.safetensors"
    with next_leg(work, "oracle") as (leg, folder):
        objective = OracleObjective(leg)
        if final.exists():
            objective.module.load_state_dict(load_file(final))
        config = LoopConfig(
            max_train_steps=steps or 2000,
            learning_rate=2e-3,
            lr_scheduler="cosine",
            lr_warmup_steps=50,
            weight_decay=0.02,
            ema_decay=0.0,
            mixed_precision="auto",
        )
        train(objective, config, TrainingRun(folder, 400), title="oracle")
        state = {key: value.half() if value.is_floating_point() else value for key, value in objective.module.state_dict().items()}
        save_file(state, final)
