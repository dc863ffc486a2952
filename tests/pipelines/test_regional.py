"""Regional cross-attention: the equation, layer by layer, and that nothing of a region is anywhere else or stays behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.attention.regional import Region, Regional, regional
from tests.pipelines.layers import layers_seen
from toolkit.arch.flux import Flux
from toolkit.arch.sd import SD
from toolkit.arch.sdxl import SDXL
from toolkit.arch.text import Text
from toolkit.attention import grid_of
from toolkit.edits.base import Edit, EditInfo
from toolkit.edits.chain import Chain
from toolkit.edits.delta import Delta
from toolkit.edits.gated import Gate, Gated
from toolkit.edits.low_rank import LowRank
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.sample import sample

LATENT = (8, 8)
LEFT, RIGHT, ALL = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 1.0)
FAMILIES = pytest.mark.parametrize("model", [SD, SDXL], indirect=True)


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Model:
    return Model(getattr(request, "param", SD).tiny())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def change(model: Model, seed: int = 1) -> LowRank:
    """Of all layers that read text, large enough to be seen."""
    layers = model.arch.text_linears().items()
    factors = {site: (random(layer.out_features, 2, seed=seed), random(2, layer.in_features, seed=seed + 1)) for site, layer in layers}
    return LowRank.from_factors(factors, EditInfo("test", base=model.fingerprint))


def word(model: Model, token: str, seed: int = 3) -> TokenEdit:
    rows = {part: random(2, table.embedding_dim, seed=seed) for part, table in model.arch.token_embeddings().items()}
    return TokenEdit.from_rows({token: rows})


def concept(model: Model, token: str, seed: int = 1) -> Chain:
    """A word and a change, as methods that learn a subject give."""
    return Chain.of([word(model, token, seed + 7), change(model, seed)])


def predicted(model: Model, text: Text) -> Tensor:
    latents = random(1, *model.arch.latent_shape(model.arch.image_size, model.arch.image_size)).repeat(len(text), 1, 1, 1)
    with torch.no_grad():
        return model.arch.predict(latents, torch.full((len(text),), 500), text)


@contextmanager
def told(model: Model, regions: list[Region], *conditions: Tensor | None) -> Iterator[Regional]:
    """Regions that know of what the rows of a call read, one row of each; without conditions all read the prompt."""
    with regional(model, regions) as acting:
        acting.tell(conditions or (None,), 1)
        yield acting


def shares(regions: list[Region], places: int) -> Tensor:
    """[R, rows, columns]: the masks at the grid of so many places."""
    grid = grid_of(places, LATENT)
    return torch.stack([region.share(grid, LATENT) for region in regions])


# --- the equation -----------------------------------------------------------------------------------------------------
@FAMILIES
def test_nothing_leaks_out_of_a_region_in_any_layer(model: Model) -> None:
    """Outside its mask a layer gives the background's output bit for bit, and so it does in rows that the regions were not told of."""
    one, two = concept(model, "<one>"), concept(model, "<two>", 5)
    regions = [Region("a <one>", box=(0.1, 0.2, 0.4, 0.7), edit=one), Region("two <two>", mask=disc(), edit=two)]
    with regional(model, regions) as acting:
        text = model.arch.encode(["negative", "a photo", "<one> in a room", "of another hook"])
        acting.tell([text.hidden[:1], None, None], 1)
        with layers_seen(model) as seen:
            predicted(model, text)
    assert set(seen) == set(model.arch.cross_attention_sites())
    for site, (image, read, output) in seen.items():
        attention: Any = model.arch.cross_attention_sites()[site]
        with torch.no_grad():
            background = attention(image, encoder_hidden_states=read)
        outside = shares(regions, image.shape[1]).sum(0).flatten() == 0
        assert outside.any() and not outside.all()
        assert torch.equal(output[:, outside], background[:, outside])
        assert torch.equal(output[3], background[3])
        assert (output[:3, ~outside] - background[:3, ~outside]).abs().amax(-1).min() > 1e-4


