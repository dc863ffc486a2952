"""Stage "vae": the autoencoder of the embedded model, 64x64 pixels to a 16x16 latent grid.

Loss: L1 + L2 + a small KL term; bf16 autocast; batches are rendered on the fly from the step number. Most steps see 32x32
windows around objects, where the detail is (six times as many objects a second); the last fifth sees whole images, so that the
group norms meet their statistics. Once a denoiser has been trained on the latents, a leg trains the decoder only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from toolkit.runs import TrainingRun
from toolkit.world.captions import caption
from toolkit.world.scenes import PLACES, SIZE, Scene, World, load_world, random_scene
from trainers.loop import Batch, LoopConfig, Objective, train
from trainers.world.legs import next_leg

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "mid_block_add_attention": False,
    "sample_size": 64,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
}
KL_WEIGHT = 5e-5
CROP, CROPS = 32, 64


def training_scene(world: World, rng: np.random.Generator, scored: float = 0.85) -> Scene:
    """A scene of the training set: scored objects most of the time, scored and extra ones together otherwise."""
    names = world.names("scored") if rng.random() < scored else world.names("scored", "extra")
    return random_scene(world, names, rng)


def render_batch(world: World, rng: np.random.Generator, size: int) -> tuple[Tensor, list[str], Tensor]:
    """Pixels [size, 3, 64, 64] in [-1, 1], their captions, and 1 where an object is [size, 1, 64, 64]."""
    scenes = [training_scene(world, rng) for _ in range(size)]
    pixels, masks = zip(*(world.render(scene, rng) for scene in scenes), strict=True)
    cover = torch.from_numpy(np.stack([mask.any(axis=0, keepdims=True) for mask in masks])).float()
    return to_pixels(np.stack(pixels)), [caption(world, scene, rng) for scene in scenes], cover


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 [n, h, w, 3] -> float [n, 3, h, w] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def crop_batch(world: World, rng: np.random.Generator) -> Tensor:
    """Windows [64, 3, 32, 32] in [-1, 1], two from each scene, each around a part of an object."""
    crops = []
    while len(crops) < CROPS:
        scene = training_scene(world, rng)
        image, _ = world.render(scene, rng)
        for _ in range(2):
            place = scene.items[int(rng.integers(len(scene.items)))][0] if scene.items else "center"
            centre = np.array(PLACES[place][:2]) + rng.integers(-10, 11, size=2)
            x, y = np.clip(centre - CROP // 2, 0, SIZE - CROP)
            crops.append(image[y : y + CROP, x : x + CROP])
    return to_pixels(np.stack(crops[:CROPS]))


class VAEObjective(Objective):
    """L1 + L2 reconstruction with a KL term per latent element."""

    def __init__(self, vae: AutoencoderKL, leg: int, whole_from: int, batch_size: int = 16) -> None:
        self.module: AutoencoderKL = vae.train()
        self.world, self.leg, self.whole_from, self.batch_size = load_world(), leg, whole_from, batch_size

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        device = next(self.module.parameters()).device
        rng = np.random.default_rng([1, self.leg, batch.number])
        pixels = crop_batch(self.world, rng) if batch.number < self.whole_from else render_batch(self.world, rng, self.batch_size)[0]
        pixels = pixels.to(device)
        vae: Any = self.module  # diffusers' annotations do not know its outputs
        posterior = vae.encode(pixels).latent_dist
        error = vae.decode(posterior.sample()).sample.float() - pixels
        mse = error.square().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        psnr = 10 * torch.log10(4 / mse).item()
        return error.abs().mean() + mse + KL_WEIGHT * kl, {"psnr": psnr, "kl": kl.item()}


def run(work: Path, steps: int | None) -> None:
    """Train and write `work/vae` (a diffusers folder). Where it exists already, this is another leg from there.

    Where `work/unet` exists too, the encoder stays as it is: the denoiser knows its latents.
    """
    total, final, keep_latents = steps or 2800, work / "vae", (work / "unet").exists()
    with next_leg(work, "vae") as (leg, folder):
        vae: Any = AutoencoderKL.from_pretrained(final, torch_dtype=torch.float32) if final.exists() else AutoencoderKL(**CONFIG)
        if keep_latents:
            vae.encoder.requires_grad_(False)
            vae.quant_conv.requires_grad_(False)
        config = LoopConfig(
            max_train_steps=total,
            learning_rate=1e-3,
            lr_scheduler="linear",
            lr_warmup_steps=50,
            weight_decay=0.0,
            ema_decay=0.999,
            mixed_precision="auto",
            seed=leg,
        )
        objective = VAEObjective(vae, leg, whole_from=total * 4 // 5)
        train(objective, config, TrainingRun(folder, 250), title="vae")
        (vae.eval() if keep_latents else finish(vae)).save_pretrained(final)


@torch.no_grad()
def finish(vae: Any, images: int = 512) -> Any:
    """Set the scaling factor so that latents have unit variance."""
    pixels, *_ = render_batch(load_world(), np.random.default_rng(2), images)
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(64)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return vae.eval()
