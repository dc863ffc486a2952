"""LoRA files for Kohya's tools have the keys that these look for, and the same effect in diffusers as the attached edit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft.tuners.lora import Conv2d, Linear
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from toolkit.arch.ldm import unet_key
from toolkit.arch.sd import SD
from toolkit.arch.sdxl import SDXL
from toolkit.arch.single_file import CONFIGS
from toolkit.edits.base import EditInfo
from toolkit.edits.chain import Chain
from toolkit.edits.low_rank import LowRank
from toolkit.io.export import export
from toolkit.model import Model
from toolkit.sample import sample

REAL_SDXL: dict[str, Any] = {  # the blocks of the real model, with fewer transformers in the last
    "block_out_channels": (8, 8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 1),
    "layers_per_block": 2,
    "use_linear_projection": True,
}
BLOCK = "attentions.0.transformer_blocks.0"
SD_KEYS = {
    f"denoiser.down_blocks.0.{BLOCK}.attn2.to_k": "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k",
    f"denoiser.up_blocks.1.{BLOCK}.attn1.to_out.0": "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0",
    f"denoiser.mid_block.{BLOCK}.ff.net.0.proj": "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj",
    "denoiser.down_blocks.1.attentions.0.proj_in": "lora_unet_down_blocks_1_attentions_0_proj_in",
    "denoiser.down_blocks.0.resnets.0.conv1": "lora_unet_down_blocks_0_resnets_0_conv1",
    "text_encoder.encoder.layers.1.self_attn.q_proj": "lora_te_text_model_encoder_layers_1_self_attn_q_proj",
    "text_encoder.encoder.layers.0.mlp.fc1": "lora_te_text_model_encoder_layers_0_mlp_fc1",
}
SDXL_KEYS = {
    f"denoiser.down_blocks.1.{BLOCK}.attn2.to_k": "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
    "denoiser.down_blocks.2.attentions.1.proj_in": "lora_unet_input_blocks_8_1_proj_in",
    f"denoiser.mid_block.{BLOCK}.attn1.to_out.0": "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_out_0",
    f"denoiser.up_blocks.0.{BLOCK}.ff.net.2": "lora_unet_output_blocks_0_1_transformer_blocks_0_ff_net_2",
    "denoiser.up_blocks.1.attentions.2.transformer_blocks.1.attn2.to_v": "lora_unet_output_blocks_5_1_transformer_blocks_1_attn2_to_v",
    "denoiser.down_blocks.0.resnets.1.conv1": "lora_unet_input_blocks_2_0_in_layers_2",
    "denoiser.down_blocks.0.downsamplers.0.conv": "lora_unet_input_blocks_3_0_op",
    "denoiser.mid_block.resnets.1.time_emb_proj": "lora_unet_middle_block_2_emb_layers_1",
    "denoiser.up_blocks.1.upsamplers.0.conv": "lora_unet_output_blocks_5_2_conv",
    "denoiser.up_blocks.2.resnets.2.conv_shortcut": "lora_unet_output_blocks_8_0_skip_connection",
    "denoiser.add_embedding.linear_2": "lora_unet_label_emb_0_2",
    "text_encoder.encoder.layers.0.self_attn.out_proj": "lora_te1_text_model_encoder_layers_0_self_attn_out_proj",
    "text_encoder_2.text_model.encoder.layers.1.mlp.fc2": "lora_te2_text_model_encoder_layers_1_mlp_fc2",
    "text_encoder_2.text_projection": "lora_te2_text_projection",
}


def real_sdxl() -> SDXL:
    """A tiny model with the blocks of the real one."""
    pipe: Any = SDXL.tiny().pipe
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # diffusers takes what is listed there for unset, whatever value it has
        pipe.unet = UNet2DConditionModel.from_config({**pipe.unet.config, **REAL_SDXL, "_use_default_values": []})
    return SDXL(pipe)


MAKE = {"sd": SD.tiny, "sdxl": real_sdxl}


@pytest.fixture(params=MAKE)
def model(request: pytest.FixtureRequest) -> Model:
    return Model(MAKE[request.param]())


def layers(model: Model) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """Site -> linear layer or convolution of everything that reads or writes a prompt."""
    for component in ("denoiser", *model.arch.token_embeddings()):
        for path, module in model.arch.components()[component].named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                yield f"{component}.{path}", module


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / 4


def low_rank(model: Model, *, only: Iterable[str] = ("",), seed: int = 0) -> LowRank:
    """A change of every layer whose site contains one of `only`, with ranks from 1 to 3."""
    factors = {}
    for i, (site, module) in enumerate(layers(model)):
        if any(part in site for part in only):
            rank, (out, *shape) = 1 + i % 3, module.weight.shape
            factors[site] = random(out, rank, seed=seed + i), random(rank, *shape, seed=seed - i - 1)
    return LowRank.from_factors(factors, EditInfo("uce", triggers=("<toy>",)))


def assert_changes(pipe: Any, edit: LowRank | Chain, model: Model, scale: float = 1.0) -> None:
    """The layers that peft adapts in the pipeline are those of the edit, and their weights change by scale * delta."""
    changed = {}
    for component, name in zip(("denoiser", *model.arch.token_embeddings()), ("unet", *model.arch.token_embeddings()), strict=True):
        for path, module in getattr(pipe, name).named_modules():
            if isinstance(module, Linear | Conv2d):
                deltas = [module.get_delta_weight(adapter) for adapter in module.active_adapters if adapter in module.lora_A]
                changed[f"{component}.{path}.weight"] = torch.stack(deltas).sum(0)
    assert changed.keys() >= set(edit.sites()) and len(edit.sites()) > 0
    for site, delta in changed.items():
        expected = scale * edit.delta(site) if site in edit.sites() else torch.zeros_like(delta)
        torch.testing.assert_close(delta, expected, atol=1e-5, rtol=1e-5, msg=lambda text, site=site: f"{site}: {text}")


# --- keys -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("family", "golden"), [("sd", SD_KEYS), ("sdxl", SDXL_KEYS)])
def test_keys(family: str, golden: dict[str, str], tmp_path: Path) -> None:
    model = Model(MAKE[family]())
    sites = dict(layers(model))
    assert golden.keys() <= sites.keys()
    assert {site: model.arch.kohya_lora_keys(site)[0] for site in golden} == golden
    keys = [key for site in sites for key in model.arch.kohya_lora_keys(site)]
    assert len(set(keys)) == len(keys), "no two layers share a name"
    [path] = export(low_rank(model, only=golden), "kohya-lora", tmp_path / "mine.safetensors", model)
    written = load_file(path)
    for site, key in golden.items():
        up, down = (written.pop(f"{key}.lora_{part}.weight") for part in ("up", "down"))
        assert up.ndim == down.ndim == sites[site].weight.ndim and up.shape[1] == down.shape[0] and up.shape[2:].numel() == 1
        assert written.pop(f"{key}.alpha").ndim == 0
    rest = {key.partition(".")[0].rpartition("self_attn_")[2] for key in written}
    assert len(written) == 9 and len(rest) == 3 and rest < {"q_proj", "k_proj", "v_proj", "out_proj"}, "what completes an attention"
    assert not any(tensor.any() for key, tensor in written.items() if key.endswith("weight"))


A1111 = [  # how it makes the original name of a layer of SD 1 of ours, for blocks of the real number: extensions-builtin/Lora/networks.py
    (r"down_blocks_(\d)_(attentions|resnets)_(\d)_(.+)", lambda i, what, j, rest: f"input_blocks_{3 * i + j + 1}_{INSIDE[what]}_{rest}"),
    (r"up_blocks_(\d)_(attentions|resnets)_(\d)_(.+)", lambda i, what, j, rest: f"output_blocks_{3 * i + j}_{INSIDE[what]}_{rest}"),
    (r"mid_block_attentions_0_(.+)", lambda rest: f"middle_block_1_{rest}"),
    (r"mid_block_resnets_(\d)_(.+)", lambda j, rest: f"middle_block_{2 * j}_{rest}"),
    (r"down_blocks_(\d)_downsamplers_0_conv", lambda i: f"input_blocks_{3 * i + 3}_0_op"),
    (r"up_blocks_(\d)_upsamplers_0_conv", lambda i: f"output_blocks_{3 * i + 2}_{2 if i else 1}_conv"),
    (r"time_embedding_linear_(\d)", lambda i: f"time_embed_{2 * i - 2}"),
    (r"conv_in", lambda: "input_blocks_0_0"),
    (r"conv_out", lambda: "out_2"),
]
INSIDE = {"attentions": 1, "resnets": 0}
RESNET = {"conv1": "in_layers_2", "conv2": "out_layers_3", "time_emb_proj": "emb_layers_1", "conv_shortcut": "skip_connection"}


def test_a1111_puts_every_layer_of_stable_diffusion_1_in_its_place() -> None:
    arch = SD.hollow(CONFIGS / "sd1")
    for site in arch.denoiser_layers():
        path = arch.kohya_lora_keys(site)[0].removeprefix("lora_unet_")
        [(found, make)] = [(found, make) for pattern, make in A1111 if (found := re.fullmatch(pattern, path))]
        groups = [int(group) if group.isdecimal() else RESNET.get(group, group) for group in found.groups()]
        own = unet_key(f"{site.removeprefix('denoiser.')}.weight", arch.pipe.unet.config)
        assert make(*groups) == own.removesuffix(".weight").replace(".", "_"), site


def test_alpha_is_the_rank(model: Model, tmp_path: Path) -> None:
    factors = {
        site: (random(linear.out_features, 2, seed=1), random(2, linear.in_features, seed=2))
        for site, linear in model.arch.text_linears().items()
    }
    state = load_file(export(LowRank.from_factors(factors), "kohya-lora", tmp_path, model)[0])
    assert len(state) == 3 * len(factors)
    for site, (up, down) in factors.items():
        [key, *_] = model.arch.kohya_lora_keys(site)
        assert torch.equal(state[f"{key}.lora_up.weight"], up) and torch.equal(state[f"{key}.lora_down.weight"], down)
        assert state[f"{key}.alpha"] == 2.0


def test_header(model: Model, tmp_path: Path) -> None:
    [path] = export(low_rank(model, only=["attn2.to_k"]), "kohya-lora", tmp_path / "my-dog.safetensors", model)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    expected = {
        "sd": {
            "modelspec.architecture": "stable-diffusion-v1/lora",
            "modelspec.implementation": "diffusers",
            "ss_base_model_version": "sd_v1",
        },
        "sdxl": {
            "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
            "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
            "ss_base_model_version": "sdxl_base_v1-0",
        },
    }[model.arch.name]
    size = model.arch.image_size
    assert header == {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": "my-dog",
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.prediction_type": "epsilon",
        "modelspec.trigger_phrase": "<toy>",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "3",
        "ss_network_alpha": "3",
        "ss_output_name": "my-dog",
        "ss_tag_frequency": json.dumps({"my-dog": {"<toy>": 1}}),
        **expected,
    }


def test_header_of_stable_diffusion_2() -> None:
    pipe: Any = SD.tiny(prediction_type="v_prediction").pipe
    pipe.unet.register_to_config(cross_attention_dim=1024)
    header = SD(pipe).kohya_lora_header()
    assert header["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora" and header["modelspec.prediction_type"] == "v"
    assert (header["ss_base_model_version"], header["ss_v2"]) == ("sd_v2_v", "True")


# --- the same in diffusers ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("family", "format"), [("sd", "kohya-lora"), ("sdxl", "kohya-lora"), ("sd", "diffusers-lora")])
def test_every_layer_changes_as_much_in_diffusers(family: str, format: str, tmp_path: Path) -> None:
    model = Model(MAKE[family]())
    edit = low_rank(model)
    export(edit, format, tmp_path / "lora.safetensors", model)
    pipe = MAKE[family]().pipe
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors", adapter_name="mine")
    assert_changes(pipe, edit, model)
    pipe.set_adapters("mine", 0.5)
    assert_changes(pipe, edit, model, 0.5)


@pytest.mark.parametrize("only", ["self_attn.q_proj", "mlp.fc1", "attn2"])
def test_a_part_of_the_layers_is_enough(model: Model, tmp_path: Path, only: str) -> None:
    edit = low_rank(model, only=[only])
    export(edit, "kohya-lora", tmp_path, model)
    pipe = MAKE[model.arch.name]().pipe
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    assert_changes(pipe, edit, model)


def test_two_edits_add(model: Model, tmp_path: Path) -> None:
    """A chain is written as its sum; two files add up when both are loaded; the images are those of the attached edits."""
    one, other = low_rank(model, only=["attn2"]), low_rank(model, seed=100, only=["mid_block", "self_attn"])
    chain = Chain.of([one, other], [1.0, -0.5])
    export(chain, "kohya-lora", tmp_path / "sum.safetensors", model)
    pipe = MAKE[model.arch.name]().pipe
    pipe.load_lora_weights(tmp_path, weight_name="sum.safetensors")
    assert_changes(pipe, chain, model)
    prompts = ["a photo of a cat"]
    with model.attached(chain):
        expected = sample(model, prompts, [0], steps=2)
    torch.testing.assert_close(sample(Model(type(model.arch)(pipe)), prompts, [0], steps=2), expected, atol=1e-5, rtol=0)
    assert (sample(model, prompts, [0], steps=2) - expected).abs().max() > 1e-3
    pipe.unload_lora_weights()
    for name, edit in (("one", one), ("other", other)):
        export(edit, "kohya-lora", tmp_path / f"{name}.safetensors", model)
        pipe.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors", adapter_name=name)
    pipe.set_adapters(["one", "other"], [1.0, -0.5])
    assert_changes(pipe, chain, model)
