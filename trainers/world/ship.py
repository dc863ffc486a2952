"""Stage "ship": put the trained parts into toolkit/world/assets as fp16, in the layouts that other tools load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from toolkit.arch.sd import SD
from toolkit.model import Model
from toolkit.world.scenes import ASSETS
from trainers.world.unet import SCHEDULE, load_text


def run(work: Path, steps: int | None) -> None:
    """Write `emoji-sd` (a Stable Diffusion folder), `metric-clip` and the oracle; parts not trained yet are left out."""
    if (work / "unet").exists():
        tokenizer, text = load_text(work)
        parts: dict[str, Any] = {
            "vae": AutoencoderKL.from_pretrained(work / "vae"),
            "text_encoder": text,
            "tokenizer": tokenizer,
            "unet": UNet2DConditionModel.from_pretrained(work / "unet"),
            "scheduler": DDIMScheduler(**SCHEDULE, set_alpha_to_one=False, steps_offset=1),
            "safety_checker": None,
            "feature_extractor": None,
        }
        pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False).to(dtype=torch.float16)
        part = ASSETS / "emoji-sd.part"
        shutil.rmtree(part, ignore_errors=True)
        Model(SD(pipe), "emoji-sd").save(part)
        for config in part.glob("*/config.json"):  # not where on this machine it was trained
            told = json.loads(config.read_text())
            told.pop("_name_or_path", None)
            config.write_text(json.dumps(told, indent=2) + "\n")
        shutil.rmtree(ASSETS / "emoji-sd", ignore_errors=True)
        part.rename(ASSETS / "emoji-sd")
    if (work / "oracle.safetensors").exists():
        shutil.copyfile(work / "oracle.safetensors", ASSETS / "oracle.safetensors")
    if (work / "metric_clip").exists():
        final = ASSETS / "metric-clip"
        shutil.copytree(work / "metric_clip", final, dirs_exist_ok=True)
        weights = load_file(final / "open_clip_model.safetensors")
        halves = {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}
        save_file(halves, final / "open_clip_model.safetensors")
