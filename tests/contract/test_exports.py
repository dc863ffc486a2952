"""What customizing gives loads in diffusers as it is attached, and has the keys that ComfyUI and A1111 look for.

What these two look for are facts about their code, read in 2026: `comfy/lora.py`, `comfy/weight_adapter/lora.py` and `comfy/sd1_clip.py`
of ComfyUI; `extensions-builtin/Lora/networks.py` and `modules/textual_inversion/textual_inversion.py` of A1111 and Forge.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.contract.fitting import CASES, METHODS, Fitted, quick, tiny_of
from toolkit.edits.base import Edit
from toolkit.edits.chain import Chain
from toolkit.edits.low_rank import LowRank
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError
from toolkit.io.export import export
from toolkit.method import Method
from toolkit.model import Model

LEARNT = [(name, family) for name, family in CASES if METHODS[name].kind == "customize"]
LORAS = ("diffusers-lora", "kohya-lora")
STRENGTH = 100  # of what few steps change
WIDE = {"layers": "all", "train_text_encoder": True}

# ComfyUI and A1111 know layers of an SD 1 UNet by diffusers' path or the original one, of SDXL's by the original one alone
LAYER = r"(transformer_blocks_\d+_(attn[12]_to_(q|k|v|out_0)|ff_net_(0_proj|2))|proj_(in|out))"
DIFFUSERS = rf"lora_unet_((down|up)_blocks_\d+|mid_block)_(attentions_\d+_{LAYER}|resnets_\d+_(conv[12]|time_emb_proj|conv_shortcut))"
DIFFUSERS_OTHER = (
    r"lora_unet_(conv_(in|out)|time_embedding_linear_[12]|down_blocks_\d+_downsamplers_0_conv|up_blocks_\d+_upsamplers_0_conv)"
)
BLOCK = r"(input_blocks_\d+|middle_block|output_blocks_\d+)"
ORIGINAL = rf"lora_unet_{BLOCK}_[012]_({LAYER}|in_layers_2|out_layers_3|emb_layers_1|skip_connection|op|conv)"
ORIGINAL_OTHER = r"lora_unet_(input_blocks_0_0|out_2|time_embed_[02]|label_emb_0_[02])"
TEXT = r"_text_model_encoder_layers_\d+_(self_attn_(q|k|v|out)_proj|mlp_fc[12])"
KEYS = {
    "sd": re.compile(rf"({DIFFUSERS}|{DIFFUSERS_OTHER}|lora_te{TEXT})"),
    "sdxl": re.compile(rf"({ORIGINAL}|{ORIGINAL_OTHER}|lora_te[12]{TEXT}|lora_te2_text_projection)"),
}
ROLES = {"lora_up.weight", "lora_down.weight", "alpha"}


def kinds(edit: Edit) -> set[str]:
    return {part.kind() for part, _ in edit.parts()}


def loud(edit: Edit) -> Chain:
    """The edit with changes of weights that are seen in an image."""
    parts = [LowRank.merge([part], [STRENGTH]) if isinstance(part, LowRank) else part for part, _ in edit.parts()]
    return Chain.of(parts, info=edit.info)


def standard(edit: Edit) -> list[str]:
    """The formats other than weights in which there is a place for everything that it is made of."""
    found = kinds(edit)
    return [*(LORAS if found in ({"low_rank"}, {"low_rank", "token"}) else ()), *(["embedding"] if found == {"token"} else [])]


def load(pipe: Any, files: Sequence[Path], triggers: Sequence[str]) -> None:
    """As diffusers' users do; of two text encoders each is told its rows and the word, which is what the file is called."""
    for file in files:
        state = load_file(file)
        if len(state) == 1:
            pipe.load_textual_inversion(file)
        elif state.keys() == {"clip_l", "clip_g"}:
            [word] = [one for one in triggers if re.sub(r"\W", "", one) == file.stem]
            pipe.load_textual_inversion(state["clip_l"], token=word, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)
            pipe.load_textual_inversion(state["clip_g"], token=word, text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2)
        else:
            pipe.load_lora_weights(file.parent, weight_name=file.name)


def widened(method: type[Method]) -> dict[str, Any]:
    """The options with which a method that adapts layers adapts all that it can."""
    return {field.name: WIDE[field.name] for field in dataclasses.fields(method) if field.name in WIDE} if hasattr(method, "layers") else {}


