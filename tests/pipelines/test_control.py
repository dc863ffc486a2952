"""Control of words: the equation, layer by layer, and that what is not asked for stays to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.attention.control import Word, controlled, controlled_probabilities
from pipelines.attention.regional import Region, regional
from pipelines.multi_concept import MultiConceptPipeline
from pipelines.multi_concept_xl import MultiConceptXLPipeline
from tests.pipelines.layers import layers_seen
from toolkit.arch.flux import Flux
from toolkit.arch.sd import SD
from toolkit.arch.sdxl import SDXL
from toolkit.arch.text import Text
from toolkit.attention import attention_maps, grid_of, token_mask
from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.sample import noise, sample

LATENT = (8, 8)
LEFT = (0.0, 0.0, 0.5, 1.0)
FAMILIES = pytest.mark.parametrize("family", [SD, SDXL])
PROMPTS, SEEDS = ["a red cat", "a cat", "two cat pictures of a cat"], [0, 1, 2]
DRAWN: dict[str, Any] = {"steps": 3, "guidance": 3.0, "negative": "a red dog"}


def predicted(model: Model, text: Text) -> Tensor:
    x = torch.randn(1, *model.arch.latent_shape(model.arch.image_size, model.arch.image_size), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.arch.predict(x.repeat(len(text), 1, 1, 1), torch.full((len(text),), 500), text)


@FAMILIES
def test_every_layer_gives_the_equation(family: type[SD]) -> None:
    """In float64, written out: an area, a soft mask with a weight, and a suppressed word; the negative rows are as without."""
    model = Model(family.tiny()).to(dtype=torch.float64)
    soft = torch.linspace(0, 1, 64).view(8, 8).T
    words = [Word("cat", box=LEFT), Word("red", mask=soft, weight=-1.5), Word("dog", suppress=True)]
    prompts = ["a red cat and a dog", "dog red cat"]
    with controlled(model, words) as acting, layers_seen(model) as seen:
        acting.tell([None, prompts], 2)
        predicted(model, model.arch.encode(["a cat", "a red dog", *prompts]))
    tokens = [token_mask(model.arch, prompts, [word.word] * 2) for word in words]
    for site, (image, hidden, output) in seen.items():
        attention: Any = model.arch.cross_attention_sites()[site]
        grid = grid_of(image.shape[1], LATENT)
        with torch.no_grad():
            q, k, v = attention.to_q(image[2:]), attention.to_k(hidden[2:]), attention.to_v(hidden[2:])
            plain = attention(image, encoder_hidden_states=hidden)
        q, k, v = (x.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for x in (q, k, v))
        probability = (attention.scale * q @ k.mT).exp()
        probability = probability / probability.sum(-1, keepdim=True)
        within = torch.ones(2, image.shape[1], 77)
        for mask, word in zip(tokens, words, strict=True):
            within = torch.where(mask[:, None], word.share(grid, LATENT)[None, :, None], within)
        changed = probability * within[:, None] / (probability * within[:, None]).sum(-1, keepdim=True)
        torch.testing.assert_close(changed.sum(-1), torch.ones_like(changed.sum(-1)))
        outside = (words[0].share(grid, LATENT) == 0)[None, :, None] & tokens[0][:, None]
        assert outside.any() and not changed.masked_select(outside[:, None]).any()
        changed = torch.where(tokens[1][:, None, None], -1.5 * changed, changed)
        expected = attention.to_out[0]((changed @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(output[2:], expected, atol=1e-6, rtol=1e-5)  # probabilities are computed in float32
        assert torch.equal(output[:2], plain[:2]) and (output[2:] - plain[2:]).abs().max() > 1e-3


def test_restricted_probabilities_are_zero_and_the_rest_is_renormalised() -> None:
    """Also for a word that takes all attention, in half precision."""
    scores = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    scores[0, :, :, 2] = 200.0
    within = torch.ones(2, 5, 7)
    within[:, :3, 2] = 0
    for given in (scores, scores.half()):
        found = controlled_probabilities(given, within, torch.ones(2, 7))
        assert not found[:, :, :3, 2].any() and found.isfinite().all()
        torch.testing.assert_close(found.sum(-1), torch.ones(2, 3, 5))
        rest = given.float().index_select(-1, torch.tensor([0, 1, 3, 4, 5, 6])).softmax(-1)
        torch.testing.assert_close(found[:, :, :3, [0, 1, 3, 4, 5, 6]], rest[:, :, :3])
        assert torch.equal(found[:, :, 3:], given.float().softmax(-1)[:, :, 3:])


@FAMILIES
def test_what_changes_nothing_is_the_same_to_the_bit(family: type[SD]) -> None:
    model = Model(family.tiny())
    plain = sample(model, PROMPTS, SEEDS, **DRAWN)
    for words in ([Word("cat", weight=1.0)], [Word("cat", box=(0.0, 0.0, 1.0, 1.0))], [Word("cat", mask=torch.ones(8, 8), weight=1.0)]):
        with controlled(model, words) as acting:
            assert torch.equal(sample(model, PROMPTS, SEEDS, hooks=[acting], **DRAWN), plain)
    assert torch.equal(sample(model, PROMPTS, SEEDS, **DRAWN), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.arch.components()["denoiser"].modules())


@FAMILIES
def test_an_image_is_the_same_in_any_batch(family: type[SD]) -> None:
    model = Model(family.tiny())
    plain = sample(model, PROMPTS, SEEDS, **DRAWN)
    for words in ([Word("cat", box=LEFT)], [Word("cat", suppress=True)], [Word("cat", weight=2.0)]):
        with controlled(model, words) as acting:
            together = sample(model, PROMPTS, SEEDS, hooks=[acting], **DRAWN)
            alone = sample(model, PROMPTS, SEEDS, hooks=[acting], batch_size=1, **DRAWN)
            unguided = sample(model, PROMPTS, SEEDS, steps=3, guidance=1.0, hooks=[acting])
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
        assert (plain - together).abs().amax((1, 2, 3)).min() > 1e-4
        assert (unguided - sample(model, PROMPTS, SEEDS, steps=3, guidance=1.0)).abs().amax((1, 2, 3)).min() > 1e-4


@pytest.mark.parametrize("regions_first", [True, False])
def test_with_regions_it_is_the_images_prompt_that_is_controlled(tiny: Model, regions_first: bool) -> None:
    """A region everywhere leaves nothing of it; one on the right leaves it to the left."""
    words, text = [Word("cat", suppress=True)], tiny.arch.encode(["a cat"])

    def image(box: tuple[float, float, float, float], *, control: bool) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        def both() -> list[Any]:
            one = regional(tiny, [Region("a dog", box=box)])
            other = controlled(tiny, words)
            return ([one, other] if regions_first else [other, one]) if control else [one]

        managers = both()
        acting = [manager.__enter__() for manager in managers]
        try:
            for each in acting:
                each.tell([None] if hasattr(each, "_regions") else [["a cat"]], 1)
            with layers_seen(tiny) as seen:
                predicted(tiny, text)
        finally:
            for manager in reversed(managers):
                manager.__exit__(None, None, None)
        return seen

    site, *_ = tiny.arch.cross_attention_sites()
    whole = (0.0, 0.0, 1.0, 1.0)
    assert torch.equal(image(whole, control=True)[site][2], image(whole, control=False)[site][2])
    with_both, only_region = image((0.5, 0.0, 1.0, 1.0), control=True)[site][2], image((0.5, 0.0, 1.0, 1.0), control=False)[site][2]
    left = torch.arange(64) % 8 < 4
    assert torch.equal(with_both[:, ~left], only_region[:, ~left]) and not torch.equal(with_both[:, left], only_region[:, left])


@pytest.mark.parametrize(("family", "kind"), [(SD, MultiConceptPipeline), (SDXL, MultiConceptXLPipeline)], ids=["sd", "sdxl"])
def test_diffusers_pipelines_agree_with_the_sampler(family: type[SD], kind: Any) -> None:
    arch = family.tiny()
    model, words = Model(arch), [Word("cat", box=LEFT), Word("red", weight=3.0)]
    pipe = kind.from_pipe(arch.pipe)
    pipe.set_progress_bar_config(disable=True)
    prompts, seeds = ["a red cat", "cat on red"], [0, 1]
    pipe.scheduler = arch.scheduler(3)
    latents = noise(prompts, seeds, arch.latent_shape(arch.image_size, arch.image_size))
    options: dict[str, Any] = {"latents": latents, "num_inference_steps": 3, "output_type": "pt", "height": 16, "width": 16}

    def piped(**more: Any) -> Tensor:
        return pipe(prompts, guidance_scale=3.0, negative_prompt=["a dog"] * 2, **options, **more).images

    with controlled(model, words) as acting:
        expected = sample(model, prompts, seeds, steps=3, guidance=3.0, negative="a dog", hooks=[acting])
    plain = piped()
    torch.testing.assert_close(piped(words=words), expected, atol=2e-4, rtol=0)
    assert (plain - expected).abs().max() > 2e-3 and torch.equal(piped(), plain)
    assert torch.equal(piped(words=[Word("cat", weight=1.0)]), plain)
    two = pipe(prompts[0], num_images_per_prompt=2, guidance_scale=1.0, words=words, **options).images
    assert two.shape == plain.shape
    with pytest.raises(UserError, match="'a dog' does not say 'cat'"):
        pipe("a dog", words=words, **{**options, "latents": None})
    if family is SDXL:
        with pytest.raises(UserError, match="no prompt_2"):
            pipe(prompts, prompt_2=["a dog"] * 2, words=words, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no box, mask, suppress or weight"),
        ({"suppress": True, "weight": 2.0}, "has no effect"),
        ({"suppress": True, "box": LEFT}, "has no effect"),
        ({"box": LEFT, "mask": torch.ones(8, 8)}, "both a box and mask"),
        ({"mask": torch.zeros(8, 8)}, "not all 0"),
    ],
)
def test_a_word_that_makes_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Word("cat", **options)


def test_mistakes_are_told(tiny: Model) -> None:
    words = [Word("cat", weight=2.0)]
    with controlled(tiny, words) as acting, pytest.raises(UserError, match="'a dog' does not say 'cat'"):
        sample(tiny, ["a cat", "a dog"], [0, 1], steps=1, hooks=[acting])
    with controlled(tiny, words), pytest.raises(UserError, match=r"hooks=\[words\]"):
        sample(tiny, ["a cat"], [0], steps=1)
    with pytest.raises(UserError, match="no words"), controlled(tiny, []):
        pass
    with pytest.raises(UserError, match="flux has no cross-attention"), controlled(Model(Flux.tiny()), words):
        pass


def test_queries_and_keys_are_let_go_of(tiny: Model) -> None:
    with controlled(tiny, [Word("cat", weight=2.0)]) as acting, attention_maps(tiny.arch) as others:
        sample(tiny, ["a cat"], [0], steps=1, hooks=[acting])
        assert acting._maps.sites == [] and not acting._values and others.sites
