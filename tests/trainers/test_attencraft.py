"""attencraft: masks out of attention, the divergence, when masks are made anew, and how often each subject is learnt."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from toolkit.attention import attention_maps, self_attention_sites, token_mask
from toolkit.concepts import CustomizeTask, Subject
from toolkit.errors import PalimpsestError, UserError
from toolkit.model import Model
from trainers.attention_masks import apart, minmax, similarity, spread
from trainers.customize import attencraft
from trainers.customize.attencraft import AttenCraft, alone_or_all
from trainers.loop import Batch

PLAIN: dict[str, Any] = {"prior": "none", "class_prompts": ("a photo at the beach",)}


@pytest.fixture
def scene(tmp_path: Path) -> tuple[Path, ...]:
    Image.new("RGB", (16, 16), "red").save(tmp_path / "scene.png")
    return (tmp_path / "scene.png",)


@pytest.fixture
def masked(scene: tuple[Path, ...], tmp_path: Path) -> CustomizeTask:
    """Two subjects in one picture, one on its left and one on its right."""
    for name, box in (("left", (0, 0, 8, 16)), ("right", (8, 0, 16, 16))):
        mask = Image.new("L", (16, 16), 0)
        mask.paste(255, box)
        mask.save(tmp_path / f"{name}.png")
    return CustomizeTask((Subject("<a>", "dog", scene, (tmp_path / "left.png",)), Subject("<b>", "cat", scene, (tmp_path / "right.png",))))


def halves(side: int = 8) -> torch.Tensor:
    """Masks [2, h, w] of the left and the right half."""
    masks = torch.zeros(2, side, side)
    masks[0, :, : side // 2], masks[1, :, side // 2 :] = 1, 1
    return masks


def test_attention_is_passed_on_between_places(tiny: Model) -> None:
    """Against the equation, with the power by hand."""
    arch, draw = tiny.arch, torch.Generator().manual_seed(0)
    latents, t, text = torch.randn(1, *arch.latent_shape(16, 16), generator=draw), torch.tensor([100]), arch.encode(["a dog and a cat"])
    tokens = token_mask(arch, ["a dog and a cat"] * 2, ["dog", "cat"])
    belongs, looked = spread(arch, latents, t, text, tokens, (16, 16))
    cross, own = list(arch.cross_attention_sites()), self_attention_sites(arch)
    assert len(own) == len(cross) and not set(own) & set(cross)
    with torch.no_grad(), attention_maps(arch, [*cross, *own]) as maps:
        arch.predict(latents, t, text)

    def mean(sites: list[str]) -> torch.Tensor:
        found = {site: maps.probabilities(site)[0].mean(0) for site in sites}
        finest = max(len(one) for one in found.values())
        return torch.stack([one for one in found.values() if len(one) == finest]).mean(0)

    def scaled(values: torch.Tensor) -> torch.Tensor:
        return (values - values.min()) / (values.max() - values.min())

    among = scaled(mean(own))
    together = scaled(among @ among @ among @ among)
    for i, token in enumerate(tokens):
        seen = mean(cross)[:, token].sum(-1)
        torch.testing.assert_close(looked[i].flatten(), seen, atol=1e-5, rtol=1e-4)
        expected = scaled(together @ scaled(scaled(seen) ** 2))
        torch.testing.assert_close(belongs[i].flatten(), expected, atol=1e-4, rtol=1e-3)


def test_words_share_the_places(tiny: Model) -> None:
    """Against the equation, with shares by hand."""
    arch, prompt = tiny.arch, "a dog and a cat"
    latents = torch.randn(1, *arch.latent_shape(16, 16), generator=torch.Generator().manual_seed(0))
    t, text = torch.tensor([100]), arch.encode([prompt])
    tokens = token_mask(arch, [prompt] * 3, ["dog", "cat", "and"])
    alone, looked = spread(arch, latents, t, text, tokens, (16, 16))
    shared, same = spread(arch, latents, t, text, tokens, (16, 16), 2)
    assert torch.equal(looked, same) and torch.equal(alone[2], shared[2]), "the third word is no rival"
    with torch.no_grad(), attention_maps(arch, self_attention_sites(arch)) as maps:
        arch.predict(latents, t, text)
    among = minmax(maps.mean(maps.near(16, self_attention_sites(arch)))[0].flatten()).view(64, 64)
    together = minmax(torch.linalg.matrix_power(among, 4).flatten()).view(64, 64)
    seen = looked.flatten(1)
    for i in range(2):
        expected = minmax(together @ minmax(seen[i] ** 2 / (seen[0] + seen[1])) ** 2)
        torch.testing.assert_close(shared[i].flatten(), expected, atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(spread(arch, latents, t, text, tokens, (16, 16), 1)[0], alone)


def test_masks_are_of_the_mean_over_noise_levels(tiny: Model, scene: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """One level sees upper halves and the next one lower halves."""
    subjects = CustomizeTask((Subject("<a>", "dog", scene), Subject("<b>", "cat", scene)))
    (left, right), none = halves(8), torch.zeros(8, 8)
    top = torch.ones(8, 8)
    top[4:] = 0
    plays = itertools.cycle([torch.stack([left * top, right * top, none]), torch.stack([left * (1 - top), right * (1 - top), none])])
    rivals: list[int] = []

    def played(arch: Any, latents: Any, t: Any, text: Any, tokens: Any, sides: Any, among: int) -> tuple[torch.Tensor, torch.Tensor]:
        rivals.append(among)
        belongs = next(plays)
        return belongs, belongs

    monkeypatch.setattr(attencraft, "spread", played)
    with AttenCraft(**PLAIN, mask_draws=2, mask_shares=True).objective(tiny, subjects) as (made, _):
        crafting: Any = made
        assert rivals == [2, 2] and torch.equal(crafting._masks(0), halves(8))
    with AttenCraft(**PLAIN).objective(tiny, subjects) as (made, _):
        crafting = made
        assert rivals == [2, 2, 0] and torch.equal(crafting._masks(0), halves(8) * top)
    with pytest.raises(UserError, match="mask_draws is 0"):
        AttenCraft(mask_draws=0)


def test_places_belong_to_a_word_by_a_margin() -> None:
    belongs = torch.tensor([[0.9, 0.5, 0.1, 0.2], [0.1, 0.45, 0.8, 0.1], [0.2, 0.1, 0.2, 0.9]])[:, None]
    masks = apart(belongs, 0.1)
    assert masks is not None and masks[:, 0].tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]
    assert apart(belongs, 0.0)[0, 0].tolist() == [1, 1, 0, 0]  # type: ignore[index]
    assert apart(belongs[[0, 0, 2]], 0.1) is None, "two words at the same places"
    assert apart(torch.cat([belongs[:1], 0.1 * belongs[1:2], belongs[2:]]), 0.1) is None, "nothing is left for the second"


def test_similarity_of_masks() -> None:
    masks = halves(9)
    assert torch.allclose(similarity(masks, masks), torch.ones(2))
    assert (similarity(masks, masks.flip(0)) < 0).all()
    shifted = torch.roll(masks, 1, 2)
    a, b = (one[0].unfold(0, 7, 1).unfold(1, 7, 1).flatten(2).double() for one in (masks, shifted))
    ma, mb, cov = a.mean(-1), b.mean(-1), (a * b).mean(-1) - a.mean(-1) * b.mean(-1)
    var = (a * a).mean(-1) - ma**2 + (b * b).mean(-1) - mb**2
    expected = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (var + 9e-4))
    assert similarity(masks, shifted)[0].item() == pytest.approx(expected.mean().item(), rel=1e-4)


def test_the_loss_is_the_masked_error_and_the_divergence(tiny: Model, masked: CustomizeTask) -> None:
    method = AttenCraft(**PLAIN, train_batch_size=6, attention_weight=0.3, mask_normalization="image")
    with method.objective(tiny, masked) as (made, _):
        crafting: Any = made
        value, shown = crafting.loss(Batch(2))
        samples = crafting.samples(Batch(2))
        assert set(samples.prompts) == {"a photo of <a>", "a photo of <b>", "a photo of <a> and <b>"}
        alpha, sigma = tiny.arch.signal_and_noise(samples.t)
        with torch.no_grad(), attention_maps(tiny.arch) as maps:
            output = tiny.arch.predict(alpha * samples.latents + sigma * samples.noise, samples.t, tiny.arch.encode(samples.prompts))
            # Of the same prediction: maps of an untrained model are nearly even, and from 0 to 1 they show the last digits.
            term, of_these = crafting.attention(samples, maps)
        finest = max(maps.probabilities(site).shape[2] for site in maps.sites)
        sites = [site for site in maps.sites if maps.probabilities(site).shape[2] == finest]
        latent_masks: dict[str, torch.Tensor] = dict(zip(("<a>", "<b>"), halves(samples.latents.shape[-1]), strict=True))
        looks, errors = [], []
        for row, prompt in enumerate(samples.prompts):
            inside = [mask for word, mask in latent_masks.items() if word in prompt]
            errors.append(float((torch.stack(inside).amax(0) * (output[row] - samples.noise[row]) ** 2).mean()))
            own = []
            for word in [word for word in latent_masks if word in prompt]:
                token = token_mask(tiny.arch, [prompt], [word])[0]
                seen = torch.stack([maps.probabilities(site)[row].mean(0)[:, token].sum(-1) for site in sites]).mean(0)
                mask = torch.nn.functional.interpolate(latent_masks[word][None, None], (int(finest**0.5),) * 2, mode="bilinear").flatten()
                p, q = (one.softmax(0) for one in ((seen - seen.min()) / (seen.max() - seen.min()), mask))
                middle = (p + q) / 2
                own.append(float((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum()) / 2)
            looks.append(sum(own) / len(own))
    assert of_these["attention"] == pytest.approx(sum(looks) / 6, rel=1e-3)
    assert term.item() == pytest.approx(0.3 * of_these["attention"], rel=1e-5)
    assert value.item() == pytest.approx(sum(errors) / 6 + 0.3 * shown["attention"], rel=1e-3)


def test_masks_are_made_anew_when_they_are_recognised(tiny: Model, scene: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is played: at first halves; later the same moved by one place, or turned over."""
    task = CustomizeTask((Subject("<a>", "dog", scene), Subject("<b>", "cat", scene)))
    shows = {"masks": halves(8)}

    def played(arch: Any, latents: Any, t: Any, text: Any, tokens: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        assert tokens.shape[0] == 3 and tokens[2].nonzero().tolist() == [[0]], "the background is the first token"
        words = shows["masks"]
        return torch.cat([words, torch.full_like(words[:1], 0.5)]), torch.stack([0.2 * words[0], 0.1 * words[1], words[0]])

    monkeypatch.setattr(attencraft, "spread", played)
    with AttenCraft(**PLAIN, mask_steps=5, sampling="reweighted").objective(tiny, task) as (made, _):
        crafting: Any = made
        drawn = Counter(crafting.pictures.captions[0])
        assert drawn == {"a photo of <a>": 13, "a photo of <b>": 27, "a photo of <a> and <b>": 20}, "1 / 0.2 to 1 / 0.1, and a third"
        shows["masks"] = moved = torch.roll(halves(8), 1, 1)
        moved[:, 0] = halves(8)[:, 0]
        before = crafting._masks(0).clone()
        crafting.loss(Batch(4))
        assert torch.equal(crafting._masks(0), before)
        shows["masks"] = halves(8).flip(0)
        crafting.loss(Batch(5))
        assert torch.equal(crafting._masks(0), before), "turned over they are not recognised"
        kept, other = crafting.state(), halves(crafting._masks(0).shape[-1])
        crafting._put(0, other.flip(0), [0.1, 0.1])
        crafting.load_state(kept)
        assert torch.equal(crafting._masks(0), before) and Counter(crafting.pictures.captions[0]) == drawn


def test_subjects_that_are_not_told_apart_are_said(tiny: Model, scene: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attencraft, "spread", lambda *given: (torch.ones(3, 8, 8), torch.ones(3, 8, 8)))
    with pytest.raises(PalimpsestError, match=r"<a> and <b> are not told apart by attention in .*scene.png"):
        AttenCraft(**PLAIN).fit(tiny, CustomizeTask((Subject("<a>", "dog", scene), Subject("<b>", "cat", scene))))


def test_masks_are_made_with_a_caption_of_all_subjects(tiny: Model, scene: tuple[Path, ...]) -> None:
    alone = CustomizeTask(tuple(Subject(f"<{name}>", word, scene, (), (f"a <{name}>",)) for name, word in (("a", "dog"), ("b", "cat"))))
    with pytest.raises(UserError, match=r"no caption of .* names all of <a>, <b>"):
        AttenCraft(**PLAIN).fit(tiny, alone)


def test_one_template_is_all_it_takes() -> None:
    with pytest.raises(UserError, match="2 templates given, and masks are made with the words of one"):
        AttenCraft(**PLAIN, templates=("a {}", "one {}"))


def test_alone_or_all() -> None:
    assert alone_or_all(1) == [(0,)] and alone_or_all(3) == [(0,), (1,), (2,), (0, 1, 2)]


def test_given_masks_stay(tiny: Model, masked: CustomizeTask) -> None:
    with AttenCraft(**PLAIN, mask_steps=1).objective(tiny, masked) as (made, _):
        crafting: Any = made
        before = crafting._masks(0).clone()
        crafting.loss(Batch(3))
        assert torch.equal(crafting._masks(0), before) and not crafting.made
        assert np.isclose(before.sum().item(), before[0].numel())
