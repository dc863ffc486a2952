"""Prior preservation: the second term of the loss, with pictures of the class and without."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from toolkit.concepts import CustomizeTask, Subject
from toolkit.errors import UserError
from toolkit.model import Model
from trainers.customize.dreambooth_lora import DreamBoothLora
from trainers.loop import Batch
from trainers.preservation import ClassPictures, PreservedDenoising, without_token
from trainers.subjects import Samples


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    images = tuple(tmp_path / f"{colour}.png" for colour in ("red", "green"))
    for path in images:
        Image.new("RGB", (20, 20), path.stem).save(path)
    return Subject("<toy>", "cat", images, captions=("a <toy> cat on red", "my <toy>"))


def objective(model: Model, subject: Subject, **options: Any) -> Any:
    return DreamBoothLora(train_batch_size=2, **options).objective(model, CustomizeTask((subject,)))


def shaken(denoising: PreservedDenoising) -> None:
    """Give the factors values, so that the model is no longer the one before."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in denoising.module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))


def error(model: Model, samples: Samples) -> float:
    """The plain denoising loss."""
    noisy = model.arch.add_noise(samples.latents, samples.noise, samples.t)
    output = model.arch.predict(noisy, samples.t, model.arch.encode(samples.prompts))
    return float((output - model.arch.target(samples.latents, samples.noise, samples.t)).square().mean())


def test_without_pictures_the_class_is_what_the_model_said(tiny: Model, subject: Subject) -> None:
    with objective(tiny, subject, prior="prediction", prior_weight=0.7) as (denoising, _), torch.no_grad():
        shaken(denoising)
        loss, values = denoising.loss(Batch(3))
        samples = denoising.samples(Batch(3))
        prompts = [{"a <toy> cat on red": "a cat on red", "my <toy>": "my cat"}[prompt] for prompt in samples.prompts]
        noisy = tiny.arch.add_noise(samples.latents, samples.noise, samples.t)
        after, ours = tiny.arch.predict(noisy, samples.t, tiny.arch.encode(prompts)), error(tiny, samples)
        with denoising.module.off():
            before = tiny.arch.predict(noisy, samples.t, tiny.arch.encode(prompts))
    kept = float((after - before).square().mean())
    assert kept > 0
    assert values == pytest.approx({"subject": ours, "class": kept}, rel=1e-4)
    assert loss.item() == pytest.approx(ours + 0.7 * kept, rel=1e-4)


@pytest.mark.parametrize("own", [False, True])
def test_with_pictures_it_is_the_error_on_them(tiny: Model, subject: Subject, tmp_path: Path, own: bool) -> None:
    options: dict[str, Any] = {"num_class_images": 3, "class_image_steps": 2}
    if own:
        (tmp_path / "class").mkdir()
        Image.new("RGB", (30, 20), "blue").save(tmp_path / "class" / "blue.png")
        options = {"class_images": str(tmp_path / "class")}
    with objective(tiny, subject, prior="images", **options) as (denoising, _), torch.no_grad():
        shaken(denoising)
        loss, values = denoising.loss(Batch(3))
        known = denoising.known.draw("dreambooth_lora class", denoising.method, Batch(3))
        assert known.prompts == ["a photo of a cat"] * 2
        assert isinstance(denoising.known, ClassPictures) is not own
        ours, theirs = error(tiny, denoising.samples(Batch(3))), error(tiny, known)
    assert values == pytest.approx({"subject": ours, "class": theirs}, rel=1e-4)
    assert loss.item() == pytest.approx(ours + theirs, rel=1e-4)


