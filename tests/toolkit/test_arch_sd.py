"""The Stable Diffusion adapter: its verbs agree with diffusers and with each other."""

from typing import Any

import pytest
import torch
from accelerate import hooks
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from toolkit.arch.sd import SD
from toolkit.arch.text import Text
from toolkit.errors import UserError

PREDICTIONS = ("epsilon", "v_prediction")


@pytest.fixture(scope="module")
def arch() -> SD:
    return SD.tiny()


def test_tiny_depends_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    one, before = SD.tiny(seed=3), torch.get_rng_state()
    torch.manual_seed(6)
    two, other = SD.tiny(seed=3), SD.tiny(seed=4)
    for component, module in one.components().items():
        for name, value in module.state_dict().items():
            assert torch.equal(value, two.components()[component].state_dict()[name]), name
    prompt = ["a photo of a cat"]
    assert not torch.allclose(one.encode(prompt).hidden, other.encode(prompt).hidden)
    torch.manual_seed(5)
    assert torch.equal(before, torch.get_rng_state()), "building a model must not touch the caller's random state"


def test_tiny_special_tokens(arch: SD) -> None:
    tokenizer, config = arch.tokenizers()["text_encoder"], arch.pipe.text_encoder.config
    size = len(tokenizer)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (size - 2, size - 1)
    assert config.eos_token_id == tokenizer.eos_token_id != 2
    assert config.vocab_size == size == arch.token_embeddings()["text_encoder"].num_embeddings


def test_encode_is_what_the_pipeline_reads(arch: SD) -> None:
    prompts = ["a photo of a cat", "", "a picture of a pistol on a plain background"]
    text = arch.encode(prompts)
    expected = arch.pipe.encode_prompt(prompts, "cpu", 1, False)[0]
    assert torch.equal(text.hidden, expected)
    assert text.hidden.shape == (3, 77, 32) and not text.hidden.requires_grad
    eos = arch.pipe.tokenizer.eos_token_id
    for ids, length in zip(text.ids, text.length, strict=True):
        assert (ids == eos).nonzero()[0].item() == length - 1


def test_prompts_are_told_apart(arch: SD) -> None:
    text = arch.encode(["a cat", "a dog", "a cat"])
    last = text.hidden[torch.arange(3), text.length - 2]
    assert torch.equal(last[0], last[2]) and (last[0] - last[1]).norm() > 0.1 * last[0].norm()


def test_text_batches(arch: SD) -> None:
    text = arch.encode(["a cat", "a dog", "x"])
    again = Text.cat([text[:1], text[torch.tensor([1, 2])]])
    assert len(again) == 3 and torch.equal(again.hidden, text.hidden) and torch.equal(again.length, text.length)


