"""The Stable Diffusion XL adapter agrees with diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from toolkit.arch.sdxl import SDXL
from toolkit.edits.token import TokenEdit
from toolkit.model import Model, load_model
from toolkit.sample import noise, sample

PROMPTS = ["a photo of a cat", "a picture of a pistol on a plain background"]


@pytest.fixture(scope="module")
def arch() -> SDXL:
    return SDXL.tiny()


def test_encode_is_what_the_pipeline_reads(arch: SDXL) -> None:
    hidden, negative, pooled, negative_pooled = arch.pipe.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=True)
    text, opposite = arch.encode(PROMPTS), arch.encode_negative(["", "a dog"])
    assert text.pooled is not None and opposite.pooled is not None
    assert torch.equal(text.hidden, hidden) and torch.equal(text.pooled, pooled)
    assert torch.equal(opposite.hidden[0], negative[0]) and torch.equal(opposite.pooled[0], negative_pooled[0])
    assert opposite.hidden[1].any() and arch.encode([""]).hidden.any()


@pytest.mark.parametrize("negative", ["", "a dog"])
def test_an_image_is_the_one_that_the_pipeline_draws(arch: SDXL, negative: str) -> None:
    ours = sample(Model(arch), PROMPTS, [0, 1], steps=3, guidance=3.0, negative=negative)
    pipe: Any = arch.pipe
    old, pipe.scheduler = pipe.scheduler, arch.scheduler(3)
    try:
        start = noise(PROMPTS, [0, 1], arch.latent_shape(16, 16))
        said = [negative] * 2 if negative else None
        options = {"num_inference_steps": 3, "guidance_scale": 3.0, "negative_prompt": said, "output_type": "pt"}
        theirs = pipe(PROMPTS, latents=start, height=16, width=16, **options).images
    finally:
        pipe.scheduler = old
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_load_reads_what_save_wrote(arch: SDXL, tmp_path: Path) -> None:
    model = Model(arch)
    widths = {part: embedding.embedding_dim for part, embedding in arch.token_embeddings().items()}
    word = TokenEdit.from_rows({"<toy>": {part: torch.ones(2, width) for part, width in widths.items()}})
    with model.attached(word):
        expected = arch.encode(["a <toy>"])
        saved = model.save(tmp_path / "model")
    loaded = load_model(str(saved)).arch.encode(["a <toy>"])
    assert isinstance(loaded.pooled, torch.Tensor) and isinstance(expected.pooled, torch.Tensor)
    assert torch.equal(loaded.hidden, expected.hidden) and torch.equal(loaded.pooled, expected.pooled)


def test_parts(arch: SDXL) -> None:
    assert set(arch.components()) == {"denoiser", "text_encoder", "text_encoder_2", "vae"}
    assert all(linear.in_features == 72 for linear in arch.text_linears().values())
    keys = [arch.diffusers_lora_key(f"{part}.{path}.q_proj") for part, path in TEXT_LAYERS.items()]
    assert keys == [f"{part}.text_model.encoder.layers.0.self_attn.q_proj" for part in TEXT_LAYERS]
    assert arch.diffusers_lora_key("text_encoder_2.text_projection") == "text_encoder_2.text_projection"


TEXT_LAYERS = {
    "text_encoder": "encoder.layers.0.self_attn",
    "text_encoder_2": "text_model.encoder.layers.0.self_attn",
}
