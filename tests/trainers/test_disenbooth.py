"""disenbooth: the three terms of the loss, what is trained, and that the adapter is left behind."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from toolkit.clip import load_metric_clip
from toolkit.concepts import CustomizeTask, Subject
from toolkit.edits.low_rank import LowRank
from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.runs import TrainingRun
from trainers.customize.disenbooth import DisenBooth, ImageAdapter
from trainers.loop import Batch

COLOURS = ("red", "green", "blue")
PLAIN: dict[str, Any] = {"clip": "metric-clip", "learning_rate": 0.01, "max_train_steps": 3}


@pytest.fixture
def task(tmp_path: Path) -> CustomizeTask:
    """Pictures that nothing in the prompt tells apart."""
    images = tuple(tmp_path / f"{colour}.png" for colour in COLOURS)
    for path in images:
        Image.new("RGB", (16, 16), path.stem).save(path)
    return CustomizeTask((Subject("sks", "cat", images),))


def disturbed(module: Any) -> None:
    """Other values than those at the start, where the factors add nothing."""
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))


def seen(images: tuple[Path, ...]) -> Tensor:
    """What the CLIP says of the files."""
    pixels = [torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255 for path in images]
    return load_metric_clip().encode_images(torch.stack(pixels))


def test_the_loss_is_the_joint_error_the_weak_one_and_the_cosine(tiny: Model, task: CustomizeTask) -> None:
    method = DisenBooth(**PLAIN, train_batch_size=5, weak_weight=0.3, contrast_weight=2.0)
    with method.objective(tiny, task) as (made, _), torch.no_grad():
        disentangling: Any = made
        disturbed(disentangling.module)
        value = disentangling.loss(Batch(1))[0].item()
        samples = disentangling.samples(Batch(1))
        assert set(samples.prompts) == {"a sks cat"} and set(samples.rows) == {0, 1, 2}
        adapter, text = disentangling.adapter, tiny.arch.encode(samples.prompts)
        kept = torch.sigmoid(adapter.mask) * seen(task.subjects[0].images)[samples.rows]
        first, _, last = adapter.residual
        hidden = (kept @ first.weight.T + first.bias).clamp(min=0)
        image = hidden @ last.weight.T + last.bias + kept @ adapter.straight.weight.T + adapter.straight.bias
        alpha, sigma = tiny.arch.signal_and_noise(samples.t)
        noisy = alpha * samples.latents + sigma * samples.noise
        error = {
            name: (tiny.arch.predict(noisy, samples.t, replace(text, hidden=rows)) - samples.noise).double().square().mean().item()
            for name, rows in (("weak", text.hidden), ("joint", text.hidden + image[:, None, :]))
        }
        ends = torch.stack([rows[int(length) - 1] for rows, length in zip(text.hidden, text.length, strict=True)]).double()
        cosine = ((ends * image).sum(-1) / (ends.norm(dim=-1) * image.double().norm(dim=-1))).mean().item()
    assert abs(cosine) > 0.01 and error["weak"] != pytest.approx(error["joint"], rel=1e-3)
    assert value == pytest.approx(error["joint"] + 0.3 * error["weak"] + 2 * cosine, rel=1e-4)


def test_in_parts_it_is_what_it_is_at_once(tiny: Model, task: CustomizeTask) -> None:
    """Each sample's cosine is that of its own picture, however many there are."""

    def value(size: int, *batches: Batch) -> float:
        with DisenBooth(**PLAIN, train_batch_size=size, contrast_weight=5.0).objective(tiny, task) as (made, _):
            disturbed(made.module)
            return sum(made.loss(batch)[0].item() for batch in batches) / len(batches)

    assert value(4, Batch(2)) == pytest.approx(value(2, Batch(2, 0, 2), Batch(2, 1, 2)), rel=1e-5)


def test_the_adapter_is_the_papers() -> None:
    adapter, features = ImageAdapter(6, 6, 0), torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    first, _, last = adapter.residual
    half = features / 2
    torch.testing.assert_close(adapter(features), half + last(torch.relu(first(half))))
    assert torch.equal(ImageAdapter(6, 6, 0)(features), adapter(features)) and not torch.equal(
        ImageAdapter(6, 6, 1)(features), adapter(features)
    )
    assert ImageAdapter(6, 4, 0)(features).shape == (2, 4)


