"""Few-shot unlearning against its equation, what it trains, and its pictures."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from toolkit.arch.sd import SD
from toolkit.arch.sdxl import SDXL
from toolkit.concepts import Concept, EraseTask
from toolkit.edits.delta import Delta
from toolkit.errors import PalimpsestError, UserError
from toolkit.model import Model
from toolkit.pictures import pictures
from toolkit.runs import seeded
from toolkit.sample import trajectory
from trainers.erase.few_shot import Ascent, FewShot
from trainers.erase.pictures import Pictures
from trainers.loop import Batch
from trainers.photos import load_photos, to_latents

QUICK: dict[str, Any] = {"n_images": 2, "sampling_steps": 2, "max_train_steps": 3}
TASK = EraseTask((Concept("cat", ("kitty",)), Concept("bird")), templates=("a {}",))


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(SD.tiny(prediction_type="v_prediction"))


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Three pictures, each of one colour."""
    for name in ("red", "green", "blue"):
        Image.new("RGB", (16, 16), name).save(tmp_path / f"{name}.png")
    return str(tmp_path)


def test_the_loss_is_what_diffusion_training_lowers_with_its_sign_turned(model: Model) -> None:
    """Against the equation written out, on what the model draws, with a text encoder that has moved."""
    method = FewShot(**QUICK, guidance=2.0, seed=7, train_batch_size=3)
    objective = Ascent(model, method, TASK)
    asked = [["a cat", "a kitty"], ["a cat", "a kitty"], ["a bird"], ["a bird"]]
    drawn = trajectory(model, ["a cat", "a kitty", "a bird", "a bird"], [7, 8, 9, 10], steps=2, guidance=2.0)
    alpha_squared = model.arch.pipe.scheduler.alphas_cumprod
    with objective.weights:
        with torch.no_grad():
            for parameter in objective.weights.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=seeded("moved"))
        value = objective.loss(Batch(5, 1, 2))[0]
        wanted = 0.0
        for place in (3, 4, 5):
            turn, index = divmod(5 * 6 + place, 4)
            picture = torch.randperm(4, generator=seeded("few_shot round", 7, turn))[index]
            draw = seeded("few_shot", 7, 5, place)
            prompt = asked[picture][int(torch.randint(len(asked[picture]), (), generator=draw))]
            t = torch.randint(1000, (), generator=draw)
            eps, z = torch.randn(drawn.shape[1:], generator=draw), drawn[picture]
            alpha, sigma = alpha_squared[t].sqrt(), (1 - alpha_squared[t]).sqrt()
            v = model.arch.pipe.unet((alpha * z + sigma * eps)[None], t[None], model.arch.encode([prompt]).hidden).sample[0]
            wanted -= (v - (alpha * eps - sigma * z)).square().mean().item() / 3
    assert value.item() == pytest.approx(wanted, rel=1e-4)


def test_the_text_encoders_feed_forward_layers_and_last_attention_change(model: Model) -> None:
    edit = FewShot(**QUICK, learning_rate=1e-2).fit(model, TASK)
    assert isinstance(edit, Delta)
    places = {name.removesuffix(".weight").removesuffix(".bias").partition(".layers.")[2] for name in edit.sites()}
    attention = {f"1.self_attn.{linear}" for linear in ("q_proj", "k_proj", "v_proj", "out_proj")}
    assert places == {"0.mlp.fc1", "0.mlp.fc2", "1.mlp.fc1", "1.mlp.fc2", *attention}
    assert all(name.startswith("text_encoder.") for name in edit.sites())
    assert not any(p.requires_grad for part in model.arch.components().values() for p in part.parameters())