def assert_lora(state: dict[str, Tensor], edit: Edit, model: Model) -> None:
    """The tensors of a LoRA are of layers that both tools know, with all that each layer needs and no other."""
    sites = [site for part, _ in edit.parts() if isinstance(part, LowRank) for site in part.sites()]
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        layer, _, role = key.partition(".")
        assert KEYS[model.arch.name].fullmatch(layer), key
        layers.setdefault(layer, {})[role] = tensor
    assert all(parts.keys() == ROLES for parts in layers.values()) and len(layers) >= len(sites) > 0
    for parts in layers.values():
        up, down = parts["lora_up.weight"], parts["lora_down.weight"]
        assert parts["alpha"].ndim == 0 and up.shape[1] == len(down) and up.ndim == down.ndim and up.shape[2:].numel() == 1
    for layer in layers:  # of an encoder with q, k and v in one matrix A1111 reads all four or none
        if (attention := layer.partition("_self_attn_")[0]) != layer:
            assert {f"{attention}_self_attn_{one}_proj" for one in ("q", "k", "v", "out")} <= layers.keys()


def assert_embeddings(files: Sequence[Path], edit: Edit, model: Model) -> None:
    """One file for each word, which both tools call what the file is called, with the rows for each text encoder.

    A1111 takes one tensor of any name, or clip_l and clip_g; ComfyUI the one called like the encoder, else the first.
    """
    tokens = {token: rows for part, _ in edit.parts() if isinstance(part, TokenEdit) for token, rows in part.tokens.items()}
    assert [file.stem for file in files] == [re.sub(r"\W", "", token) for token in tokens]
    assert {*tokens} == ({*edit.info.triggers} if tokens else set())
    for file, rows in zip(files, tokens.values(), strict=True):
        state, names = load_file(file), {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
        assert len(state) == 1 or state.keys() == {"clip_l", "clip_g"}
        given = {part: state[names[part]] if len(state) > 1 else next(iter(state.values())) for part in rows}
        assert rows.keys() == model.arch.token_embeddings().keys() == given.keys()
        assert all(given[part].ndim == 2 and torch.equal(given[part], rows[part]) for part in rows)


def picture(pipe: Any, words: Sequence[str]) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    prompt, generator = f"a photo of {' and '.join(words)}", torch.Generator().manual_seed(0)
    return pipe(prompt, num_inference_steps=2, guidance_scale=3.0, generator=generator, output_type="pt").images


@pytest.mark.parametrize("fitted", LEARNT, indirect=True, ids="-".join)
def test_diffusers_draws_with_it_what_is_drawn_with_it_attached(fitted: Fitted, tmp_path: Path) -> None:
    edit, model, words = loud(fitted.edit), fitted.model, fitted.edit.info.triggers
    formats = standard(edit)
    if not formats:
        pytest.skip(f"no other tool's format holds {' and '.join(sorted(kinds(edit)))}")
    with model.attached(edit):
        expected = picture(model.arch.pipe, words)
    for format in formats:
        pipe = tiny_of(model.arch.name).arch.pipe
        load(pipe, export(edit, format, tmp_path / format, model), words)
        torch.testing.assert_close(picture(pipe, words), expected, atol=1e-4, rtol=0)
    for left_out in edit.edits:  # each part is seen in it
        with model.attached(*(part for part in edit.edits if part is not left_out)):
            assert (picture(model.arch.pipe, words) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("fitted", LEARNT, indirect=True, ids="-".join)
def test_comfyui_and_a1111_find_every_tensor(fitted: Fitted, tmp_path: Path) -> None:
    for format in {"kohya-lora", "embedding"} & {*standard(fitted.edit)}:
        files = export(fitted.edit, format, tmp_path / format, fitted.model)
        if format == "kohya-lora":
            lora, *files = files
            assert_lora(load_file(lora), fitted.edit, fitted.model)
        assert_embeddings(files, fitted.edit, fitted.model)


@pytest.mark.parametrize(("name", "family"), [case for case in LEARNT if widened(METHODS[case[0]])])
def test_they_find_every_tensor_of_all_layers(name: str, family: str, tmp_path: Path) -> None:
    model, method = tiny_of(family), METHODS[name]
    edit = dataclasses.replace(quick(method), **widened(method)).fit(model, method.example_task(model))
    state = load_file(export(edit, "kohya-lora", tmp_path, model)[0])
    assert_lora(state, edit, model)
    assert any(tensor.ndim == 4 and tensor.shape[-1] == 3 for tensor in state.values())
    assert any(key.startswith("lora_te") for key in state) == hasattr(method, "train_text_encoder")


@pytest.mark.parametrize("fitted", LEARNT, indirect=True, ids="-".join)
def test_what_other_tools_have_no_form_for_is_not_written(fitted: Fitted, tmp_path: Path) -> None:
    for format in {*LORAS, "embedding"} - {*standard(fitted.edit)}:
        with pytest.raises(UserError, match=rf"cannot be written as {format}; export it as .*checkpoint"):
            export(fitted.edit, format, tmp_path / format, fitted.model)
    assert not any(tmp_path.iterdir())
