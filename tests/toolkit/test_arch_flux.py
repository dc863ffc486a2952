"""The Flux.1 adapter agrees with diffusers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from toolkit.arch.flux import Flux
from toolkit.arch.text import Text
from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.sample import Hook, State, noise, sample

PROMPTS = ["a photo of a Cat", "a picture of a pistol on a plain background"]


@pytest.fixture(scope="module")
def dev() -> Flux:
    return Flux.tiny()


@pytest.fixture(scope="module")
def schnell() -> Flux:
    return Flux.tiny(distilled=False)


def drawn_by_the_pipeline(arch: Flux, height: int, width: int, **options: Any) -> torch.Tensor:
    start = noise(PROMPTS, [0, 1], arch.latent_shape(height, width))
    packed = arch.pipe._pack_latents(start, *start.shape)
    pixels = {"latents": packed, "height": height, "width": width, "output_type": "pt"}
    return arch.pipe(PROMPTS, num_inference_steps=3, max_sequence_length=arch.t5_length, **pixels, **options).images


@pytest.mark.parametrize("distilled", [True, False])
def test_encode_is_what_the_pipeline_reads(distilled: bool) -> None:
    arch = Flux.tiny(distilled=distilled)
    prompts = [*PROMPTS, "x " * 100]  # CLIP's is cut
    hidden, pooled, _ = arch.pipe.encode_prompt(prompts, device="cpu", max_sequence_length=arch.t5_length)
    text = arch.encode(prompts)
    assert text.pooled is not None and text.hidden.shape == (3, 512 if distilled else 256, 80)
    assert torch.equal(text.hidden, hidden) and torch.equal(text.pooled, pooled)
    assert (text.ids[[0, 1, 2], text.length - 1] == arch.pipe.tokenizer_2.eos_token_id).all()
    with pytest.raises(UserError, match="600 tokens, 511 fit" if distilled else "600 tokens, 255 fit"):
        arch.encode(["x " * 300])


@pytest.mark.parametrize("guidance", [3.5, 1.0])
def test_dev_draws_the_image_that_the_pipeline_draws(dev: Flux, guidance: float) -> None:
    ours = sample(Model(dev), PROMPTS, [0, 1], steps=3, guidance=guidance, size=(16, 24))
    assert ours.std() > 1e-3, "a constant image would prove nothing"
    torch.testing.assert_close(ours, drawn_by_the_pipeline(dev, 16, 24, guidance_scale=guidance), atol=1e-5, rtol=0)


def test_schnell_draws_the_image_that_the_pipeline_draws(schnell: Flux) -> None:
    ours = sample(Model(schnell), PROMPTS, [0, 1], steps=3, size=(16, 24))
    assert ours.std() > 1e-3, "a constant image would prove nothing"
    torch.testing.assert_close(ours, drawn_by_the_pipeline(schnell, 16, 24, guidance_scale=0.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("negative", ["", "a dog"])
def test_schnell_takes_classifier_free_guidance_too(schnell: Flux, negative: str) -> None:
    ours = sample(Model(schnell), PROMPTS, [0, 1], steps=3, guidance=3.0, negative=negative)
    theirs = drawn_by_the_pipeline(schnell, 16, 16, true_cfg_scale=3.0, negative_prompt=[negative] * 2)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert not torch.allclose(ours, sample(Model(schnell), PROMPTS, [0, 1], steps=3), atol=1e-3)


def test_guidance_of_dev_is_an_input_and_no_second_prediction(dev: Flux, schnell: Flux) -> None:
    assert (Model(dev).guidance, dev.distilled_guidance) == (3.5, True)
    assert (Model(schnell).guidance, schnell.distilled_guidance) == (1.0, False)
    seen: list[tuple[int, list[float]]] = []

    class Each(Hook):
        """Another scale for each image, and another text, without a scale of its own."""

        def on_prompt(self, state: State) -> None:
            state.guidance = torch.tensor([3.5, 7.0]).view(-1, 1, 1, 1)
            state.texts["prompt"] = state.model.arch.encode(PROMPTS[::-1])

        def on_prediction(self, state: State) -> None:
            seen.append((len(state.outputs), state.guidance.flatten().tolist()))

    ours = sample(Model(dev), PROMPTS, [0, 1], steps=1, hooks=[Each()])
    text = replace(dev.encode(PROMPTS[::-1]), guidance=torch.tensor([3.5, 7.0]))
    start = noise(PROMPTS, [0, 1], dev.latent_shape(16, 16))
    x0 = start - dev.predict(start, torch.tensor([1000.0, 1000.0]), text)
    torch.testing.assert_close(ours, (dev.decode_latents(x0) / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)
    assert seen == [(1, [3.5, 7.0])]
    with pytest.raises(UserError, match="'a dog' for flux, which is guided without a second prediction"):
        sample(Model(dev), PROMPTS, [0, 1], negative="a dog")


def test_text_without_a_guidance_is_read_at_one(dev: Flux, schnell: Flux) -> None:
    latents, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 700])
    plain, one, five = (replace(dev.encode(PROMPTS), guidance=scale) for scale in (None, torch.ones(2), torch.full((2,), 5.0)))
    assert torch.equal(dev.predict(latents, t, plain), dev.predict(latents, t, one))
    assert not torch.allclose(dev.predict(latents, t, one), dev.predict(latents, t, five), atol=1e-4)
    assert torch.equal(schnell.predict(latents, t, schnell.encode(PROMPTS)), schnell.predict(latents, t, replace(five, **kept(schnell))))
    again = Text.cat([five[:1], one[torch.tensor([1])]])
    assert again.guidance is not None and again.guidance.tolist() == [5.0, 1.0] and Text.cat([plain, plain]).guidance is None


def kept(arch: Flux) -> dict[str, torch.Tensor | None]:
    text = arch.encode(PROMPTS)
    return {"hidden": text.hidden, "ids": text.ids, "length": text.length, "pooled": text.pooled}


def test_larger_images_take_noisier_steps_on_dev_only(dev: Flux, schnell: Flux) -> None:
    shapes = ((dev, 8), (dev, 128), (schnell, 8), (schnell, 128))
    schedulers: list[Any] = [arch.scheduler(4, (4, side, side)) for arch, side in shapes]
    small, large, *even = (scheduler.timesteps for scheduler in schedulers)
    assert (large[1:] > small[1:]).all() and large[0] == small[0] == 1000
    assert all(torch.equal(timesteps, torch.tensor([1000.0, 750.0, 500.0, 250.0])) for timesteps in even)


def test_parts(dev: Flux) -> None:
    assert list(dev.components()) == ["denoiser", "text_encoder", "text_encoder_2", "vae"]
    assert list(dev.tokenizers()) == list(dev.token_embeddings()) == ["text_encoder", "text_encoder_2"]
    assert [layer.in_features for layer in dev.text_linears().values()] == [80, 32]
    assert list(dev.attention_sites()) == ["denoiser.transformer_blocks.0.attn", "denoiser.single_transformer_blocks.0.attn"]
    assert len(dev.lora_targets()) == 11
    paths = {"denoiser": "context_embedder", "text_encoder": "encoder.layers.0.mlp.fc1", "text_encoder_2": "shared"}
    keys = [dev.diffusers_lora_key(f"{part}.{path}") for part, path in paths.items()]
    assert keys == ["transformer.context_embedder", "text_encoder.text_model.encoder.layers.0.mlp.fc1", "text_encoder_2.shared"]