@pytest.mark.parametrize("family", [SD, SDXL])
def test_all_that_is_trained_is_read(family: type[SD]) -> None:
    model = Model(family.tiny())
    objective = Ascent(model, FewShot(**QUICK), TASK)
    with objective.weights:
        objective.loss(Batch(0))[0].backward()
    names = model.arch.encoder_mlps_and_last_attention()
    for name, parameter in zip(names, objective.weights.copies, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.any() or name.endswith("k_proj.bias")  # one number added to all scores changes no attention
    first = {name for name in names if name.startswith("text_encoder.")}
    assert any(".layers.1." in name for name in first) == (family is SD)  # nobody reads that one in Stable Diffusion XL
    if family is SDXL:
        assert sum(".self_attn." in name for name in names) == 16 and len(names) == 4 + 8 + 2 * 4 + 8


def test_trained_it_is_further_from_the_pictures(model: Model) -> None:
    """On the very samples that it was trained on, with the edit and without."""
    method = FewShot(**{**QUICK, "max_train_steps": 20}, learning_rate=1e-3)
    edit = method.fit(model, TASK)

    def error() -> float:
        objective = Ascent(model, method, TASK)
        objective.pictures = before.pictures
        return -sum(objective.loss(Batch(step))[0].item() for step in range(20))

    before = Ascent(model, method, TASK)
    plain = error()
    with model.attached(edit):
        assert error() > plain
    assert edit.info.notes["loss"]["first"] < 0


def test_a_batch_in_parts_is_the_same(model: Model) -> None:
    whole, parts = Ascent(model, FewShot(**QUICK, train_batch_size=4), TASK), Ascent(model, FewShot(**QUICK, train_batch_size=2), TASK)
    halves = [parts.loss(Batch(3, part, 2))[0].item() for part in (0, 1)]
    assert whole.loss(Batch(3))[0].item() == pytest.approx(sum(halves) / 2, rel=1e-5)


def test_pictures_of_a_folder_come_in_turn(model: Model, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = FewShot(images=folder)
    objective = Ascent(model, method, EraseTask((Concept("cat"),), templates=("a {}", "one {}")))
    assert torch.equal(objective.pictures.latents, to_latents(model.arch, load_photos(pictures(folder), 16)))
    assert objective.pictures.prompts == [["a cat", "one cat"]] and objective.pictures.concepts == [0, 0, 0]
    seen, always = [], Pictures._in_turn

    def noting(self: Pictures, what: str, seed: int, number: int) -> int:
        seen.append(always(self, what, seed, number))
        return seen[-1]

    monkeypatch.setattr(Pictures, "_in_turn", noting)
    for step in range(6):
        objective.loss(Batch(step))
    assert all(set(seen[i : i + 3]) == {0, 1, 2} for i in range(0, 12, 3)) and Counter(seen) == {0: 4, 1: 4, 2: 4}
    drawn, given = (way.fit(model, EraseTask((Concept("cat"),))) for way in (FewShot(**QUICK), method))
    assert not all(torch.equal(drawn.delta(site), given.delta(site)) for site in given.sites())


def test_the_optimizer_is_the_papers(model: Model) -> None:
    objective, method = Ascent(model, FewShot(**QUICK), TASK), FewShot()
    [group] = objective.optimizer(list(objective.weights.parameters()), method.loop()).param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-5, (0.9, 0.98), 1e-6, 1e-8)


def test_a_loss_that_is_not_finite_stops_the_run(model: Model) -> None:
    with pytest.raises(PalimpsestError, match=r"the loss became nan at step 1"):
        FewShot(**QUICK, learning_rate=1e30).fit(model, TASK)


def test_what_would_have_no_effect_is_said(model: Model, folder: str) -> None:
    with pytest.raises(UserError, match="n_images, guidance given beside images"):
        FewShot(images=folder, n_images=5, guidance=2.0)
    with pytest.raises(UserError, match="the task has 2"):
        FewShot(images=folder).fit(model, TASK)
    with pytest.raises(UserError, match="is not a folder"):
        FewShot(images=f"{folder}/nowhere").fit(model, EraseTask((Concept("cat"),)))
    with pytest.raises(UserError, match="sampling_steps is 0"):
        FewShot(sampling_steps=0)
    with pytest.warns(UserWarning, match="this method keeps nothing"):
        FewShot(**QUICK).fit(model, EraseTask((Concept("cat"),), preserve=("dog",)))
    with pytest.warns(UserWarning, match="anchor 'dog' has no effect"):
        FewShot(**QUICK).fit(model, EraseTask((Concept("cat", anchor="dog"),)))
