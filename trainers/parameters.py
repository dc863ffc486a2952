"""Which of a denoiser's parameters are trained, by the names that the field uses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from toolkit.arch.base import Architecture

Parameters = Literal["x", "x_strict", "u", "all"]
PARAMETERS = "what is trained: x (cross-attention), x_strict (its keys and values), u (all else), or all"


def parameter_names(arch: Architecture, which: Parameters) -> list[str]:
    """The denoiser's parameters that are trained."""
    keys_and_values = [f"{site}.weight" for site in arch.text_linears()]
    if which == "x_strict":
        return keys_and_values
    every = [f"denoiser.{name}" for name, _ in arch.components()["denoiser"].named_parameters()]
    cross = tuple(f"{site}." for site in arch.cross_attention_sites())
    return [name for name in every if which == "all" or name.startswith(cross) == (which == "x")]
