"""What every method of a closed form is compared with its equation on: models in float64, small ones and of real shapes.

The text is encoded and the weights are kept in float64, so that an edit and its reference differ by the float32 alone that an
edit keeps its factors in.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel

from toolkit.arch.base import Architecture
from toolkit.arch.sd import SD, tiny_text_config
from toolkit.arch.single_file import CONFIGS
from toolkit.edits.base import Edit
from toolkit.model import Model

WIDTH = 768  # of the text of Stable Diffusion 1


def in_float64(arch: Architecture) -> Model:
    return Model(arch).to(dtype=torch.float64)


def sd14() -> Model:
    """The 32 layers of Stable Diffusion 1.4 that read text, with random weights, and a shallow text encoder of its width."""
    arch, real = SD.tiny(), SD.hollow(CONFIGS / "sd1")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = tiny_text_config(arch.pipe.tokenizer, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
        arch.pipe.text_encoder = CLIPTextModel(config).eval().requires_grad_(False)
        for linear in real.text_linears().values():
            linear.weight = nn.Parameter(torch.randn(linear.weight.shape) / WIDTH**0.5, requires_grad=False)
    arch.pipe.unet = real.pipe.unet
    arch.unread = lambda name: torch.zeros(1)  # there are no other weights of the denoiser
    return in_float64(arch)


def layers(model: Model) -> dict[str, Tensor]:
    """Site -> weight of the layers that read text, in float64: all, or of real shapes the first key and value of every width."""
    found = {site: linear.weight.detach().double().clone() for site, linear in model.arch.text_linears().items()}
    if next(iter(found.values())).shape[1] < WIDTH:
        return found
    first: dict[tuple[str, int], str] = {}
    for site, weight in found.items():
        first.setdefault((site.rpartition(".")[2], len(weight)), site)
    return {site: found[site] for site in first.values()}


def assert_follows(edit: Edit, model: Model, wanted: Mapping[str, Tensor]) -> None:
    """Whether the edit changes every layer that reads text, and these by as much, to a millionth of the change."""
    assert set(edit.sites()) == {f"{site}.weight" for site in model.arch.text_linears()} and set(wanted) == set(layers(model))
    for site, change in wanted.items():
        assert (edit.delta(f"{site}.weight").double() - change).norm() <= 1e-6 * change.norm() > 0
