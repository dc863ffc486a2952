"""The Stable Diffusion 3 adapter agrees with diffusers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from toolkit.arch.sd3 import SD3
from toolkit.errors import UserError
from toolkit.model import Model, load_model
from toolkit.sample import noise, sample

PROMPTS = ["a photo of a Cat", "a picture of a pistol on a plain background"]


@pytest.fixture(scope="module")
def arch() -> SD3:
    return SD3.tiny()


@pytest.fixture
def without_t5() -> SD3:
    pipe = SD3.tiny().pipe
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    return SD3(pipe)


def assert_encodes_like_the_pipeline(arch: SD3, prompts: list[str]) -> None:
    hidden, negative, pooled, negative_pooled = arch.pipe.encode_prompt(prompts, prompts, prompts, device="cpu")
    text, opposite = arch.encode(prompts), arch.encode_negative([""])
    assert text.pooled is not None and opposite.pooled is not None and text.hidden.shape == (len(prompts), 77 + 256, 80)
    assert torch.equal(text.hidden, hidden) and torch.equal(text.pooled, pooled)
    torch.testing.assert_close(opposite.hidden[0], negative[0], atol=1e-5, rtol=0)  # another batch size
    torch.testing.assert_close(opposite.pooled[0], negative_pooled[0], atol=1e-5, rtol=0)


def assert_draws_like_the_pipeline(arch: SD3, height: int, width: int, negative: str = "a dog") -> None:
    ours = sample(Model(arch), PROMPTS, [0, 1], steps=3, guidance=3.0, negative=negative, size=(height, width))
    start = noise(PROMPTS, [0, 1], arch.latent_shape(height, width))
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, "negative_prompt": [negative] * 2, "output_type": "pt"}
    theirs = arch.pipe(PROMPTS, latents=start, height=height, width=width, **options).images
    assert ours.std() > 1e-3, "a constant image would prove nothing"
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_encode_is_what_the_pipeline_reads(arch: SD3) -> None:
    assert_encodes_like_the_pipeline(arch, PROMPTS)
    text = arch.encode(PROMPTS)
    eos = arch.pipe.tokenizer.eos_token_id
    assert text.ids.shape == text.hidden.shape[:2] and (text.ids[[0, 1], text.length - 1] == eos).all()
    assert not text.hidden[:, :77, 72:].any() and text.hidden[:, :77, :72].any() and text.hidden[:, 77:, 72:].any()


@pytest.mark.parametrize("negative", ["", "a dog"])
def test_an_image_is_the_one_that_the_pipeline_draws(arch: SD3, negative: str) -> None:
    assert_draws_like_the_pipeline(arch, 16, 24, negative)


def test_the_default_guidance_is_the_pipelines(arch: SD3) -> None:
    ours = sample(Model(arch), PROMPTS, [0, 1], steps=2)
    start = noise(PROMPTS, [0, 1], arch.latent_shape(16, 16))
    theirs = arch.pipe(PROMPTS, latents=start, height=16, width=16, num_inference_steps=2, output_type="pt").images
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_without_t5(arch: SD3, without_t5: SD3, tmp_path: Path) -> None:
    assert_encodes_like_the_pipeline(without_t5, PROMPTS)
    assert_draws_like_the_pipeline(without_t5, 16, 16)
    text, full = without_t5.encode(PROMPTS), arch.encode(PROMPTS)
    assert not text.hidden[:, 77:].any() and torch.equal(text.hidden[:, :77], full.hidden[:, :77])
    assert len(without_t5.text_streams()["hidden"].segments(text)) == 1
    assert set(without_t5.components()) == {"denoiser", "text_encoder", "text_encoder_2", "vae"}
    assert list(without_t5.tokenizers()) == list(without_t5.token_embeddings()) == ["text_encoder", "text_encoder_2"]
    loaded = load_model(str(without_t5.save(tmp_path / "model"))).arch
    assert torch.equal(loaded.encode(PROMPTS).hidden, text.hidden)


def test_long_prompts_are_cut_for_clip_as_long_as_t5_reads_them(arch: SD3, without_t5: SD3) -> None:
    fits, long, too_long = "x " * 75, "x " * 76, "x " * 256
    assert_encodes_like_the_pipeline(arch, [fits, long])
    assert arch.encode([long]).length.tolist() == [77] and without_t5.encode([fits]).length.tolist() == [77]
    with pytest.raises(UserError, match="76 tokens, 75 fit"):
        without_t5.encode([long])
    with pytest.raises(UserError, match="512 tokens, 255 fit"):
        arch.encode([too_long])


def test_parts(arch: SD3) -> None:
    encoders = ["text_encoder", "text_encoder_2", "text_encoder_3"]
    assert list(arch.components()) == ["denoiser", *encoders, "vae"]
    assert list(arch.tokenizers()) == list(arch.token_embeddings()) == encoders
    assert list(arch.text_linears()) == ["denoiser.context_embedder", "denoiser.time_text_embed.text_embedder.linear_1"]
    assert [layer.in_features for layer in arch.text_linears().values()] == [80, 56]
    assert [site.rpartition(".")[2] for site in arch.attention_sites()] == ["attn", "attn2", "attn"]
    assert len(arch.lora_targets()) == 15, "the last block has no to_add_out, and the second attention of 3.5 is left out"
    paths = {"denoiser": "context_embedder", "text_encoder_2": "text_model.encoder.layers.0.mlp.fc1", "text_encoder_3": "shared"}
    keys = [arch.diffusers_lora_key(f"{part}.{path}") for part, path in paths.items()]
    assert keys == ["transformer.context_embedder", "text_encoder_2.text_model.encoder.layers.0.mlp.fc1", "text_encoder_3.shared"]


def test_an_image_without_positions_is_refused(arch: SD3) -> None:
    assert arch.latent_shape(64, 16) == (4, 32, 8)
    with pytest.raises(UserError, match="16x68 is above the 64 that the model has positions for"):
        arch.latent_shape(16, 68)
