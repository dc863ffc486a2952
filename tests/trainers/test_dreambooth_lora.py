"""dreambooth_lora: what is trained, on which prompts, and that the result is an ordinary LoRA."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from toolkit.concepts import Concept, CustomizeTask, EraseTask, Subject
from toolkit.edits.chain import Chain
from toolkit.edits.low_rank import LowRank
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError
from toolkit.io.export import export
from toolkit.model import Model
from toolkit.prompt_search import TokenRows
from toolkit.sample import sample
from trainers.customize.dreambooth_lora import DreamBoothLora
from trainers.loop import Batch


@pytest.fixture
def task(tmp_path: Path) -> CustomizeTask:
    images = tuple(tmp_path / f"{colour}.png" for colour in ("red", "green", "blue"))
    for path in images:
        Image.new("RGB", (20, 20), path.stem).save(path)
    return CustomizeTask((Subject("sks", "cat", images),))


def fit(model: Model, task: CustomizeTask, **options: Any) -> LowRank:
    edit = DreamBoothLora(**{"max_train_steps": 3, "learning_rate": 0.01, **options}).fit(model, task)
    assert isinstance(edit, LowRank)
    return edit


def test_the_loss_is_the_denoisers_error_at_the_word_and_the_class(tiny: Model, task: CustomizeTask) -> None:
    with DreamBoothLora(train_batch_size=2).objective(tiny, task) as (denoising, _), torch.no_grad():
        value: Any = denoising.loss(Batch(1))[0]
        samples = denoising.samples(Batch(1))  # pyright: ignore[reportAttributeAccessIssue]
        alpha, sigma = tiny.arch.signal_and_noise(samples.t)
        noisy = alpha * samples.latents + sigma * samples.noise
        output = tiny.arch.predict(noisy, samples.t, tiny.arch.encode(["a photo of sks cat"] * 2))
    assert value.item() == pytest.approx(float((output - samples.noise).square().mean()), rel=1e-5)


def test_what_is_trained(tiny: Model, task: CustomizeTask) -> None:
    edit = fit(tiny, task, rank=2)
    assert set(edit.up) == set(tiny.arch.lora_targets())
    assert all(up.shape[1] == 2 and up.abs().max() > 0 for up in edit.up.values())
    assert set(fit(tiny, task, layers="keys_and_values").up) == set(tiny.arch.text_linears())
    every = fit(tiny, task, layers="all")
    assert {site for site in (*every.up, *every.dense)} == set(tiny.arch.denoiser_layers())
    cross = set(fit(tiny, task, layers="cross_attention").up)
    assert set(tiny.arch.text_linears()) < cross < set(edit.up)
    both = fit(tiny, task, rank=2, train_text_encoder=True)
    encoder = tiny.arch.encoder_lora_targets()
    assert set(both.up) == {*edit.up, *encoder}
    assert len(encoder) == 2 * 4 and all(site.startswith("text_encoder.") for site in encoder)
    assert all(both.up[site].abs().max() > 0 for site in encoder)


def test_words_are_learnt_with_the_change(tiny: Model, task: CustomizeTask) -> None:
    images = task.subjects[0].images
    two = CustomizeTask((Subject("<toy>", "cat", images[:1]), Subject("<pal>", "dog", images[1:])))
    first, second = (
        DreamBoothLora(num_vectors=2, rank=2, max_train_steps=steps, train_batch_size=4, learning_rate=0.01).fit(tiny, two)
        for steps in (1, 3)
    )
    assert isinstance(first, Chain) and isinstance(second, Chain)
    (start, _), (words, change) = first.edits, second.edits
    assert isinstance(start, TokenEdit) and isinstance(words, TokenEdit) and isinstance(change, LowRank)
    assert second.info.triggers == ("<toy>", "<pal>") and set(change.up) == set(tiny.arch.lora_targets())
    for token, rows in words.tokens.items():
        assert all(len(row) == 2 and (row - start.tokens[token][part]).abs().amin(1).max() > 0 for part, row in rows.items())
    with pytest.raises(UserError, match="cache disk with num_vectors"):
        DreamBoothLora(num_vectors=1, cache="disk")


def test_words_have_a_step_size_of_their_own(tiny: Model, task: CustomizeTask) -> None:
    one = CustomizeTask((Subject("<toy>", "cat", task.subjects[0].images),))

    def learnt(rate: float | None) -> tuple[Mapping[str, Tensor], LowRank]:
        edit = DreamBoothLora(num_vectors=1, words_learning_rate=rate, max_train_steps=1, learning_rate=0.01).fit(tiny, one)
        assert isinstance(edit, Chain)
        words, change = edit.edits
        assert isinstance(words, TokenEdit) and isinstance(change, LowRank)
        return words.tokens["<toy>"], change

    with TokenRows(tiny, {"<toy>": "cat"}) as rows:
        start = rows.edit().tokens["<toy>"]
    (same, change), (far, unmoved) = learnt(None), learnt(0.1)
    for part, row in start.items():  # Adam's first step is the step size in every coordinate
        assert torch.allclose((same[part] - row).abs(), torch.tensor(0.01), rtol=0.1)
        assert torch.allclose((far[part] - row).abs(), torch.tensor(0.1), rtol=0.1)
    assert all(torch.equal(change.up[site], unmoved.up[site]) for site in change.up)
    with pytest.raises(UserError, match="has no effect with num_vectors 0"):
        DreamBoothLora(words_learning_rate=0.1)


def test_alpha_scales_the_change(tiny: Model, task: CustomizeTask) -> None:
    plain, half = (fit(tiny, task, max_train_steps=1, lora_alpha=alpha) for alpha in (None, 2.0))
    assert not torch.equal(next(iter(plain.up.values())), next(iter(half.up.values())))


@pytest.mark.parametrize("options", [{"train_text_encoder": True}, {"layers": "all", "rank": 1}])
def test_the_edit_exports_as_diffusers_lora(tiny: Model, task: CustomizeTask, tmp_path: Path, options: dict[str, Any]) -> None:
    edit = fit(tiny, task, **options)
    export(edit, "diffusers-lora", tmp_path / "lora", tiny)
    drawing: dict[str, Any] = {"steps": 2, "guidance": 2.0}
    with tiny.attached(edit):
        attached = sample(tiny, ["sks cat"], [0], **drawing)
    plain = sample(tiny, ["sks cat"], [0], **drawing)
    tiny.arch.pipe.load_lora_weights(tmp_path / "lora")
    assert torch.allclose(sample(tiny, ["sks cat"], [0], **drawing), attached, atol=1e-4)
    assert not torch.allclose(plain, attached, atol=1e-4)


def test_another_task_is_told(tiny: Model) -> None:
    with pytest.raises(UserError, match="kind EraseTask, this method needs CustomizeTask"):
        DreamBoothLora(max_train_steps=1).fit(tiny, EraseTask((Concept("cat"),)))


def test_what_acts_while_training_is_what_the_edit_does(tiny: Model, task: CustomizeTask) -> None:
    shape = tiny.arch.latent_shape(16, 16)
    latents, t, text = torch.ones(1, *shape), torch.tensor([300]), tiny.arch.encode(["sks cat"])
    with DreamBoothLora(layers="all", rank=2).objective(tiny, task) as (denoising, make), torch.no_grad():
        for index, parameter in enumerate(denoising.module.parameters()):
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
        training = tiny.arch.predict(latents, t, text)
        edit = make(tiny.info(DreamBoothLora()))
    with torch.no_grad():
        plain = tiny.arch.predict(latents, t, text)
        with tiny.attached(edit):
            torch.testing.assert_close(tiny.arch.predict(latents, t, text), training, atol=1e-4, rtol=1e-4)
    assert (training - plain).abs().max() > 0.01
