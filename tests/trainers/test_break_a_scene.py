"""break_a_scene: samples of some of a picture's subjects, the masked error and the attention term, and its two parts."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from toolkit.attention import attention_maps, token_mask
from toolkit.concepts import CustomizeTask, Subject
from toolkit.edits.chain import Chain
from toolkit.edits.delta import Delta
from toolkit.edits.low_rank import LowRank
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError
from toolkit.model import Model
from trainers.customize.break_a_scene import BreakAScene, how_many_then_which
from trainers.loop import Batch

PLAIN: dict[str, Any] = {"prior": "none", "class_prompts": ("a photo at the beach",)}


@pytest.fixture
def task(tmp_path: Path) -> CustomizeTask:
    """Two subjects in one picture, one on its left and one on its right."""
    Image.new("RGB", (16, 16), "red").save(tmp_path / "scene.png")
    for name, box in (("left", (0, 0, 8, 16)), ("right", (8, 0, 16, 8))):
        mask = Image.new("L", (16, 16), 0)
        mask.paste(255, box)
        mask.save(tmp_path / f"{name}.png")
    scene = (tmp_path / "scene.png",)
    return CustomizeTask((Subject("<a>", "dog", scene, (tmp_path / "left.png",)), Subject("<b>", "cat", scene, (tmp_path / "right.png",))))


def test_how_many_is_drawn_before_which() -> None:
    for count in (1, 2, 3, 4):
        drawn = Counter(how_many_then_which(count))
        sizes = Counter(size for some, times in drawn.items() for size in [len(some)] * times)
        assert len(set(sizes.values())) == 1 and set(sizes) == set(range(1, count + 1))
        assert all(len({drawn[some] for some in drawn if len(some) == size}) == 1 for size in sizes)
        assert len(drawn) == 2**count - 1


def test_the_loss_is_the_masked_error_and_the_attention(tiny: Model, task: CustomizeTask) -> None:
    method = BreakAScene(**PLAIN, train_batch_size=6, attention_weight=0.3, mask_normalization="image")
    with method.objective(tiny, task) as (made, _):
        breaking: Any = made
        value, shown = breaking.loss(Batch(2))
        samples = breaking.samples(Batch(2))
        assert set(samples.prompts) == {"a photo of <a>", "a photo of <b>", "a photo of <a> and <b>"}
        alpha, sigma = tiny.arch.signal_and_noise(samples.t)
        with attention_maps(tiny.arch) as maps:
            output = tiny.arch.predict(alpha * samples.latents + sigma * samples.noise, samples.t, tiny.arch.encode(samples.prompts))
        side = samples.latents.shape[-1]
        left, right = torch.zeros(2, side, side)
        left[:, : side // 2] = 1
        right[: side // 2, side // 2 :] = 1
        masks, errors, looks = {"<a>": left, "<b>": right}, [], []
        finest = max(maps.probabilities(site).shape[2] for site in maps.sites)
        sites = [site for site in maps.sites if maps.probabilities(site).shape[2] == finest]
        for row, prompt in enumerate(samples.prompts):
            inside = [masks[word] for word in masks if word in prompt]
            union = torch.stack(inside).amax(0)
            errors.append(float((union * (output[row] - samples.noise[row]) ** 2).mean()))
            own = []
            for word, mask in masks.items():
                if word in prompt:
                    token = token_mask(tiny.arch, [prompt], [word])[0]
                    each = torch.stack([maps.probabilities(site)[row].mean(0)[:, token].sum(-1) for site in sites]).mean(0)
                    seen = each.view(int(finest**0.5), -1)
                    own.append(float(F.mse_loss(seen / seen.max(), F.adaptive_avg_pool2d(mask[None, None], seen.shape)[0, 0])))  # type: ignore
            looks.append(sum(own) / len(own))
    assert shown["attention"] == pytest.approx(sum(looks) / len(looks), rel=1e-3)
    assert value.item() == pytest.approx(sum(errors) / len(errors) + 0.3 * shown["attention"], rel=1e-3)


def test_first_the_words_alone_then_all(tiny: Model, task: CustomizeTask) -> None:
    options: dict[str, Any] = {**PLAIN, "learning_rate": 0.01, "tuning_learning_rate": 0.001}
    words = BreakAScene(**options, max_train_steps=3, words_steps=3).fit(tiny, task)
    assert isinstance(words, TokenEdit) and set(words.tokens) == {"<a>", "<b>"}
    longer = BreakAScene(**options, max_train_steps=4, words_steps=3).fit(tiny, task)
    assert isinstance(longer, Chain)
    rows, weights = longer.edits
    assert isinstance(rows, TokenEdit) and isinstance(weights, Delta)
    for token, parts in words.tokens.items():
        moved = (rows.tokens[token]["text_encoder"] - parts["text_encoder"]).abs().max()
        assert 0 < moved < 0.0011, "one step of the smaller size"
    changed = {name.split(".")[0] for name in weights.parameter_names() if weights.delta(name).abs().max() > 0}
    assert changed == {"denoiser", "text_encoder"}
    assert max(weights.delta(name).abs().max() for name in weights.parameter_names()) < 0.0011


def test_words_look_where_their_subjects_are(tiny: Model, task: CustomizeTask) -> None:
    def apart(weight: float) -> float:
        method = BreakAScene(**PLAIN, max_train_steps=40, words_steps=40, learning_rate=0.1, attention_weight=weight, train_batch_size=2)
        edit = method.fit(tiny, task)
        with tiny.attached(edit), BreakAScene(**PLAIN, train_batch_size=8).objective(tiny, renamed(task)) as (made, _):
            breaking: Any = made
            for mine, theirs in zip(breaking.module.rows.parameters(), edit.tokens.values(), strict=True):  # type: ignore[attr-defined]
                mine.data.copy_(theirs["text_encoder"])
            return breaking.loss(Batch(0))[1]["attention"]

    assert apart(100.0) < 0.9 * apart(0.0)


def test_captions_say_which_subjects_of_a_picture_are_learnt(tiny: Model, task: CustomizeTask) -> None:
    """Of each alone, of both, or in several ways; a picture that is named twice is one picture, and each subject has one mask there."""
    (one, other), whole = task.subjects, "a <a> beside a <b>"
    told = (
        replace(one, images=one.images * 2, masks=one.masks * 2, captions=("a <a> on the left", whole)),
        replace(other, images=other.images * 2, masks=other.masks * 2, captions=("a <b> on the right", whole)),
    )
    method = BreakAScene(**PLAIN, train_batch_size=9)
    with method.objective(tiny, CustomizeTask(told)) as (made, _):
        breaking: Any = made
        pictures, samples = breaking.pictures, breaking.samples(Batch(0))
        assert pictures.captions == [("a <a> on the left", whole, "a <b> on the right")] and pictures.whole(0) == whole
        assert set(samples.prompts) == set(pictures.captions[0]) and breaking.loss(Batch(0))[0].isfinite()
        assert [len(pictures.masks_in(0, prompt)) for prompt in pictures.captions[0]] == [1, 2, 1]
    with pytest.raises(UserError, match="different masks"):
        method.fit(tiny, CustomizeTask((replace(told[0], masks=one.masks + other.masks), told[1])))
    with pytest.raises(UserError, match=r"no caption of .* names <b>"):
        method.fit(tiny, CustomizeTask((replace(one, captions=("a <a>",)), other)))


def test_layers_may_be_changed_at_a_low_rank(tiny: Model, task: CustomizeTask) -> None:
    method = BreakAScene(**PLAIN, max_train_steps=3, words_steps=1, parameters="all", rank=2, num_vectors=2, tuning_learning_rate=1e-3)
    edit: Any = method.fit(tiny, task)
    words, change = edit.edits
    assert [len(rows["text_encoder"]) for rows in words.tokens.values()] == [2, 2] and isinstance(change, LowRank)
    every = {**tiny.arch.denoiser_layers(), **tiny.arch.encoder_lora_targets()}
    assert set(change.sites()) == {f"{site}.weight" for site in every} and {len(down) for down in change.down.values()} == {2}
    cross: Any = replace(method, parameters="x_strict", train_text_encoder=False).fit(tiny, task)
    assert set(cross.edits[1].sites()) == {f"{site}.weight" for site in tiny.arch.text_linears()}


def test_outside_the_masks_the_model_may_be_kept(tiny: Model, task: CustomizeTask) -> None:
    """Against the difference by hand, at places where no subject of a sample is; inside, nothing is added."""
    plain: dict[str, Any] = {**PLAIN, "train_batch_size": 4, "words_steps": 0}
    with BreakAScene(**plain, outside_weight=2.0).objective(tiny, task) as (made, _), torch.no_grad():
        breaking: Any = made
        for index, copy in enumerate(breaking.module.weights.copies):
            copy.add_(0.05 * torch.randn(copy.shape, generator=torch.Generator().manual_seed(index)))
        samples = breaking.samples(Batch(1))
        noisy = breaking.noisy(samples)
        output = tiny.arch.predict(noisy, samples.t, tiny.arch.encode(samples.prompts))
        added = breaking.learnt(samples, output) - breaking.error(samples, output)
        with breaking.module.off():
            said = [prompt.replace("<a>", "dog").replace("<b>", "cat") for prompt in samples.prompts]
            before = tiny.arch.predict(noisy, samples.t, tiny.arch.encode(said))
        outside = (samples.weights == 0).float()
        by_hand = (outside * (output - before) ** 2).sum() / (outside.sum() * output.shape[1])
        assert added.item() == pytest.approx(2 * by_hand.item(), rel=1e-4) and by_hand > 0
    with BreakAScene(**plain).objective(tiny, task) as (made, _), torch.no_grad():
        breaking = made
        assert torch.equal(breaking.learnt(samples, output), breaking.error(samples, output))


def renamed(task: CustomizeTask) -> CustomizeTask:
    """The same with other words."""
    return CustomizeTask(tuple(Subject(f"{one.token}x", one.class_name, one.images, one.masks) for one in task.subjects))


def test_what_would_have_no_effect_is_told(tiny: Model, task: CustomizeTask) -> None:
    with pytest.raises(UserError, match="words alone are trained"):
        BreakAScene(parameters="none", train_text_encoder=False)
    scene = task.subjects[0].images
    with pytest.raises(UserError, match="no masks given for <a>"):
        BreakAScene(**PLAIN).fit(tiny, CustomizeTask((Subject("<a>", "dog", scene),)))
    with pytest.raises(UserError, match="shorten it"):
        BreakAScene(**PLAIN, templates=(f"{'very ' * 80}{{}}",)).fit(tiny, CustomizeTask(task.subjects[:1]))
