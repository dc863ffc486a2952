"""custom_diffusion and class_diffusion: the loss, what is trained, the augmentation, and the size of what is kept."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from toolkit.concepts import CustomizeTask, Subject, named
from toolkit.edits.base import EditInfo
from toolkit.edits.chain import Chain
from toolkit.edits.delta import Delta
from toolkit.edits.low_rank import LowRank
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.runs import seeded
from trainers.augmentation import FAR, NEAR, Scaled
from trainers.customize.class_diffusion import ClassDiffusion
from trainers.customize.custom_diffusion import TEMPLATES, CustomDiffusion
from trainers.keys_and_values import low_rank
from trainers.loop import Batch
from trainers.preservation import PreservedDenoising

PLAIN: dict[str, Any] = {"prior": "none", "augment": False}


@pytest.fixture
def task(tmp_path: Path) -> CustomizeTask:
    images = tuple(tmp_path / f"{colour}.png" for colour in ("red", "green", "blue"))
    for path in images:
        Image.new("RGB", (20, 20), path.stem).save(path)
    return CustomizeTask((Subject("<toy>", "dog", images[:2]), Subject("<pal>", "cat", images[2:])))


def parts(edit: Any) -> tuple[TokenEdit, LowRank]:
    words, change = edit.edits
    assert isinstance(edit, Chain) and isinstance(words, TokenEdit) and isinstance(change, LowRank)
    return words, change


def apart(model: Model, one: str, other: str) -> float:
    """1 less the cosine of two prompts at their ends."""
    first, second = model.arch.encode([one, other]).ends().detach()
    return 1 - F.cosine_similarity(first, second, dim=0).item()


def test_the_loss_is_the_denoisers_error_at_the_words_and_their_classes(tiny: Model, task: CustomizeTask) -> None:
    with CustomDiffusion(**PLAIN, train_batch_size=3).objective(tiny, task) as (denoising, _):
        made: Any = denoising
        value, _ = made.loss(Batch(1))
        samples = made.samples(Batch(1))
        assert set(samples.prompts) == {"photo of a <toy> dog", "photo of a <pal> cat"}
        alpha, sigma = tiny.arch.signal_and_noise(samples.t)
        output = tiny.arch.predict(alpha * samples.latents + sigma * samples.noise, samples.t, tiny.arch.encode(samples.prompts))
        assert value.item() == pytest.approx(float((output - samples.noise).square().mean()), rel=1e-5)


def test_both_words_and_every_layer_that_reads_text_are_trained(tiny: Model, task: CustomizeTask) -> None:
    start = CustomDiffusion(**PLAIN, max_train_steps=1, learning_rate=0.0, initializer_tokens=()).fit(tiny, task)
    edit = CustomDiffusion(**PLAIN, max_train_steps=4, learning_rate=0.01, initializer_tokens=()).fit(tiny, task)
    (before, _), (words, change) = parts(start), parts(edit)
    for token in ("<toy>", "<pal>"):
        moved = words.tokens[token]["text_encoder"] - before.tokens[token]["text_encoder"]
        assert moved.abs().max() > 0, "the last word too"
    assert {site.removesuffix(".weight") for site in change.sites()} == set(tiny.arch.text_linears())
    more = CustomDiffusion(**PLAIN, max_train_steps=1, parameters="cross_attention").fit(tiny, task)
    assert set(change.sites()) < set(parts(more)[1].sites())
    assert edit.info.triggers == ("<toy>", "<pal>")


def test_more_layers_and_vectors_can_be_trained_as_low_rank_changes(tiny: Model, task: CustomizeTask) -> None:
    method = CustomDiffusion(**PLAIN, max_train_steps=3, learning_rate=0.01, initializer_tokens=(), parameters="all", rank=2, num_vectors=3)
    words, change = parts(method.fit(tiny, task))
    assert {token: len(rows["text_encoder"]) for token, rows in words.tokens.items()} == {"<toy>": 3, "<pal>": 3}
    assert set(change.sites()) == {f"{site}.weight" for site in tiny.arch.denoiser_layers()} and not change.dense
    assert {len(down) for down in change.down.values()} == {2} and all(change.delta(site).any() for site in change.sites())
    with pytest.raises(UserError, match="rank 2"):
        CustomDiffusion(rank=2, compress=0.6)


def test_the_first_token_passes_no_gradient_on(tiny: Model, task: CustomizeTask) -> None:
    """With the keys and values of all other tokens held, nothing is left to learn."""
    site, layer = next(iter(tiny.arch.text_linears().items()))
    hidden = torch.randn(1, 5, layer.in_features, generator=seeded("hidden"))
    with CustomDiffusion(**PLAIN).objective(tiny, task):
        assert layer.weight.requires_grad, site
        (of_first,) = torch.autograd.grad(layer(hidden)[:, 1:].sum(), layer.weight, retain_graph=True)
        (of_all,) = torch.autograd.grad(layer(hidden).sum(), layer.weight)
        assert torch.equal(of_first, of_all) and of_all.abs().max() > 0
    assert layer(hidden).grad_fn is None


def test_compressed_it_keeps_the_largest_singular_values(tiny: Model) -> None:
    site, layer = next(iter(tiny.arch.text_linears().items()))
    up, down = (torch.linalg.qr(torch.randn(*shape, generator=seeded("q", *shape)))[0] for shape in ((layer.out_features, 4), (32, 4)))
    values = torch.tensor([5.0, 3.0, 1.5, 0.5])  # shares 0.5, 0.8, 0.95, 1
    delta = up * values @ down.T
    change = Delta.from_deltas({f"{site}.weight": delta}, EditInfo())
    for keep, rank in ((0.4, 1), (0.6, 2), (0.9, 3)):
        best = up[:, :rank] * values[:rank] @ down[:, :rank].T
        torch.testing.assert_close(low_rank(change, keep).delta(f"{site}.weight"), best, atol=1e-5, rtol=0)
    torch.testing.assert_close(low_rank(change, 0.0).delta(f"{site}.weight"), delta, atol=1e-5, rtol=0)


def test_sizes_are_drawn_and_said(tiny: Model, task: CustomizeTask) -> None:
    method = CustomDiffusion(prior="none")
    pool, side = Scaled.of(tiny.arch, task.subjects[:1], method, TEMPLATES, named), tiny.arch.image_size
    plain = "photo of a <toy> dog"
    seen = [pool.at(0, plain, seeded("size", i)) for i in range(60)]
    kinds = [next((kind for kind, words in (("far", FAR), ("near", NEAR)) if one.prompt.startswith(words)), "whole") for one in seen]
    assert all(one.prompt.endswith(plain) for one in seen) and {one.prompt for one in seen} >= {f"{w}{plain}" for w in FAR + NEAR}
    # Two of three pictures are smaller, and of these two of five below 0.6: 16 of 60; one of three is larger.
    assert 8 <= kinds.count("far") <= 26 and 10 <= kinds.count("near") <= 30
    for one, kind in zip(seen, kinds, strict=True):
        assert one.latent.shape == (1, *tiny.arch.latent_shape(side, side))
        assert one.weight.mean().item() == pytest.approx(1, rel=1e-5) and ((one.weight == 0).any().item() == (kind == "far"))
    again = pool.at(0, plain, seeded("size", 0))
    assert torch.equal(again.latent, seen[0].latent) and again.prompt == seen[0].prompt


def test_a_mask_goes_with_its_picture(tiny: Model, tmp_path: Path) -> None:
    side = tiny.arch.image_size
    half = Image.new("L", (side, side), 0)
    half.paste(255, (0, 0, side // 2, side))
    half.save(tmp_path / "mask.png")
    Image.new("RGB", (side, side), "red").save(tmp_path / "image.png")
    subject = Subject("<toy>", "dog", (tmp_path / "image.png",), (tmp_path / "mask.png",))
    method = CustomDiffusion(prior="none", mask_normalization="image")
    pool = Scaled.of(tiny.arch, (subject,), method, TEMPLATES, named)
    for i in range(20):
        one = pool.at(0, "a", seeded("mask", i))
        assert 0 < one.weight.mean() < 1 and one.weight.max() <= 1
        if not one.prompt.startswith(FAR + NEAR):
            assert torch.equal(one.weight, F.interpolate(one.weight[..., :1], one.weight.shape[2:]) * one.weight), "its left half"


def test_the_semantic_loss_pulls_the_word_to_its_class(tiny: Model, task: CustomizeTask) -> None:
    options: dict[str, Any] = {**PLAIN, "initializer_tokens": ()}
    with ClassDiffusion(**options, spl_weight=0.7, train_batch_size=2).objective(tiny, task) as (made, _):
        denoising: Any = made
        value, shown = denoising.loss(Batch(1))
        pairs = [("a photo of a <toy> dog", "a photo of a dog"), ("a photo of a <pal> cat", "a photo of a cat")]
        assert shown["semantic"] == pytest.approx(sum(apart(tiny, *pair) for pair in pairs) / 2, rel=1e-4)
        plain, _ = PreservedDenoising.loss(denoising, Batch(1))
        assert value.item() == pytest.approx(plain.item() + 0.7 * shown["semantic"], rel=1e-5)

    def away(weight: float) -> float:
        steps: dict[str, Any] = {"max_train_steps": 20, "learning_rate": 0.02, "train_batch_size": 1}
        edit = ClassDiffusion(**options, **steps, spl_weight=weight).fit(tiny, task)
        with tiny.attached(edit):
            return apart(tiny, *pairs[0])

    assert away(50.0) < 0.7 * away(0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"compress": 1.0}, "compress is 1"), ({"compress": -0.1}, "compress is -0"), ({"num_class_images": 0}, "num_class_images 0")],
)
def test_options_that_cannot_be_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CustomDiffusion(**options)
    with pytest.raises(UserError, match="spl_weight is -1"):
        ClassDiffusion(spl_weight=-1.0)
