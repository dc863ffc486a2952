"""Stage "clip": the text encoder of the embedded model, as one half of an open_clip model trained on the world.

Symmetric contrastive loss over renders and captions. A third of each batch are siblings of other scenes that differ in one
thing (sides swapped, another style, another background, one object replaced), with captions that name everything, so that
the text has to say who is where.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from toolkit.clip import build_clip
from toolkit.runs import TrainingRun
from toolkit.world.captions import caption
from toolkit.world.scenes import BACKGROUNDS, Scene, World, allowed, load_world, pick
from trainers.loop import Batch, LoopConfig, Objective, train
from trainers.world.legs import next_leg
from trainers.world.tokenizer import build_tokenizer
from trainers.world.vae import to_pixels, training_scene

WIDTH, LAYERS, HEADS, CONTEXT = 256, 3, 4, 77


def clip_config(vocab_size: int) -> dict[str, Any]:
    """The open_clip model configuration."""
    return {
        "embed_dim": 256,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 20, "head_width": 64},
        "text_cfg": {"context_length": CONTEXT, "vocab_size": vocab_size, "width": WIDTH, "heads": HEADS, "layers": LAYERS},
    }


def encode_text(clip: Any, ids: Tensor) -> Tensor:
    """Pooled text features [n, embed_dim] of ids [n, L]. Unlike open_clip's own, L may be shorter than the context."""
    length = ids.shape[1]
    x = clip.token_embedding(ids) + clip.positional_embedding[:length]
    x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask[:length, :length]))
    return x[torch.arange(len(x)), ids.argmax(-1)] @ clip.text_projection


def sibling(world: World, scene: Scene, rng: np.random.Generator) -> Scene:
    """A scene that differs in one thing."""
    while True:
        change = int(rng.integers(4))
        if change == 0 and len(scene.items) > 1:
            other = scene.swapped()
        elif change == 1:
            other = replace(scene, style=pick(rng, list(world.styles)))
        elif change == 2 and scene.items:
            index, names = int(rng.integers(len(scene.items))), world.names("scored", "extra")
            items = list(scene.items)
            items[index] = (items[index][0], pick(rng, names))
            other = replace(scene, items=tuple(items))
        else:
            other = replace(scene, background=pick(rng, list(BACKGROUNDS)))
        if other != scene and allowed(other):
            return other


class CLIPObjective(Objective):
    """The symmetric contrastive loss (CLIP, arXiv 2103.00020)."""

    def __init__(self, tokenizer: CLIPTokenizer, seed: int, batch_size: int = 192) -> None:
        torch.manual_seed(seed)
        self.module: Any = build_clip(clip_config(len(tokenizer)))
        self.world, self.tokenizer, self.seed, self.batch_size = load_world(), tokenizer, seed, batch_size

    def batch(self, rng: np.random.Generator) -> tuple[Tensor, list[str]]:
        """Pixels and captions."""
        scenes = [training_scene(self.world, rng) for _ in range(self.batch_size * 2 // 3)]
        captions = [caption(self.world, scene, rng, full=i % 2 == 0) for i, scene in enumerate(scenes)]
        twins = [sibling(self.world, scene, rng) for scene in scenes[::2]]
        captions += [caption(self.world, scene, rng, full=True) for scene in twins]
        pixels = np.stack([self.world.render(scene, rng)[0] for scene in scenes + twins])
        return to_pixels(pixels), captions

    def encode_captions(self, captions: list[str], device: torch.device) -> Tensor:
        """Text features in the captions' order; captions of like length are padded together."""
        ids = [self.tokenizer(text).input_ids for text in captions]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        parts = []
        for chunk in np.array_split(order, 4):
            padded = self.tokenizer.pad({"input_ids": [ids[i] for i in chunk]}, return_tensors="pt")
            parts.append(encode_text(self.module, padded["input_ids"].to(device)))
        return torch.cat(parts)[torch.tensor(order, device=device).argsort()]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        clip = self.module
        device = clip.logit_scale.device
        pixels, captions = self.batch(np.random.default_rng([4, self.seed, batch.number]))
        image = F.normalize(clip.encode_image(pixels.to(device)).float(), dim=-1)
        text = F.normalize(self.encode_captions(captions, device).float(), dim=-1)
        logits = clip.logit_scale.exp().clamp(max=100) * image @ text.T
        truth = torch.arange(len(logits), device=device)
        accuracy = (logits.argmax(1) == truth).float().mean().item()
        return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2, {"top1": accuracy}


def to_text_model(clip: Any, tokenizer: Any) -> CLIPTextModel:
    """The text half as transformers' CLIPTextModel; the same numbers (tested)."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=CONTEXT,
        hidden_act="gelu",
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    state = {
        "embeddings.token_embedding.weight": clip.token_embedding.weight,
        "embeddings.position_embedding.weight": clip.positional_embedding,
        "final_layer_norm.weight": clip.ln_final.weight,
        "final_layer_norm.bias": clip.ln_final.bias,
    }
    names = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for i, block in enumerate(clip.transformer.resblocks):
        source = block.state_dict()
        for kind in ("weight", "bias"):
            for old, new in names.items():
                state[f"encoder.layers.{i}.{new}.{kind}"] = source[f"{old}.{kind}"]
            for part, rows in zip("qkv", source[f"attn.in_proj_{kind}"].chunk(3), strict=True):
                state[f"encoder.layers.{i}.self_attn.{part}_proj.{kind}"] = rows
    model = CLIPTextModel(config)
    model.load_state_dict({key: value.detach().clone() for key, value in state.items()}, strict=True)
    return model.eval()


def train_clip(work: Path, name: str, steps: int, seed: int) -> tuple[Any, CLIPTokenizer]:
    """Train and write `work/name`: open_clip config and weights, and the tokenizer. Where it exists, this is another leg."""
    folder = work / name
    weights = folder / "open_clip_model.safetensors"
    with next_leg(work, name) as (leg, run_folder):
        tokenizer = CLIPTokenizer.from_pretrained(folder) if weights.exists() else build_tokenizer()
        objective = CLIPObjective(tokenizer, seed + 100 * leg)
        if weights.exists():
            objective.module.load_state_dict(load_file(weights))
        config = LoopConfig(
            max_train_steps=steps,
            learning_rate=1e-3,
            lr_scheduler="cosine",
            lr_warmup_steps=60,
            weight_decay=0.05,
            mixed_precision="auto",
        )
        train(objective, config, TrainingRun(run_folder, 200), title=name)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(folder)
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": clip_config(len(tokenizer))}, indent=1))
        save_file({key: value.contiguous() for key, value in objective.module.state_dict().items()}, weights)
    return objective.module, tokenizer


def run(work: Path, steps: int | None) -> None:
    """Train the generator's text encoder and write `work/clip`, and its text half as `work/text_encoder` and `work/tokenizer`."""
    clip, tokenizer = train_clip(work, "clip", steps or 1000, seed=0)
    to_text_model(clip.cpu(), tokenizer).save_pretrained(work / "text_encoder")
    tokenizer.save_pretrained(work / "tokenizer")
