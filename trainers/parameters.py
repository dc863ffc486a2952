"""Which of a denoiser's parameters or layers are trained, by the names that the field uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import nn

    from toolkit.arch.base import Architecture

Parameters = Literal["x", "x_strict", "u", "all"]
Layers = Literal["all", "attention", "cross_attention", "keys_and_values"]
LAYERS = "all (with convolutions), attention, cross_attention, or its keys_and_values"
PARAMETERS = "what is trained: x (cross-attention), x_strict (its keys and values), u (all else), or all"


def parameter_names(arch: Architecture, which: Parameters) -> list[str]:
    """The denoiser's parameters that are trained."""
    keys_and_values = [f"{site}.weight" for site in arch.text_linears()]
    if which == "x_strict":
        return keys_and_values
    every = [f"denoiser.{name}" for name, _ in arch.components()["denoiser"].named_parameters()]
    cross = tuple(f"{site}." for site in arch.cross_attention_sites())
    return [name for name in every if which == "all" or name.startswith(cross) == (which == "x")]


def layers_of(arch: Architecture, which: Layers) -> Mapping[str, nn.Linear | nn.Conv2d]:
    """Site -> layer, for the denoiser's layers that are changed."""
    if which == "all":
        return arch.denoiser_layers()
    if which == "keys_and_values":
        return arch.text_linears()
    cross = tuple(f"{site}." for site in arch.cross_attention_sites())
    return {site: layer for site, layer in arch.lora_targets().items() if which == "attention" or site.startswith(cross)}
