"""Models in one .safetensors file: which one it is, and loading it without a hub."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import SingleFileComponentError
from diffusers.utils import logging
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTokenizer

from toolkit import registry
from toolkit.arch.base import Architecture
from toolkit.arch.ldm import OPEN_CLIP, Layout
from toolkit.errors import UserError
from toolkit.io.header import Header, read_header

CONFIGS = Path(__file__).parent / "configs"
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"  # OpenAI's merges, which open_clip carries
MERGES = 49152 - 256 - 2  # those of the file that CLIP uses
FIRST = "model.diffusion_model.input_blocks.0.0.weight"
ELSEWHERE = {
    "joint_blocks.": "a Stable Diffusion 3 model",
    "double_blocks.": "a Flux model",
    "edm_mean": "a model of the EDM kind",
    "edm_vpred.": "a model of the EDM kind",
    "conditioner.embedders.0.model.": "the refiner of Stable Diffusion XL",
}
REMEDY = "give a Stable Diffusion 1, 2 or XL base model, or a diffusers folder"
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}


@dataclass(frozen=True)
class SingleFile:
    """What a file is. family: its architecture; layout: where it keeps what; header: what it holds."""

    family: type[Architecture]
    layout: Layout
    header: Header


def recognise(path: str | Path) -> SingleFile:
    """Which model a .safetensors file is, by its keys and shapes. One of no known family is a UserError."""
    header = read_header(path)
    shapes = {key: stored.shape for key, stored in header.tensors.items()}
    for part, what in ELSEWHERE.items():
        if any(part in key for key in shapes):
            raise UserError(f"{str(path)!r} is {what}, which cannot be loaded from one file; {REMEDY}")
    reads = next((shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")), None)
    for family in (entry.load() for entry in registry.entries("arch").values()):
        for version, prefixes in family.single_files.items():
            layout = Layout(prefixes, CONFIGS / version)
            unet = layout.config("unet")
            complete = all(any(key.startswith(prefix) for key in shapes) for prefix in prefixes.values())
            if complete and shapes.get(FIRST, (0, 0))[1] == unet["in_channels"] and reads == unet["cross_attention_dim"]:
                return SingleFile(family, layout, header)
    if FIRST not in shapes:
        what = f"is no whole model: it has no {FIRST}, but {next(iter(shapes), 'nothing')}"
    elif shapes[FIRST][1] != 4:
        what = f"has {shapes[FIRST][1]} input channels (9 are for inpainting), need 4"
    else:
        what = f"lacks a text encoder or image decoder, or is of another size (its attention reads {reads} numbers)"
    raise UserError(f"{str(path)!r} {what}; {REMEDY}")


def from_single_file(pipeline: Any, source: str, dtype: torch.dtype, **options: Any) -> Any:
    """A diffusers pipeline from one .safetensors file, with the configurations and the vocabulary that are here already."""
    found = recognise(source)
    version = found.layout.configs.name
    prediction = prediction_type(source, version, found.header)
    for component, prefix in found.layout.prefixes.items():
        if component.startswith("text_encoder"):
            padding = "!" if prefix.endswith(OPEN_CLIP) else "<|endoftext|>"
            options[component.replace("text_encoder", "tokenizer")] = clip_tokenizer(padding)
    configs = str(found.layout.configs)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of an empty list of modules that were to stay in float32
    try:
        pipe = pipeline.from_single_file(source, config=configs, local_files_only=True, dtype=dtype, **options)
    except (OSError, ValueError, LookupError, RuntimeError, SingleFileComponentError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot load {source!r} as a {version} model ({reason}); give a complete checkpoint") from error
    finally:
        logging.set_verbosity(verbosity)
    loaded = (part for name, part in pipe.components.items() if name not in options)
    if missing := _missing(part for part in loaded if isinstance(part, nn.Module)):
        raise UserError(f"{source!r} lacks {len(missing)} tensors of a {version} model, such as {missing[0]}; give a complete checkpoint")
    noising = {"prediction_type": prediction}
    if "ztsnr" in found.header.tensors:  # trained down to a signal of nothing; such files say so by a tensor of this name
        noising |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, **noising)
    if version == "sd2" and prediction == "epsilon":  # those of 512 pixels; the others draw 768
        pipe.unet.register_to_config(sample_size=64)
    return pipe


def _missing(parts: Iterable[nn.Module]) -> list[str]:
    return [name for part in parts for name, parameter in part.named_parameters() if parameter.is_meta]


def prediction_type(source: str, version: str, header: Header) -> str:
    """ "epsilon" or "v_prediction", from what the file says of itself, or the config beside it that A1111 reads.

    Only Stable Diffusion 2 needs to say it: the other versions predict noise unless they tell.
    """
    said = header.metadata.get("modelspec.prediction_type")
    if said is not None:
        if said not in PREDICTIONS:
            raise UserError(f"{source!r} predicts {said!r}, need epsilon or v; give another model")
        return PREDICTIONS[said]
    if "v_pred" in header.tensors:
        return "v_prediction"
    if version != "sd2":
        return "epsilon"
    architecture = header.metadata.get("modelspec.architecture", "")
    if architecture.startswith("stable-diffusion-v2"):
        return "v_prediction" if architecture.startswith("stable-diffusion-v2-768-v") else "epsilon"
    beside = Path(source).with_suffix(".yaml")
    if beside.is_file():
        told = re.search(r"^\s*parameterization:\s*[\"']?v\b", beside.read_text(encoding="utf-8"), re.MULTILINE)
        return "v_prediction" if told else "epsilon"
    what = f"{source!r} does not say whether it predicts noise or velocity"
    raise UserError(f"{what}; put its config (v2-inference.yaml or v2-inference-v.yaml) beside it as {beside.name}")


def clip_tokenizer(padding: str) -> CLIPTokenizer:
    """CLIP's tokenizer: single bytes, bytes that end a word, merges in their order, BOS and EOT."""
    spec = find_spec("open_clip")  # found, not imported, which would take seconds
    assert spec and spec.submodule_search_locations, "open-clip-torch is one of our requirements"
    with gzip.open(Path(spec.submodule_search_locations[0], VOCABULARY), "rt", encoding="utf-8") as file:
        merges: list[Any] = [tuple(line.split()) for line in file.read().split("\n")[1 : MERGES + 1]]
    alphabet = sorted(ByteLevel.alphabet())
    words = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({word: i for i, word in enumerate(words)}, merges, pad_token=padding, model_max_length=77)