@FAMILIES
def test_every_layer_gives_the_equation(model: Model) -> None:
    """Against its sum, written out with the edited weights: overlaps, soft masks and weights."""
    edits = [change(model, 1), change(model, 5)]
    soft = 0.6 * disc() + 0.2
    regions = [Region("a dog", box=(0.0, 0.0, 0.7, 0.6), edit=edits[0], weight=3.0), Region("a cat", mask=soft, edit=edits[1])]
    with told(model, regions), layers_seen(model) as seen:
        text = model.arch.encode(["a photo"])
        predicted(model, text)
    prompts = [text.hidden, *(model.arch.encode([region.prompt]).hidden for region in regions)]
    for site, (image, _, output) in seen.items():
        attention: Any = model.arch.cross_attention_sites()[site]
        masks = shares(regions, image.shape[1]).flatten(1)
        weights = torch.stack([1 - masks.amax(0), 3 * masks[0], masks[1]])
        total = torch.zeros(())
        for weight, hidden, edit in zip(weights, prompts, [None, *edits], strict=True):
            key, value = (
                layer.weight + (edit.delta(f"{site}.{name}") if edit else 0)
                for name, layer in (("to_k", attention.to_k), ("to_v", attention.to_v))
            )
            q, k, v = (
                x.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for x in (attention.to_q(image), hidden @ key.T, hidden @ value.T)
            )
            seen_here = ((attention.scale * q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2)
            total = total + weight[:, None] * seen_here
        expected = attention.to_out[0](total / weights.sum(0)[:, None])
        torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)


@FAMILIES
def test_one_region_everywhere_is_its_prompt_and_its_edit(model: Model) -> None:
    """The pooled encoding, where there is one, stays the image's."""
    edit = concept(model, "<one>")
    for given in (None, edit):
        prompt = "a photo of a <one>" if given else "a dog"
        with told(model, [Region(prompt, box=ALL, edit=given)]):
            text = model.arch.encode(["a cat"])
            inside = predicted(model, text)
        with model.attached(*([given] if given else [])):
            own = model.arch.encode([prompt])
            plain = predicted(model, Text(own.hidden, own.ids, own.length, text.pooled))
        torch.testing.assert_close(inside, plain, atol=1e-5, rtol=1e-5)
        assert (inside - predicted(model, text)).abs().max() > 1e-3