@pytest.mark.parametrize("train_text_encoder", [False, True])
def test_distilled_it_is_how_far_predictions_on_them_have_moved(tiny: Model, subject: Subject, train_text_encoder: bool) -> None:
    options: dict[str, Any] = {"num_class_images": 3, "class_image_steps": 2, "train_text_encoder": train_text_encoder}
    with objective(tiny, subject, prior="distillation", prior_weight=0.7, **options) as (denoising, _), torch.no_grad():
        _, values = denoising.loss(Batch(3))
        assert values["class"] == pytest.approx(0, abs=1e-10), "before training nothing has moved"
        shaken(denoising)
        loss, values = denoising.loss(Batch(3))
        known = denoising.known.draw("dreambooth_lora class", denoising.method, Batch(3))
        noisy = tiny.arch.add_noise(known.latents, known.noise, known.t)
        after, ours = tiny.arch.predict(noisy, known.t, tiny.arch.encode(known.prompts)), error(tiny, denoising.samples(Batch(3)))
        with denoising.module.off():
            before = tiny.arch.predict(noisy, known.t, tiny.arch.encode(known.prompts))
    kept = float((after - before).square().mean())
    assert kept > 0
    assert values == pytest.approx({"subject": ours, "class": kept}, rel=1e-4)
    assert loss.item() == pytest.approx(ours + 0.7 * kept, rel=1e-4)


def test_other_prompts_can_be_drawn_instead_of_the_class(tiny: Model, subject: Subject) -> None:
    options: dict[str, Any] = {"class_prompts": ("a dog", "a house"), "num_class_images": 3, "class_image_steps": 2}
    with objective(tiny, subject, prior="images", **options) as (denoising, _):
        assert denoising.known.captions == [("a dog",), ("a house",), ("a dog",)]


def test_the_class_moves_less_when_it_is_preserved(tiny: Model, subject: Subject) -> None:
    shape = tiny.arch.latent_shape(16, 16)
    latents, t = torch.randn(8, *shape, generator=torch.Generator().manual_seed(1)), torch.linspace(50, 950, 8).long()

    def drift(**options: Any) -> float:
        method = DreamBoothLora(max_train_steps=30, learning_rate=1e-2, train_batch_size=2, **options)
        edit = method.fit(tiny, CustomizeTask((subject,)))
        with torch.no_grad():
            before = tiny.arch.predict(latents, t, tiny.arch.encode(["a cat on red"] * 8))
            with tiny.attached(edit):
                return float((tiny.arch.predict(latents, t, tiny.arch.encode(["a cat on red"] * 8)) - before).square().mean())

    alone, drawn = drift(), {"num_class_images": 3, "class_image_steps": 2}
    assert drift(prior="prediction", prior_weight=10.0) < 0.7 * alone
    assert drift(prior="distillation", prior_weight=10.0, **drawn) < 0.9 * alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior_weight": 2.0}, "prior_weight given with prior none"),
        ({"prior": "prediction", "num_class_images": 5}, "num_class_images given with prior prediction"),
        (
            {"prior": "images", "class_images": "x", "class_image_guidance": 2.0},
            "guidance given with prior images and class_images",
        ),
        ({"prior": "images", "num_class_images": 0}, "num_class_images 0"),
        ({"rank": 0}, "rank is 0"),
        ({"snr_gamma": -1.0}, "snr_gamma is -1"),
        ({"train_text_encoder": True, "cache": "disk"}, "cannot be kept"),
    ],
)
def test_options_that_have_no_effect_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DreamBoothLora(**options)


def test_class_pictures_of_several_classes_need_captions(tiny: Model, subject: Subject, tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    Image.new("RGB", (30, 20), "blue").save(tmp_path / "class" / "blue.png")
    two = CustomizeTask((subject, Subject("<pal>", "dog", subject.images)))
    method = DreamBoothLora(prior="images", class_images=str(tmp_path / "class"), max_train_steps=1)
    with pytest.raises(UserError, match="class_images of 2 classes have no captions"):
        method.fit(tiny, two)


def test_the_word_gives_way_to_the_class(subject: Subject) -> None:
    both = (subject, Subject("<pal>", "dog", subject.images))
    assert without_token("a <toy> cat beside a <pal>", both) == "a cat beside a dog"
