"""Checkpoints in one file load into the very model that was written, and what is none of ours is told in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file, save_file

from tests.toolkit.ldm import FAMILIES, Writer, parameters, real_parts, real_shapes, stored, write_sparse
from toolkit.arch.sd import SD
from toolkit.arch.single_file import clip_tokenizer, prediction_type, recognise
from toolkit.errors import UserError
from toolkit.io.header import Header
from toolkit.model import load_model
from toolkit.sample import sample

KNOWN = {  # keys of the published files, and how many tensors their parts have
    "sd1": (
        "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.input_blocks.3.0.op.weight",
        "model.diffusion_model.output_blocks.2.1.conv.weight",
        "model.diffusion_model.output_blocks.5.2.conv.weight",
        "model.diffusion_model.middle_block.1.proj_in.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.11.self_attn.q_proj.weight",
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight",
        "first_stage_model.encoder.down.2.downsample.conv.weight",
        "first_stage_model.decoder.mid.attn_1.proj_out.weight",
    ),
    "sd2": (
        "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_bias",
        "cond_stage_model.model.positional_embedding",
        "cond_stage_model.model.ln_final.weight",
    ),
    "sdxl": (
        "model.diffusion_model.label_emb.0.0.weight",
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.attn2.to_v.weight",
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",
        "conditioner.embedders.1.model.transformer.resblocks.31.mlp.c_proj.weight",
        "conditioner.embedders.1.model.text_projection",
    ),
}


@pytest.mark.parametrize("version", FAMILIES)
def test_a_single_file_is_the_model_that_it_was_written_from(write: Writer, version: str) -> None:
    model, path = write(version)
    loaded = load_model(str(path))
    assert type(loaded.arch) is type(model.arch) and loaded.fingerprint == model.fingerprint
    mine, theirs = parameters(model.arch.components()), parameters(loaded.arch.components())
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    drawn = [sample(model, ["a photo of a cat"], [0], steps=2, guidance=3.0) for model in (loaded, model)]
    assert torch.equal(*drawn) and drawn[0].std() > 0


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_type_is_the_one_that_is_asked_for(write: Writer, dtype: str) -> None:
    model, path = write("sd1", "float16")
    loaded = load_model(str(path), dtype=dtype)
    mine, theirs = parameters(model.arch.components()), parameters(loaded.arch.components())
    assert all(value.dtype == getattr(torch, dtype) for value in theirs.values())
    assert all(torch.equal(mine[name], theirs[name].half()) for name in mine)


@pytest.mark.parametrize("version", FAMILIES)
def test_every_tensor_of_a_real_checkpoint_is_read(version: str) -> None:
    """diffusers' own conversion of the names and shapes gives exactly what the shipped configurations need."""
    parts, layout = real_parts(version)
    tensors = stored(parameters(parts), layout)
    assert set(KNOWN[version]) <= tensors.keys()
    converted = {
        "denoiser": convert_ldm_unet_checkpoint(dict(tensors), layout.config("unet")),
        "vae": convert_ldm_vae_checkpoint(dict(tensors), layout.config("vae")),
    }
    for name, prefix in layout.prefixes.items():
        if name.startswith("text_encoder"):
            clip = convert_open_clip_checkpoint(parts[name], tensors, prefix) if prefix.endswith(".model.") else None
            converted[name] = clip or convert_ldm_clip_checkpoint(tensors)
            if not hasattr(parts[name], "text_model"):
                converted[name] = {key.removeprefix("text_model."): value for key, value in converted[name].items()}
    for name, module in parts.items():
        needs = {key: value.shape for key, value in module.state_dict().items()}
        assert {key: value.shape for key, value in converted[name].items()} == needs, name


@pytest.mark.parametrize("version", FAMILIES)
def test_real_shapes_are_recognised(version: str, tmp_path: Path) -> None:
    path = write_sparse(real_shapes(version), tmp_path / "model.safetensors")
    found = recognise(path)
    assert found.family is FAMILIES[version] and found.layout.configs.name == version
    assert path.stat().st_blocks * 512 < 2**22