def test_the_negative_prompt_is_read_through_the_edits(tiny: Model) -> None:
    edit, negatives = concept(tiny, "<one>"), ["a red car", "two dogs"]
    text = tiny.arch.encode([*negatives, "a cat", "a room"])
    with regional(tiny, [Region("a <one>", box=ALL, edit=edit)]) as acting:
        acting.tell([text.hidden[:2], None], 2)
        inside = predicted(tiny, text)
        only_prompts = predicted(tiny, text[2:])
    with tiny.attached(edit):
        plain = predicted(tiny, tiny.arch.encode([*negatives, "a <one>", "a <one>"]))
    torch.testing.assert_close(inside, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(only_prompts, plain[2:], atol=1e-5, rtol=1e-5)
    with regional(tiny, [Region("a <one>", box=ALL, edit=edit.edits[0])]) as acting:
        acting.tell([text.hidden[:2], None], 2)
        inside = predicted(tiny, text)
    assert torch.equal(inside[:2], predicted(tiny, text)[:2])


def test_regions_without_a_change_are_background_to_the_negative_prompt(tiny: Model) -> None:
    plain, changed = Region("a dog", box=LEFT), Region("a cat", box=ALL, edit=change(tiny))
    text = tiny.arch.encode(["a red car", "a room"])
    with told(tiny, [plain, changed], text.hidden[:1], None):
        together = predicted(tiny, text)[:1]
    with told(tiny, [changed], text.hidden[:1], None):
        alone = predicted(tiny, text)[:1]
    with told(tiny, [Region("a dog", box=LEFT, edit=LowRank.from_factors({})), changed], text.hidden[:1], None):
        empty = predicted(tiny, text)[:1]
    torch.testing.assert_close(together, empty, atol=1e-5, rtol=1e-5)
    assert (together - alone).abs().max() > 1e-4


def test_an_edit_of_the_whole_model_holds_in_regions_too(tiny: Model) -> None:
    below, above = change(tiny, 1), change(tiny, 5)
    with tiny.attached(below):
        with told(tiny, [Region("a dog", box=ALL, edit=above)]):
            inside = predicted(tiny, tiny.arch.encode(["a cat"]))
        with tiny.attached(above):
            torch.testing.assert_close(inside, predicted(tiny, tiny.arch.encode(["a dog"])), atol=1e-5, rtol=1e-5)


# --- masks ------------------------------------------------------------------------------------------------------------
def disc(side: int = 32) -> Tensor:
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return ((x - 22) ** 2 + (y - 22) ** 2 < 36).float()


def test_the_share_of_each_cell_that_is_covered() -> None:
    share = Region("a", box=(0.25, 0.0, 0.875, 0.5)).share((4, 4), LATENT)
    assert torch.equal(share, torch.tensor([[0, 1, 1, 0.5]] * 2 + [[0.0] * 4] * 2))
    assert torch.equal(Region("a", box=ALL).share((5, 7), (5, 7)), torch.ones(5, 7))
    soft = Region("a", mask=0.3 * torch.ones(16, 16)).share((4, 4), LATENT)
    torch.testing.assert_close(soft, torch.full((4, 4), 0.3))


@pytest.mark.parametrize("region", [Region("a", box=(0.3, 0.3, 0.35, 0.4)), Region("a", mask=disc() * (disc().cumsum(1) == 1))])
@pytest.mark.parametrize("grid", [(8, 8), (4, 4), (2, 2), (1, 1)])
def test_a_small_region_does_not_vanish(region: Region, grid: tuple[int, int]) -> None:
    assert region.share(grid, LATENT).max().item() == pytest.approx(1)


# --- sampling ---------------------------------------------------------------------------------------------------------
def test_sampling_reads_regions_under_guidance_and_at_any_batch_size(tiny: Model) -> None:
    edit = concept(tiny, "<one>")
    prompts, seeds = ["a cat", "a room", "a cat"], [0, 1, 2]
    with regional(tiny, [Region("a <one>", box=LEFT, edit=edit)]) as regions:
        together = sample(tiny, prompts, seeds, steps=3, guidance=3.0, negative="a dog", hooks=[regions])
        alone = sample(tiny, prompts, seeds, steps=3, guidance=3.0, negative="a dog", hooks=[regions], batch_size=1)
        unguided = sample(tiny, prompts, seeds, steps=3, guidance=1.0, hooks=[regions])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    plain = sample(tiny, prompts, seeds, steps=3, guidance=3.0, negative="a dog")
    assert (plain - together).abs().amax((1, 2, 3)).min() > 1e-3
    assert (unguided - together).abs().max() > 1e-3


def test_a_sampler_that_does_not_know_the_regions_is_told(tiny: Model) -> None:
    with regional(tiny, [Region("a dog", box=LEFT)]), pytest.raises(UserError, match=r"hooks=\[regions\]"):
        sample(tiny, ["a cat"], [0], steps=2)


def test_new_words_are_there_for_every_prompt(tiny: Model) -> None:
    """Also when two regions have the same edit, and when it is attached already."""
    edit, other = concept(tiny, "<one>"), concept(tiny, "<two>", 5)
    regions = [
        Region("a <one>", box=LEFT, edit=edit),
        Region("<one> and <two>", box=RIGHT, edit=other),
        Region("<one>", box=LEFT, edit=edit),
    ]
    with told(tiny, regions):
        assert {"<one>", "<two>_1"} <= set(tiny.arch.tokenizers()["text_encoder"].get_vocab())
    one = edit.edits[0]
    with tiny.attached(one), told(tiny, [Region("a <one>", box=LEFT, edit=one)]):
        predicted(tiny, tiny.arch.encode(["a <one>"]))
    with (
        pytest.raises(UserError, match="already a word"),
        regional(tiny, [regions[0], Region("<one>", box=ALL, edit=concept(tiny, "<one>"))]),
    ):
        pass


# --- nothing stays ----------------------------------------------------------------------------------------------------
def state(model: Model) -> dict[str, Any]:
    parts = model.arch.components().items()
    hooks = {f"{part}.{name}": (*m._forward_hooks, *m._forward_pre_hooks) for part, whole in parts for name, m in whole.named_modules()}
    values = {f"{part}.{name}": (id(p), p.data_ptr()) for part, whole in parts for name, p in whole.named_parameters()}
    return {"hooks": hooks, "values": values, "words": {name: id(t) for name, t in model.arch.tokenizers().items()}, "edits": model.edits}


@FAMILIES
def test_everything_is_as_before(model: Model) -> None:
    weights = {name: p.clone() for name, p in model.arch.components()["denoiser"].named_parameters()}
    plain = predicted(model, model.arch.encode(["a cat"]))  # transformers puts hooks of its own when it first encodes
    before = state(model)
    regions = [Region("a <one>", box=LEFT, edit=concept(model, "<one>"))]
    with told(model, regions):
        predicted(model, model.arch.encode(["a cat"]))
    assert state(model) == before
    with pytest.raises(RuntimeError, match="in the middle"), told(model, regions):
        raise RuntimeError("in the middle")
    assert state(model) == before
    broken = Region("b", box=LEFT, edit=LowRank.from_factors({site: (random(3, 1), random(1, 3)) for site in model.arch.text_linears()}))
    with pytest.raises(UserError, match=r"is \[3, 3\]"), regional(model, [*regions, broken]):
        pass
    assert state(model) == before
    assert all(torch.equal(p, weights[name]) for name, p in model.arch.components()["denoiser"].named_parameters())
    assert torch.equal(predicted(model, model.arch.encode(["a cat"])), plain)


# --- mistakes ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "no box and mask"),
        ({"box": LEFT, "mask": torch.ones(8, 8)}, "both a box and mask"),
        ({"box": (0.0, 0.0, 1.2, 1.0)}, r"box \(0.0, 0.0, 1.2, 1.0\)"),
        ({"box": (0.5, 0.0, 0.5, 1.0)}, "x0 < x1"),
        ({"mask": torch.zeros(8, 8)}, "not all 0"),
        ({"mask": 2 * torch.ones(8, 8)}, "from 2 to 2"),
        ({"mask": torch.ones(1, 8, 8)}, r"\[1, 8, 8\]"),
        ({"box": LEFT, "weight": 0.0}, "weight 0"),
        ({"box": LEFT, "edit": TokenEdit.from_rows({"<toy>": {"text_encoder": torch.ones(4)}})}, "the words <toy>"),
    ],
)
def test_a_region_that_is_none(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Region("a dog", **given)


@pytest.mark.parametrize("size", [(4, 4), (16, 12)])
def test_a_mask_of_another_size(tiny: Model, size: tuple[int, int]) -> None:
    region = Region("a dog", mask=torch.ones(size))
    with pytest.raises(UserError, match=f"mask {size[0]}x{size[1]}, the image's latent is 8x8"), told(tiny, [region]):
        predicted(tiny, tiny.arch.encode(["a cat"]))


def test_edits_that_no_region_can_hold(tiny: Model) -> None:
    name, layer = next((site, layer) for site, layer in tiny.arch.denoiser_layers().items() if layer.weight.ndim == 4)
    convolution = Delta.from_deltas({f"{name}.weight": random(*layer.weight.shape)})
    own = tiny.arch.lora_targets()
    projections = LowRank.from_factors({site: (random(x.out_features, 1), random(1, x.in_features)) for site, x in own.items()})
    gated = Gated(EditInfo(), change(tiny), Gate.of(tiny.arch, ["dog"], 0.5))
    name = tiny.arch.encoder_parameters()[0]
    encoder = Delta.from_deltas({name: random(*tiny.arch.parameter(name).shape)})
    edits: list[tuple[Edit, str]] = [(encoder, "delta edit"), (convolution, "delta edit"), (projections, "low_rank edit"), (gated, "gated")]
    for edit, message in edits:
        with (
            pytest.raises(UserError, match=rf"{message}.* of region 'a dog' changes .*tokens and the layers"),
            regional(tiny, [Region("a dog", box=ALL, edit=edit)]),
        ):
            pass


def test_an_edit_of_another_base(tiny: Model) -> None:
    region = Region("a dog", box=LEFT, edit=change(Model(SD.tiny(seed=1))))
    with pytest.warns(UserWarning, match="another base"), regional(tiny, [region]):
        pass
    tiny.strict = True
    with pytest.raises(UserError, match="another base"), regional(tiny, [region]):
        pass


def test_models_and_lists_without_regions(tiny: Model) -> None:
    with pytest.raises(UserError, match="flux has no cross-attention"), regional(Model(Flux.tiny()), [Region("a", box=LEFT)]):
        pass
    with pytest.raises(UserError, match="no regions"), regional(tiny, []):
        pass
