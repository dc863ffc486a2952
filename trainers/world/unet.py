"""Stage "unet": the denoiser of the embedded model, on latents and captions of a pool of scenes that is renewed as it is used up.

v-prediction, timesteps that prefer the noisy end (where captions decide what is drawn), more weight where objects are, 10 % of
captions dropped for classifier-free guidance, Muon, EMA weights. The text encoder and the autoencoder are frozen; their outputs
are computed once per pool.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from toolkit.runs import TrainingRun, computes_in_bf16
from toolkit.world.scenes import load_world
from trainers.loop import Batch, LoopConfig, Objective, train
from trainers.muon import Muon
from trainers.timesteps import stratified
from trainers.world.clip import CONTEXT, WIDTH
from trainers.world.legs import next_leg
from trainers.world.vae import render_batch

CONFIG = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (96, 192),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": (2, 4),  # diffusers' historical name for the number of heads
    "norm_num_groups": 32,
}
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
}
POOL, EPOCHS, CHUNK = 12_288, 8, 128
ON_OBJECTS = 4.0  # how much more an error on an object weighs than one on the background


class UNetObjective(Objective):
    """Mean squared error of the velocity (Salimans & Ho, arXiv 2202.00512), weighted by where objects are."""

    def __init__(self, unet: UNet2DConditionModel, work: Path, leg: int, batch_size: int = 32) -> None:
        self.module: UNet2DConditionModel = unet.train()
        nn.Module.to(unet, memory_format=torch.channels_last)  # 7 % faster on a CPU
        unet.set_attn_processor(AttnProcessor())  # at 256 positions and fewer, plain products beat the fused kernel on a CPU
        self.world, self.leg, self.batch_size = load_world(), leg, batch_size
        self.vae: Any = AutoencoderKL.from_pretrained(work / "vae", torch_dtype=torch.float32).eval().requires_grad_(False)
        self.text: Any
        self.tokenizer, self.text = load_text(work)
        self.noise: Any = DDPMScheduler(**SCHEDULE)
        self.pool = -1
        self.latents = self.hidden = self.weights = torch.empty(0)
        self.nothing = self.encode([""])

    def optimizer(self, parameters: list[nn.Parameter], config: LoopConfig) -> torch.optim.Optimizer:
        """Muon inside, AdamW for the first and last convolutions and the embedding of the timestep."""
        named = self.module.named_parameters()
        outer = ("conv_in", "conv_out", "time")
        return Muon(named, config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, outer=outer)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> Tensor:
        """Captions -> hidden states [n, 77, d]."""
        device = self.text.device
        ids = self.tokenizer(captions, padding="max_length", max_length=CONTEXT, return_tensors="pt").input_ids.to(device)
        return self.text(ids).last_hidden_state

    @torch.no_grad()
    def fill(self, pool: int) -> None:
        """Render, encode and keep the scenes of a pool."""
        rng = np.random.default_rng([6, self.leg, pool])
        latents, hidden, weights = [], [], []
        device = next(self.module.parameters()).device
        self.vae.to(device)
        self.text.to(device)
        self.nothing = self.nothing.to(device)
        for _ in tqdm(range(POOL // CHUNK), desc="pool", leave=False):
            pixels, captions, cover = render_batch(self.world, rng, CHUNK)
            weights.append(1 + (ON_OBJECTS - 1) * F.adaptive_max_pool2d(cover.to(device), CONFIG["sample_size"]))
            with torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bf16(device.type)):
                latents.append(self.vae.encode(pixels.to(device)).latent_dist.mean.float() * self.vae.config["scaling_factor"])
                hidden.append(self.encode(captions))
        self.latents, self.hidden, self.weights, self.pool = torch.cat(latents), torch.cat(hidden), torch.cat(weights), pool
        self.weights /= self.weights.mean()

    @staticmethod
    def timesteps(count: int) -> Tensor:
        """1000 u^0.6 [count], u stratified over the batch: more noisy ones than others."""
        return (1000 * stratified(count) ** 0.6).long().clamp(max=999)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        step, per_epoch = batch.number, POOL // self.batch_size
        pool, epoch = step // (per_epoch * EPOCHS), step // per_epoch
        if pool != self.pool:
            self.fill(pool)
        order = np.random.default_rng([7, self.leg, epoch]).permutation(POOL)
        rows = torch.from_numpy(order[step % per_epoch * self.batch_size :][: self.batch_size])
        x0, hidden, weights = self.latents[rows], self.hidden[rows], self.weights[rows]
        hidden = torch.where(torch.rand(len(rows), 1, 1, device=hidden.device) < 0.1, self.nothing, hidden)
        noise = torch.randn_like(x0)
        t = self.timesteps(len(rows)).to(x0.device)
        noisy = self.noise.add_noise(x0, noise, t)
        output = self.module(noisy, t, hidden).sample
        errors = (output.float() - self.noise.get_velocity(x0, noise, t)).square()
        return (errors * weights).mean(), {"v_mse": errors.mean().item()}


def load_text(work: Path) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """The frozen text encoder of stage "clip"."""
    text = CLIPTextModel.from_pretrained(work / "text_encoder", dtype=torch.float32)
    return CLIPTokenizer.from_pretrained(work / "tokenizer"), text.eval().requires_grad_(False)


def run(work: Path, steps: int | None) -> None:
    """Train and write `work/unet` (a diffusers folder). Where it exists already, this is another leg from there."""
    final = work / "unet"
    with next_leg(work, "unet") as (leg, folder):
        unet = UNet2DConditionModel.from_pretrained(final, torch_dtype=torch.float32) if final.exists() else UNet2DConditionModel(**CONFIG)
        config = LoopConfig(
            max_train_steps=steps or 4000,
            learning_rate=1e-3,
            lr_scheduler="cosine",
            lr_warmup_steps=150,
            weight_decay=0.01,
            ema_decay=0.999,
            mixed_precision="auto",
            seed=leg,
        )
        train(UNetObjective(unet, work, leg), config, TrainingRun(folder, 250), title="unet")
        unet.eval().save_pretrained(final)