def test_what_is_no_base_model_is_told(tmp_path: Path) -> None:
    first, reads = "model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.input_blocks.4.1.attn2.to_k.weight"
    base = {first: (320, 4, 3, 3), reads: (320, 768), "cond_stage_model.transformer.a": (1,), "first_stage_model.a": (1,)}
    assert recognise(write_sparse(base, tmp_path / "base.safetensors")).family is SD
    for shapes, message in [
        ({**base, first: (320, 9, 3, 3)}, "has 9 input channels .9 are for inpainting"),
        ({**base, reads: (384, 1280), "conditioner.embedders.0.model.ln_final.bias": (1,)}, "is the refiner of Stable Diffusion XL"),
        ({**base, "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.bias": (1,)}, "is a Stable Diffusion 3 model"),
        ({"double_blocks.0.img_attn.norm.key_norm.scale": (1,)}, "is a Flux model"),
        ({**base, "edm_mean": (4,)}, "is a model of the EDM kind"),
        ({"lora_unet_down_blocks_0.alpha": (1,)}, "is no whole model.*but lora_unet_down_blocks_0.alpha"),
        ({}, "is no whole model.*but nothing"),
        ({**base, reads: (320, 640)}, "of another size .its attention reads 640"),
        ({key: base[key] for key in (first, reads, "first_stage_model.a")}, "lacks a text encoder or image decoder"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            load_model(str(write_sparse(shapes, tmp_path / "model.safetensors")))
        assert "\n" not in str(error.value)


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    for name, data, message in [
        ("model.ckpt", b"x", "is a pickle"),
        ("model.pt", b"x", "is a pickle"),
        ("model.safetensors", b"\x80\x02}.", "is damaged or no safetensors file"),
        ("model.safetensors", (99).to_bytes(8, "little") + b"{}", "is damaged or no safetensors file"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=message):
            load_model(str(tmp_path / name))
    for name in ("nothing.safetensors", "nothing.ckpt"):
        with pytest.raises(UserError, match=r"no file|is a pickle"):
            load_model(str(tmp_path / name))


@pytest.mark.parametrize(
    "lost", ["denoiser.mid_block.resnets.0.conv1.weight", "vae.decoder.conv_in.bias", "text_encoder.final_layer_norm.bias"]
)
def test_an_incomplete_file_is_told(write: Writer, lost: str) -> None:
    _, path = write("sd1")
    key = recognise(path).layout.slots([lost])[lost].key
    save_file({name: value for name, value in load_file(path).items() if name != key}, path)
    with pytest.raises(UserError, match="give a complete checkpoint") as error:
        load_model(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("metadata", "config", "expected"),
    [
        ({"modelspec.prediction_type": "v"}, None, "v_prediction"),
        ({"modelspec.prediction_type": "epsilon", "modelspec.architecture": "stable-diffusion-v2-768-v"}, None, "epsilon"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, None, "v_prediction"),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, None, "epsilon"),
        ({}, 'model:\n  params:\n    parameterization: "v"\n', "v_prediction"),
        ({}, "model:\n  params:\n    timesteps: 1000\n", "epsilon"),
        ({}, None, "does not say whether it predicts noise or velocity; put its config"),
        ({"modelspec.prediction_type": "flow"}, None, "predicts 'flow', need epsilon or v"),
    ],
)
def test_what_stable_diffusion_2_predicts(tmp_path: Path, metadata: dict[str, str], config: str | None, expected: str) -> None:
    path = tmp_path / "model.safetensors"
    if config:
        path.with_suffix(".yaml").write_text(config)
    if " " in expected:
        with pytest.raises(UserError, match=expected):
            prediction_type(str(path), "sd2", Header({}, metadata))
    else:
        assert prediction_type(str(path), "sd2", Header({}, metadata)) == expected


def test_a_version_of_another_prediction(write: Writer) -> None:
    model, path = write("sdxl")
    save_file({**load_file(path), "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, path)
    loaded = load_model(str(path)).arch
    assert isinstance(loaded, SD) and loaded.prediction_type == "v_prediction" and loaded.alphas_cumprod[-1] == 0
    assert isinstance(model.arch, SD) and model.arch.prediction_type == "epsilon" and model.arch.alphas_cumprod[-1] > 0


def test_the_vocabulary_is_clips() -> None:
    tokenizer, padded, theirs = clip_tokenizer("<|endoftext|>"), clip_tokenizer("!"), SimpleTokenizer()
    assert len(tokenizer) == 49408 and (tokenizer.bos_token_id, tokenizer.eos_token_id) == (49406, 49407)
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    for prompt in ("", "A PHOTO, of 3 dogs' Bärte: naïve?", "anti-aircraft guns in 1944 ★ 東京", "don't  we'll <3"):
        assert tokenizer(prompt).input_ids[1:-1] == theirs.encode(prompt), prompt
    assert tokenizer("a", padding="max_length").input_ids[2:] == [49407] * 75
    assert padded("a", padding="max_length").input_ids[2:] == [49407] + [0] * 74


@pytest.mark.slow
@pytest.mark.parametrize("version", ["sd1", "sdxl"])
def test_a_file_of_the_real_size_loads(version: str, tmp_path: Path) -> None:
    model = load_model(str(write_sparse(real_shapes(version), tmp_path / "model.safetensors")), dtype="float16")
    assert len(model.arch.text_linears()) == {"sd1": 32, "sdxl": 140}[version]
    assert model.arch.image_size == {"sd1": 512, "sdxl": 1024}[version]
