"""disendiff: the overlaps of where words and class names are attended to, and that training changes them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from toolkit.attention import attention_maps, token_mask
from toolkit.concepts import CustomizeTask, Subject
from toolkit.edits.chain import Chain
from toolkit.errors import UserError
from toolkit.model import Model
from trainers.customize.disendiff import DisenDiff
from trainers.loop import Batch

PLAIN: dict[str, Any] = {"prior": "none", "gradient_accumulation_steps": 1}
KERNEL = torch.tensor(
    [[1.0, 7.389056, 1.0], [7.389056, 54.59815, 7.389056], [1.0, 7.389056, 1.0]]
)  # exp(-(x^2 + y^2) / (2 * 0.25)), scaled


@pytest.fixture
def task(tmp_path: Path) -> CustomizeTask:
    Image.new("RGB", (16, 16), "red").save(tmp_path / "scene.png")
    scene = (tmp_path / "scene.png",)
    return CustomizeTask((Subject("<a>", "dog", scene), Subject("<b>", "cat", scene)))


def calm(seen: torch.Tensor) -> torch.Tensor:
    """From 0 to 1, then a weighted mean of each place and those around it, mirrored at the sides."""
    seen = (seen - seen.min()) / (seen.max() - seen.min())
    high, wide = seen.shape
    found = torch.zeros_like(seen)
    for y in range(high):
        for x in range(wide):
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    row, column = (abs(v) if v < size else 2 * size - 2 - v for v, size in ((y + dy, high), (x + dx, wide)))
                    found[y, x] += KERNEL[dy + 1, dx + 1] / KERNEL.sum() * seen[row, column]
    return found


def overlap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a * b).sum() + 1) / ((a + b).sum() - (a * b).sum() + 1))


def test_pictures_are_captioned_with_every_template(tiny: Model, task: CustomizeTask) -> None:
    with DisenDiff(**PLAIN, templates=("{}", "a photo of {}")).objective(tiny, task) as (made, _):
        pictures: Any = made
        assert pictures.pictures.captions == [("<a> dog and <b> cat", "a photo of <a> dog and <b> cat")]


def test_captions_have_the_class_names(tiny: Model, task: CustomizeTask) -> None:
    one = replace(task.subjects[0], captions=tuple(f"a {task.subjects[0].token}" for _ in task.subjects[0].images))
    with pytest.raises(UserError, match="write the class name too"):
        DisenDiff(prior="none").fit(tiny, CustomizeTask((one,)))


def test_the_loss_is_custom_diffusions_and_the_overlaps(tiny: Model, task: CustomizeTask) -> None:
    with DisenDiff(**PLAIN, attention_weight=0.2).objective(tiny, task) as (made, _):
        calibrating: Any = made
        value, shown = calibrating.loss(Batch(1))
        samples = calibrating.samples(Batch(1))
        prompt = "<a> dog and <b> cat"
        assert samples.prompts == [prompt] * 2
        alpha, sigma = tiny.arch.signal_and_noise(samples.t)
        with torch.no_grad(), attention_maps(tiny.arch) as maps:
            output = tiny.arch.predict(alpha * samples.latents + sigma * samples.noise, samples.t, tiny.arch.encode(samples.prompts))
        finest = max(maps.probabilities(site).shape[2] for site in maps.sites)
        sites = [site for site in maps.sites if maps.probabilities(site).shape[2] == finest]
        token = {word: token_mask(tiny.arch, [prompt], [word])[0] for word in ("<a>", "dog", "<b>", "cat")}
        terms = []
        for row in range(2):
            seen = torch.stack([maps.probabilities(site)[row].mean(0) for site in sites]).mean(0)
            at = {word: calm(seen[:, own].sum(-1).view(int(finest**0.5), -1)) for word, own in token.items()}
            dog, cat = at["dog"] ** 2, at["cat"] ** 2
            bind = 2 - overlap(dog, at["<a>"]) - overlap(cat, at["<b>"])
            terms.append((bind + overlap(dog, cat)) / 2)
    error = float((output - samples.noise).square().mean())
    assert shown["attention"] == pytest.approx(sum(terms) / 2, rel=1e-4)
    assert value.item() == pytest.approx(error + 0.2 * shown["attention"], rel=1e-4)


def test_words_come_to_be_attended_to_with_their_class_names(tiny: Model, task: CustomizeTask) -> None:
    def after(weight: float) -> float:
        method = DisenDiff(**PLAIN, attention_weight=weight, learning_rate=0.05, max_train_steps=30)
        with method.objective(tiny, task) as (made, _):
            calibrating: Any = made
            optimizer = torch.optim.Adam(calibrating.module.parameters(), lr=0.02)
            for step in range(30):
                optimizer.zero_grad()
                calibrating.loss(Batch(step))[0].backward()
                optimizer.step()
            return calibrating.loss(Batch(100))[1]["attention"]

    assert after(10.0) < 0.8 * after(0.0)


def test_it_gives_words_and_a_change_and_tells_what_it_cannot_do(tiny: Model, task: CustomizeTask) -> None:
    edit = DisenDiff(**PLAIN, max_train_steps=2).fit(tiny, task)
    assert isinstance(edit, Chain) and edit.info.triggers == ("<a>", "<b>")
    same = CustomizeTask(tuple(Subject(one.token, "dog", one.images) for one in task.subjects))
    with pytest.raises(UserError, match="the class names dog, dog are not distinct"):
        DisenDiff(**PLAIN).fit(tiny, same)
