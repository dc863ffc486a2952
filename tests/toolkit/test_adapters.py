"""LoRA files and embeddings of other tools become edits that do what they do there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Conv2d, Linear
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.shared_data import shared
from toolkit.arch.sd import SD
from toolkit.arch.sdxl import SDXL
from toolkit.cli import main
from toolkit.edits.low_rank import LowRank
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError
from toolkit.io.adapters import lora_layers
from toolkit.io.export import ROW_NAMES, export
from toolkit.io.files import load_edit, save_edit
from toolkit.model import Model

FAMILIES = {"sd": SD, "sdxl": SDXL}
ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn2"
SITE = f"denoiser.{ATTENTION}.to_k"
CONVOLUTION = "denoiser.mid_block.attentions.0.proj_in"
TEXT = "text_encoder.encoder.layers.1.self_attn.q_proj"
OUT, TEXT_OUT = "to_out.0", "out_proj"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / 4


def every_layer(model: Model) -> LowRank:
    """A change of rank 1 or 2 of each linear layer and convolution."""
    factors = {}
    for component in ("denoiser", *model.arch.token_embeddings()):
        for path, module in model.arch.components()[component].named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                rank, (out, *shape) = 1 + len(factors) % 2, module.weight.shape
                factors[f"{component}.{path}"] = random(out, rank, seed=len(factors)), random(rank, *shape, seed=1)
    return LowRank.from_factors(factors)


def refused(path: Path, tensors: dict[str, Tensor], model: Model | None, metadata: dict[str, str] | None = None) -> str:
    """The one line that a file with these tensors is refused with."""
    save_file(tensors, path, metadata)
    with pytest.raises(UserError) as error:
        load_edit(path, model)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


# --- LoRA -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format", ["diffusers-lora", "kohya-lora"])
def test_what_we_export_is_read_again(family: str, format: str, tmp_path: Path) -> None:
    model = Model(FAMILIES[family].tiny())
    edit = every_layer(model)
    [path] = export(edit, format, tmp_path / "lora.safetensors", model)
    read = load_edit(path, model)
    assert isinstance(read, LowRank) and set(read.sites()) >= set(edit.sites()) and read.info.notes == {"file": "lora.safetensors"}
    for site in edit.sites():
        torch.testing.assert_close(read.delta(site), edit.delta(site), atol=1e-6, rtol=1e-5)
    before = {name: parameter.clone() for name, parameter in model.arch.pipe.unet.named_parameters()}
    with model.attached(read):
        changed = [name for name, parameter in model.arch.pipe.unet.named_parameters() if not torch.equal(parameter, before[name])]
    assert len(changed) == sum(site.startswith("denoiser.") for site in edit.sites())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.arch.pipe.unet.named_parameters())
    again = load_edit(save_edit(read, tmp_path / "edit.safetensors"))
    assert all(torch.equal(again.delta(site), read.delta(site)) for site in read.sites())


@pytest.mark.parametrize("rslora", [False, True])
def test_what_diffusers_saves(tiny: Model, tmp_path: Path, rslora: bool) -> None:
    """Its adapter settings decide the scale; every layer changes as peft says."""
    pipe: Any = SD.tiny().pipe
    endings = ["to_k", "to_out.0", "proj_in", "conv1"]
    patterns: dict[str, Any] = {"rank_pattern": {"attn2.to_k": 2}, "alpha_pattern": {"attn2.to_k": 5, "conv1": 1}}
    options: dict[str, Any] = {"init_lora_weights": False, "use_rslora": rslora}
    pipe.unet.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=endings, **patterns, **options))
    pipe.text_encoder.add_adapter(LoraConfig(r=2, lora_alpha=1, target_modules=["q_proj", "fc1"], **options))
    parts = {name: getattr(pipe, name) for name in ("unet", "text_encoder")}
    layers = {f"{name}_lora_layers": get_peft_model_state_dict(part, adapter_name="default") for name, part in parts.items()}
    settings = {f"{name}_lora_adapter_metadata": part.peft_config["default"].to_dict() for name, part in parts.items()}
    type(pipe).save_lora_weights(tmp_path, **layers, **settings)
    edit = load_edit(tmp_path / "pytorch_lora_weights.safetensors", tiny)
    expected = {
        f"{'denoiser' if name == 'unet' else name}.{path}.weight": module.get_delta_weight("default")
        for name, part in parts.items()
        for path, module in part.named_modules()
        if isinstance(module, Linear | Conv2d)
    }
    assert set(edit.sites()) == set(expected) and any(delta.ndim == 4 and delta.shape[-1] == 3 for delta in expected.values())
    for site, delta in expected.items():
        torch.testing.assert_close(edit.delta(site), delta, atol=1e-6, rtol=1e-5)


OLD_KEYS = {
    "lora": (f"unet.{ATTENTION}.to_k.lora.{{}}.weight", SITE),
    "processor": (f"unet.{ATTENTION}.processor.to_k_lora.{{}}.weight", SITE),
    "processor of an output": (f"unet.{ATTENTION}.processor.to_out_lora.{{}}.weight", f"denoiser.{ATTENTION}.{OUT}"),
    "without a component": (f"{ATTENTION}.processor.to_k_lora.{{}}.weight", SITE),
    "text encoder": ("text_encoder.text_model.encoder.layers.1.self_attn.q_proj.lora_linear_layer.{}.weight", TEXT),
    "text encoder's processor": ("text_encoder.text_model.encoder.layers.1.self_attn.to_q_lora.{}.weight", TEXT),
    "text encoder's output": (
        "text_encoder.text_model.encoder.layers.1.self_attn.to_out_lora.{}.weight",
        TEXT.replace("q_proj", TEXT_OUT),
    ),
    "text encoder without prefix": ("text_encoder.encoder.layers.1.self_attn.q_proj.lora_linear_layer.{}.weight", TEXT),
}


@pytest.mark.parametrize("key, site", OLD_KEYS.values(), ids=OLD_KEYS)
def test_older_keys_of_diffusers(tiny: Model, tmp_path: Path, key: str, site: str) -> None:
    out, columns = tiny.arch.components()[site.partition(".")[0]].get_submodule(site.partition(".")[2]).weight.shape  # type: ignore[union-attr]
    up, down = random(int(out), 2), random(2, int(columns))
    save_file({key.format("up"): up, key.format("down"): down}, tmp_path / "old.safetensors")
    edit = load_edit(tmp_path / "old.safetensors", tiny)
    assert edit.sites() == [f"{site}.weight"]
    torch.testing.assert_close(edit.delta(site), up @ down)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_name_that_tools_use_is_read(family: str, tmp_path: Path) -> None:
    model = Model(FAMILIES[family].tiny())
    [site, linear], *_ = model.arch.text_linears().items()
    up, down = random(linear.out_features, 4), random(4, linear.in_features)
    for number, name in enumerate(model.arch.kohya_lora_keys(site)):
        path = tmp_path / f"{number}.safetensors"
        save_file({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(1.0)}, path)
        torch.testing.assert_close(load_edit(path, model).delta(site), up @ down / 4)
        save_file({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}, path)
        torch.testing.assert_close(load_edit(path, model).delta(site), up @ down)
    assert number == (1 if family == "sdxl" else 0)


def test_half_precision_factors_stay_as_they_are(tiny: Model, tmp_path: Path) -> None:
    up, down = random(16, 9).half(), random(9, 32).half()
    [name] = tiny.arch.kohya_lora_keys(SITE)
    state = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(9.0).half()}
    save_file(state, tmp_path / "half.safetensors")
    edit = load_edit(tmp_path / "half.safetensors", tiny)
    assert isinstance(edit, LowRank) and torch.equal(edit.up[SITE], up) and torch.equal(edit.down[SITE], down)
    torch.testing.assert_close(edit.delta(SITE), up.float() @ down.float())


def test_a_1x1_convolution_and_a_linear_layer_are_the_same(tiny: Model, tmp_path: Path) -> None:
    up, down = random(16, 2), random(2, 16)
    shapes = {"as a convolution": (up[:, :, None, None], down[:, :, None, None]), "as a linear layer": (up, down)}
    for number, (given_up, given_down) in enumerate(shapes.values()):
        path = tmp_path / f"{number}.safetensors"
        state = {}
        for site in (CONVOLUTION, f"denoiser.{ATTENTION}.to_q"):
            name = tiny.arch.diffusers_lora_key(site)
            state |= {f"{name}.lora_A.weight": given_down.clone(), f"{name}.lora_B.weight": given_up.clone()}
        save_file(state, path)
        edit = load_edit(path, tiny)
        assert edit.delta(CONVOLUTION).shape == (16, 16, 1, 1) and edit.delta(f"denoiser.{ATTENTION}.to_q").shape == (16, 16)
        weight = tiny.arch.components()["denoiser"].get_parameter(CONVOLUTION.partition(".")[2] + ".weight")
        before = weight.clone()
        with tiny.attached(edit):
            torch.testing.assert_close(weight, before + (up @ down)[:, :, None, None])
        assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in.dora_scale", "DoRA"),
        (f"unet.{ATTENTION}.to_k.lora_magnitude_vector", "DoRA"),
        ("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", "LoHa"),
        ("lora_unet_mid_block_attentions_0_proj_in.lokr_w1", "LoKr"),
        ("lora_unet_mid_block_resnets_0_conv1.lora_mid.weight", "LoCon with Tucker decomposition"),
        ("lora_unet_mid_block_attentions_0_proj_in.oft_blocks", "OFT"),
    ],
)
def test_other_adapters_are_refused_by_name(tiny: Model, tmp_path: Path, tensor: str, kind: str) -> None:
    path = export(every_layer(tiny), "kohya-lora", tmp_path / "lora.safetensors", tiny)[0]
    assert f"is a {kind} file" in refused(path, {**load_file(path), tensor: torch.ones(2, 2)}, tiny)


def test_mistakes(tiny: Model, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    name = tiny.arch.diffusers_lora_key(SITE)
    down, up = {f"{name}.lora_A.weight": random(2, 32)}, {f"{name}.lora_B.weight": random(16, 2)}
    assert "give that --model" in refused(path, down | up, None)
    assert "has only the down of" in refused(path, down, tiny)
    assert "has only the up of" in refused(path, up, tiny)
    elsewhere = {f"transformer.{key}": value for key, value in (down | up).items()}
    assert "changes 1 layers that sd (sd) does not have, e.g. transformer.unet." in refused(path, elsewhere, tiny)
    assert f"changes {name} by [16, 31], that of sd is [16, 32]" in refused(path, {f"{name}.lora_A.weight": random(2, 31), **up}, tiny)
    save_file({f"{name}.lora_A.weight": random(3, 32), **up}, path)
    with pytest.raises(UserError, match=r"check their ranks"):
        load_edit(path, tiny)
    kohya = tiny.arch.kohya_lora_keys(SITE)[0]
    twice = {f"{kohya}.lora_down.weight": random(2, 32), f"{kohya}.lora_up.weight": random(16, 2)}
    assert f"has {SITE} under two names" in refused(path, down | up | twice, tiny)
    assert "no part of a LoRA" in refused(path, {**down, **up, f"{name}.lora_B.bias": random(16)}, tiny)
    assert "no part of a LoRA" in refused(path, {**down, f"{name}.lora_B.weight": random(16)}, tiny)
    for damaged in ("{", "[1]"):
        assert "damaged header" in refused(path, down | up, tiny, {"lora_adapter_metadata": damaged})
    assert "but no edit, LoRA or embedding" in refused(path, {"one": random(2), "two": random(2)}, tiny)
    assert "but no edit, LoRA or embedding" in refused(path, {}, tiny)


def test_a_model_is_loaded_only_for_files_that_need_it(tiny: Model, tmp_path: Path) -> None:
    edit = every_layer(tiny)
    asked = []

    def base() -> Model:
        asked.append(tiny)
        return tiny

    own, [lora] = save_edit(edit, tmp_path / "edit.safetensors"), export(edit, "kohya-lora", tmp_path, tiny)
    [word] = export(TokenEdit.from_rows({"<toy>": {"text_encoder": random(32)}}), "embedding", tmp_path)
    assert [load_edit(path, base).kind() for path in (own, word)] == ["low_rank", "token"] and not asked
    assert load_edit(lora, base).kind() == "low_rank" and asked


# --- embeddings -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("tensors", "token", "shapes"),
    [
        ({"<cat-toy>": (32,)}, "<cat-toy>", {"text_encoder": (1, 32)}),
        ({"<Cat-Toy>": (3, 32)}, "<cat-toy>", {"text_encoder": (3, 32)}),
        ({"emb_params": (2, 32)}, "easynegative", {"text_encoder": (2, 32)}),
        ({"clip_l": (2, 32), "clip_g": (2, 40)}, "easynegative", {"text_encoder": (2, 32), "text_encoder_2": (2, 40)}),
        ({"clip_l": (1, 32)}, "easynegative", {"text_encoder": (1, 32)}),
    ],
)
def test_embeddings(tmp_path: Path, tensors: dict[str, tuple[int, ...]], token: str, shapes: dict[str, tuple[int, ...]]) -> None:
    state = {name: random(*shape) for name, shape in tensors.items()}
    save_file(state, tmp_path / "EasyNegative.safetensors")
    edit = load_edit(tmp_path / "EasyNegative.safetensors")
    assert isinstance(edit, TokenEdit) and edit.info.triggers == (token,) and edit.info.notes == {"file": "EasyNegative.safetensors"}
    assert {part: tuple(rows.shape) for part, rows in edit.tokens[token].items()} == shapes
    given = {ROW_NAMES.get(part, part): rows for part, rows in edit.tokens[token].items()}
    assert all(
        torch.equal(given.get(name, edit.delta(f"text_encoder:{token}")), rows.view(-1, rows.shape[-1])) for name, rows in state.items()
    )


@pytest.mark.parametrize(("make", "word"), [(SD.tiny, "<toy>"), (SDXL.tiny, "toy")])
def test_exported_embeddings_are_read_again(tmp_path: Path, make: Callable[[], SD], word: str) -> None:
    model = Model(make())
    widths = {part: embedding.embedding_dim for part, embedding in model.arch.token_embeddings().items()}
    edit = TokenEdit.from_rows({word: {part: random(2, width) for part, width in widths.items()}})
    [path] = export(edit, "embedding", tmp_path)
    read = load_edit(path)
    with model.attached(edit):
        expected = model.arch.encode([f"a {word}"]).hidden
    with model.attached(read):
        assert torch.equal(model.arch.encode([f"a {word}"]).hidden, expected)


# --- real files -----------------------------------------------------------------------------------------------------
def test_real_files_that_are_refused(tiny: Model) -> None:
    for name, message in [
        ("sd1_textual_inversion_pickle.bin", "is a pickle"),
        ("sd1_lora_disney.safetensors", "is a LoRA that numbers its layers"),
        ("flux_erase_lora.safetensors", r"changes 38 layers that sd \(sd\) does not have, e\.g\. transformer\."),
    ]:
        with pytest.raises(UserError, match=message):
            load_edit(shared(f"adapters/{name}"), tiny)


def test_the_layers_of_a_real_lora() -> None:
    path = shared("adapters/flux_erase_lora.safetensors")
    layers = lora_layers(str(path), {}, load_file(path))
    endings = ("attn.add_k_proj", "attn.add_q_proj")
    assert set(layers) == {f"transformer.transformer_blocks.{block}.{ending}" for block in range(19) for ending in endings}
    for layer in layers.values():
        assert layer.down.shape == (8, 3072) and layer.up.shape == (3072, 8) and layer.scale == 1.0


# --- commands -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(Model(SD.tiny()).save(tmp_path_factory.mktemp("model")))


def test_commands_take_other_tools_files(folder: str, tiny: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*argv: object) -> dict[str, Any]:
        capsys.readouterr()
        code = main([*map(str, argv), "--json"])
        told = capsys.readouterr()
        assert code == 0, told.err
        return json.loads(told.out.splitlines()[-1])

    edit = LowRank.from_factors({SITE: (random(16, 2) * 8, random(2, 32) * 8)})
    [lora] = export(edit, "kohya-lora", tmp_path / "theirs.safetensors", tiny)
    save_file({"emb_params": random(2, 32) * 8}, tmp_path / "qq.safetensors")
    drawing = ("generate", "--model", folder, "--prompt", "a qq", "--steps", 2, "--out", tmp_path / "drawn")

    def image(*options: object) -> bytes:
        return Path(call(*drawing, *options)["images"][0]).read_bytes()

    save_edit(edit, tmp_path / "ours.safetensors")
    ours, theirs, word = (tmp_path / f"{name}.safetensors" for name in ("ours", "theirs", "qq"))
    assert image("--edit", theirs) == image("--edit", ours) != image()
    assert image("--edit", f"{theirs}@0.5") == image("--edit", f"{ours}@0.5") != image("--edit", theirs)
    assert image("--edit", word) != image()
    both = call("compose", ours, f"{lora}@0.5", word, "--model", folder, "--out", tmp_path / "both")["edit"]
    composed = load_edit(both)
    assert [part.kind() for part, _ in composed.parts()] == ["low_rank", "token"]
    torch.testing.assert_close(composed.delta(f"{SITE}.weight"), 1.5 * edit.delta(SITE))
    assert main(["compose", str(ours), str(lora), "--out", str(tmp_path / "none")]) == 2
    assert "give that --model" in capsys.readouterr().err
    converted = call("export", lora, "--model", folder, "--format", "diffusers-lora", "--out", tmp_path / "converted")["files"][0]
    torch.testing.assert_close(load_edit(converted, tiny).delta(SITE), edit.delta(SITE))
    again = call("export", both, "--model", folder, "--format", "checkpoint", "--out", tmp_path / "model")
    assert Path(again["files"][0]).is_dir()