def test_tokens_go_where_inputs_go(arch: SD, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where the encoder is, which one that is offloaded leaves."""
    monkeypatch.setattr(SD, "device", torch.device("meta"))
    assert arch.tokenize(["a cat"], "text_encoder")[0].device.type == "meta"


def test_the_device_is_the_pipelines_also_of_offloaded_parts() -> None:
    arch = SD.tiny()
    assert arch.device == arch.pipe._execution_device == torch.device("cpu")
    for part in arch.components().values():
        hooks.add_hook_to_module(part, hooks.AlignDevicesHook(execution_device="meta"))
    assert arch.device == arch.pipe._execution_device == torch.device("meta")


def test_encode_keeps_the_graph_on_demand(arch: SD) -> None:
    embedding = arch.token_embeddings()["text_encoder"]
    embedding.weight.requires_grad_(True)
    try:
        assert not arch.encode(["a cat"]).hidden.requires_grad
        arch.encode(["a cat"], grad=True).hidden[..., 0].sum().backward()
        assert embedding.weight.grad is not None and embedding.weight.grad.abs().sum() > 0
    finally:
        embedding.weight.requires_grad_(False).grad = None


def test_a_prompt_that_does_not_fit_is_an_error(arch: SD) -> None:
    fits, too_long = "x " * 75, "x " * 76
    assert arch.encode([fits]).length.tolist() == [77]
    with pytest.raises(UserError, match=r"76 tokens, 75 fit"):
        arch.encode(["a cat", too_long])


def test_sites(arch: SD) -> None:
    unet = arch.pipe.unet
    linears, targets, attention = arch.text_linears(), arch.lora_targets(), arch.attention_sites()
    cross = [name for name in attention if name.endswith("attn2")]
    assert len(attention) == 2 * len(cross) == 14
    assert sorted(linears) == sorted(f"{site}.{linear}" for site in cross for linear in ("to_k", "to_v"))
    assert sorted(arch.value_linears()) == sorted(f"{site}.to_v" for site in cross)
    assert len(targets) == 4 * len(attention) and linears.keys() < targets.keys()
    for site, linear in linears.items():
        assert linear is unet.get_submodule(site.removeprefix("denoiser."))
        assert linear.bias is None and linear.in_features == 32


def test_all_layers_that_read_text_read_the_whole_hidden_state(arch: SD) -> None:
    [stream], text = arch.text_streams().values(), arch.encode(["a cat", "a dog"])
    [segment] = stream.segments(text[1:])
    assert stream.linears == arch.text_linears() and (segment.leading, segment.causal) == (1, True)
    assert segment.ids is not None and torch.equal(segment.rows, text.hidden[1:]) and torch.equal(segment.ids, text.ids[1:])
    assert segment.length.tolist() == text.length.tolist()[1:]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noise_agrees_with_diffusers(prediction: str) -> None:
    arch = SD.tiny(prediction_type=prediction)  # type: ignore[arg-type]
    theirs: Any = DDIMScheduler.from_config(arch.pipe.scheduler.config)
    x0, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 500, 999])
    torch.testing.assert_close(arch.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t))
    target = noise if prediction == "epsilon" else theirs.get_velocity(x0, noise, t)
    torch.testing.assert_close(arch.target(x0, noise, t), target)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_conversions_invert_the_target(prediction: str) -> None:
    arch = SD.tiny(prediction_type=prediction)  # type: ignore[arg-type]
    x0, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    arch.alphas_cumprod = arch.alphas_cumprod.double()
    t = torch.tensor([1, 500, 999])
    x_t, output = arch.add_noise(x0, noise, t), arch.target(x0, noise, t)
    torch.testing.assert_close(arch.to_x0(output, x_t, t), x0)
    torch.testing.assert_close(arch.to_eps(output, x_t, t), noise)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_scheduler_solves_to_the_known_image(prediction: str) -> None:
    """With a denoiser that always knows x0, the sampler must end there, whatever the parametrisation."""
    arch = SD.tiny(prediction_type=prediction)  # type: ignore[arg-type]
    x0, latents = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler: Any = arch.scheduler(12)
    assert len(scheduler.timesteps) == 12 and scheduler.init_noise_sigma == 1
    for step in scheduler.timesteps:
        t = step.view(1)
        alpha, sigma = arch.signal_and_noise(t)
        noise = (latents - alpha * x0) / sigma
        latents = scheduler.step(arch.target(x0, noise, t), step, latents).prev_sample
    torch.testing.assert_close(latents, x0, atol=1e-4, rtol=1e-4)


def test_latents(arch: SD) -> None:
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = arch.encode_images(pixels)
    assert latents.shape[1:] == arch.latent_shape(16, 16) and arch.image_size == 16
    assert arch.decode_latents(latents).shape == pixels.shape
    assert arch.latent_shape(24, 16) == (4, 12, 8)
    with pytest.raises(UserError, match="multiple of 2"):
        arch.latent_shape(15, 16)


def test_predict_keeps_the_latents_type(arch: SD) -> None:
    latents, t, text = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), arch.encode(["a cat", "a dog"])
    output = arch.predict(latents, t, text)
    assert output.shape == latents.shape and output.std() > 1e-3
    half = SD.tiny()
    half.pipe.unet.to(torch.bfloat16)
    rounded = half.predict(latents, t, text)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, output, atol=0.05, rtol=0.05)


def test_load_reads_what_save_wrote(arch: SD, tmp_path) -> None:
    loaded = SD.load(str(arch.save(tmp_path / "model")), dtype=torch.float32)
    for component, module in arch.components().items():
        state = loaded.components()[component].state_dict()
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    prompt = ["a photo of a cat"]
    assert torch.equal(loaded.encode(prompt).hidden, arch.encode(prompt).hidden)
    assert not any(p.requires_grad for module in loaded.components().values() for p in module.parameters())
    assert SD.load(str(tmp_path / "model"), dtype=torch.float16).dtype == torch.float16


def test_load_refuses_pickles(arch: SD, tmp_path) -> None:
    StableDiffusionPipeline.save_pretrained(arch.pipe, tmp_path, safe_serialization=False)
    for weights in tmp_path.glob("*/*.safetensors"):  # transformers 5 writes no pickles itself
        torch.save({}, weights.with_name("pytorch_model.bin"))
        weights.unlink()
    with pytest.raises(UserError, match=r"\.safetensors weights") as error:
        SD.load(str(tmp_path), dtype=torch.float32)
    assert "\n" not in str(error.value)


def test_other_predictions_are_refused(arch: SD, tmp_path) -> None:
    config = arch.save(tmp_path / "model") / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"epsilon"', '"sample"'))
    with pytest.raises(UserError, match="epsilon or v_prediction"):
        SD.load(str(tmp_path / "model"), dtype=torch.float32)
