"""Attention maps, against diffusers' own scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

from toolkit.arch.base import Architecture
from toolkit.arch.flux import Flux
from toolkit.arch.sd import SD
from toolkit.arch.sdxl import SDXL
from toolkit.attention import attention_maps, grid_of, token_mask
from toolkit.errors import UserError


def predicted(arch: Architecture) -> torch.Tensor:
    shape = arch.latent_shape(arch.image_size, arch.image_size)
    latents = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    return arch.predict(latents, torch.tensor([10, 20]), arch.encode(["a cat", "two red dogs"]))


@pytest.mark.parametrize("family", [SD, SDXL])
def test_probabilities_are_those_of_the_attention_itself(family: type[SD], monkeypatch: pytest.MonkeyPatch) -> None:
    arch = family.tiny()
    plain = predicted(arch)
    sites = arch.cross_attention_sites()
    own: list[Any] = []
    attentions: list[Any] = list(sites.values())
    for attention in attentions:
        attention.set_processor(AttnProcessor())  # which computes probabilities in a method that can be watched
        given = attention.get_attention_scores
        monkeypatch.setattr(attention, "get_attention_scores", lambda *a, given=given: own.append(given(*a)) or own[-1])
    with attention_maps(arch) as maps:
        assert torch.allclose(predicted(arch), plain, atol=1e-5)
    assert set(maps.sites) == set(sites)
    for site, scores in zip(maps.sites, own, strict=True):
        seen = maps.probabilities(site)
        assert torch.allclose(seen.flatten(0, 1), scores, atol=1e-6)
        assert torch.allclose(seen.sum(-1), torch.ones(()), atol=1e-5)


def test_reading_changes_nothing_and_ends() -> None:
    arch = SD.tiny()
    plain = predicted(arch)
    with attention_maps(arch) as maps:
        assert torch.equal(predicted(arch), plain)
    seen = {site: maps.probabilities(site).clone() for site in maps.sites}
    arch.predict(torch.ones(1, *arch.latent_shape(arch.image_size, arch.image_size)), torch.tensor([5]), arch.encode(["a"]))
    assert all(torch.equal(maps.probabilities(site), seen[site]) for site in seen)


def test_maps_of_tokens_add_up_and_have_a_gradient() -> None:
    arch = SD.tiny()
    site, *_ = arch.cross_attention_sites()
    layer = arch.text_linears()[f"{site}.to_k"]
    layer.weight.requires_grad_()
    size = arch.latent_shape(arch.image_size, arch.image_size)[1:]
    with attention_maps(arch) as maps:
        text = arch.encode(["a cat", "two red dogs"])
        predicted(arch)
    every = maps.of_tokens(torch.ones_like(text.ids, dtype=torch.bool), size)
    assert every.shape == (2, *size)
    assert torch.allclose(every, torch.ones(()), atol=1e-5)
    first = torch.zeros_like(text.ids, dtype=torch.bool)
    first[:, 1] = True
    (maps.of_tokens(first, size, sites=[site])[0, 0, 0]).backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().max() > 0


def test_a_family_without_cross_attention_is_refused() -> None:
    with pytest.raises(UserError, match="flux has no cross-attention"), attention_maps(Flux.tiny()):
        pass


@pytest.mark.parametrize(("queries", "grid"), [(256, (16, 16)), (64, (8, 8)), (35, (5, 7)), (12, (3, 4))])
def test_grids_are_halved(queries: int, grid: tuple[int, int]) -> None:
    assert grid_of(queries, (16, 16) if grid[0] in (16, 8) else (5, 7)) == grid


def test_tokens_of_words_are_found_wherever_they_are() -> None:
    arch = SD.tiny()
    prompts, words = ["a cat", "two red dogs and red dogs", "cat"], ["cat", "red dogs", "cat"]
    mask = token_mask(arch, prompts, words)
    text, alone = arch.encode(prompts), arch.encode(words)
    for row, times in enumerate((1, 2, 1)):
        own = alone.ids[row, 1 : alone.length[row] - 1]
        assert torch.equal(text.ids[row][mask[row]], own.repeat(times))
    with pytest.raises(ValueError, match="does not contain 'dog'"):
        token_mask(arch, ["a cat"], ["dog"])