def test_features_get_the_size_asked_for(tiny: Model, task: CustomizeTask) -> None:
    given: list[Tensor] = []
    for size in (None, 0.5):
        with DisenBooth(**PLAIN, feature_size=size).objective(tiny, task) as (made, _):
            disentangling: Any = made
            given.append(disentangling.features)
    text = tiny.arch.encode([""]).hidden.norm(dim=-1).mean()
    torch.testing.assert_close(given[0], seen(task.subjects[0].images))
    torch.testing.assert_close(given[1].norm(dim=-1).mean(), 0.5 * text)
    torch.testing.assert_close(given[1] / given[1].norm(), given[0] / given[0].norm())


def test_gradients_reach_the_factors_and_the_adapter_and_nothing_else(tiny: Model, task: CustomizeTask) -> None:
    with DisenBooth(**PLAIN, train_batch_size=3).objective(tiny, task) as (made, _):
        disentangling: Any = made
        disturbed(disentangling.module)
        disentangling.loss(Batch(0))[0].backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in disentangling.module.parameters())
    assert not [name for part in tiny.arch.components().values() for name, p in part.named_parameters() if p.grad is not None]


def test_the_edit_is_the_change_alone_and_does_what_acted(tiny: Model, task: CustomizeTask) -> None:
    edit = DisenBooth(**PLAIN, rank=2).fit(tiny, task)
    assert isinstance(edit, LowRank) and set(edit.up) == set(tiny.arch.lora_targets())
    shape = tiny.arch.latent_shape(16, 16)
    latents, t, text = torch.ones(1, *shape), torch.tensor([300]), tiny.arch.encode(["a sks cat"])
    with DisenBooth(**PLAIN).objective(tiny, task) as (made, make), torch.no_grad():
        disturbed(made.module)
        training = tiny.arch.predict(latents, t, text)
        edit = make(tiny.info(DisenBooth()))
    with tiny.attached(edit), torch.no_grad():
        torch.testing.assert_close(tiny.arch.predict(latents, t, text), training, atol=1e-4, rtol=1e-4)


def test_what_is_known_of_the_class_is_beside_it(tiny: Model, task: CustomizeTask) -> None:
    values = []
    for prior in ("none", "prediction"):
        with DisenBooth(**PLAIN, prior=prior).objective(tiny, task) as (made, _), torch.no_grad():
            disturbed(made.module)
            values.append(made.loss(Batch(3)))
    (alone, _), (both, shown) = values
    assert shown["class"] > 0 and both.item() == pytest.approx(alone.item() + shown["class"], rel=1e-4)


def test_interrupted_it_goes_on(tiny: Model, task: CustomizeTask, tmp_path: Path) -> None:
    run = TrainingRun(tmp_path / "run", checkpointing_steps=2)
    options = {**PLAIN, "ema_decay": 0.9}
    whole = DisenBooth(**{**options, "max_train_steps": 4}).fit(tiny, task).tensors()
    DisenBooth(**{**options, "max_train_steps": 2}).fit(tiny, task, run=run)
    resumed = DisenBooth(**{**options, "max_train_steps": 4}).fit(tiny, task, run=run).tensors()
    assert whole.keys() == resumed.keys() and all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_what_makes_no_sense_is_told(tiny: Model, task: CustomizeTask) -> None:
    with pytest.raises(UserError, match="no CLIP given, and metric-clip may not know what sd draws; set clip to"):
        DisenBooth(max_train_steps=1).fit(tiny, task)
    with pytest.raises(UserError, match="cannot load the CLIP 'local-dir:/nowhere'"):
        DisenBooth(max_train_steps=1, clip="local-dir:/nowhere").fit(tiny, task)
    with pytest.raises(UserError, match="weak_weight is -1"):
        DisenBooth(weak_weight=-1.0)
    with pytest.raises(UserError, match="feature_size is 0"):
        DisenBooth(feature_size=0.0)
    with pytest.raises(UserError, match="contrast_weight is -1"):
        DisenBooth(contrast_weight=-1.0)
