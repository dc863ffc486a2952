"""ESD against its equation, and what it trains."""

from pathlib import Path
from typing import Any

import pytest
import torch

from toolkit.arch.sd import SD
from toolkit.concepts import Concept, EraseTask
from toolkit.edits.delta import Delta
from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.runs import TrainingRun, seeded
from toolkit.sample import noise, partly_denoised
from trainers.erase.esd import ESD, Steering
from trainers.erase.prompts import concept_prompts
from trainers.loop import Batch
from trainers.parameters import parameter_names
from trainers.trajectories import Trajectories

QUICK: dict[str, Any] = {"trajectories": 2, "sampling_steps": 4, "max_train_steps": 3}
TASK = EraseTask((Concept("cat", anchor="dog"), Concept("bird")), templates=("a {}",))


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(SD.tiny(prediction_type="v_prediction"))


def test_the_loss_is_the_distance_to_the_steered_prediction(model: Model) -> None:
    """Against the equation written out: the latents of the sampler, and three predictions of the model as it was."""
    method = ESD(**QUICK, eta=1.5, seed=7, train_batch_size=3)
    objective = Steering(model, method, TASK)
    with objective.weights:
        with torch.no_grad():
            for parameter in objective.weights.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=seeded("moved"))
        value = objective.loss(Batch(5, 1, 2))[0].item()
        wanted = 0.0
        for place in (3, 4, 5):
            draw = seeded("erase", 7, 5, place)
            row, step = (int(torch.randint(size, (), generator=draw)) for size in (2, 4))
            prompt, base = [("a cat", "a dog"), ("a bird", "")][row]
            with objective.weights.off(), torch.no_grad():
                x, t = partly_denoised(model, [prompt], [7 + row], [step], steps=4, guidance=3.0)
                c, b, nothing = (model.arch.predict(x, t, model.arch.encode([text])) for text in (prompt, base, ""))
            moved = model.arch.predict(x, t, model.arch.encode([prompt]))
            wanted += (moved - (b - 1.5 * (c - nothing))).square().mean().item() / 3
    assert value == pytest.approx(wanted, rel=1e-4)


def test_a_trajectory_holds_what_the_sampler_passes_through(model: Model) -> None:
    seen = Trajectories.of(model, ["a cat", "a bird"], [3, 4], steps=4, guidance=2.0, beside={"base": ["a dog", ""]})
    assert seen.latents.shape[:2] == (2, 4) and set(seen.outputs) == {"prompt", "negative", "base"}
    assert torch.allclose(seen.latents[:, 0], noise(["a cat", "a bird"], [3, 4], seen.latents.shape[2:]))
    x, t = partly_denoised(model, ["a cat", "a bird"], [3, 4], [0, 3], steps=4, guidance=2.0)
    assert torch.allclose(x[0], seen.latents[0, 0]) and torch.allclose(x[1], seen.latents[1, 3], atol=1e-5)
    assert t.tolist() == [seen.t[0], seen.t[3]]
    alone = model.arch.predict(seen.latents[:1, 3], seen.t[3:], model.arch.encode(["a dog"]))
    assert torch.allclose(seen.outputs["base"][:1, 3], alone, atol=1e-5)


@pytest.mark.parametrize("which", ["x", "x_strict", "u", "all"])
def test_only_the_chosen_parameters_change(model: Model, which: str) -> None:
    edit = ESD.from_config({**QUICK, "parameters": which, "learning_rate": 1e-2}).fit(model, TASK)
    assert isinstance(edit, Delta)
    names = set(edit.sites())
    cross = {name for name in names if ".attn2." in name}
    expected = {"x": names == cross != set(), "u": not cross, "all": cross < names}
    strict = {f"{site}.weight" for site in model.arch.text_linears()}
    assert names == strict if which == "x_strict" else expected[which]
    assert names <= set(parameter_names(model.arch, which))  # pyright: ignore[reportArgumentType]
    assert {p.requires_grad for p in model.arch.components()["denoiser"].parameters()} == {False}


def test_an_interrupted_fit_gives_the_same_edit(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = ESD(**{**QUICK, "max_train_steps": 6}, learning_rate=1e-2)
    whole = method.fit(model, TASK)
    run = TrainingRun(tmp_path, checkpointing_steps=2, sample_steps=3, sample_prompts=("a cat",))
    always = Steering.loss

    def failing(self: Steering, batch: Batch):
        if batch.step == 5:
            raise KeyboardInterrupt
        return always(self, batch)

    monkeypatch.setattr(Steering, "loss", failing)
    with pytest.raises(KeyboardInterrupt):
        method.fit(model, TASK, run=run)
    monkeypatch.setattr(Steering, "loss", always)
    resumed = method.fit(model, TASK, run=run)
    assert all(torch.equal(resumed.delta(site), whole.delta(site)) for site in whole.sites())
    with pytest.raises(UserError, match="is a checkpoint of another task, model or choice of options"):
        method.fit(model, EraseTask((Concept("cow"),)), run=run)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["000003.png", "000006.png"]


def test_words_and_templates_take_turns() -> None:
    task = EraseTask((Concept("cat", ("kitty",), "dog"), Concept("bird")), templates=("a {}", "{} here"))
    assert concept_prompts(task)[:4] == [("a cat", "a dog"), ("a bird", ""), ("a kitty", "a dog"), ("bird here", "")]
    assert len(concept_prompts(task)) == 6


def test_what_would_have_no_effect_is_said(model: Model) -> None:
    kept = EraseTask((Concept("cat"),), preserve=("dog",), templates=("a {}",))
    with pytest.warns(UserWarning, match="what the task preserves has no effect"):
        ESD(**QUICK).fit(model, kept)
    edit = ESD(**QUICK, preserve_weight=1.0).fit(model, kept)
    assert edit.info.notes["steps"] == 3 and edit.info.notes["loss"]["first"] > 0
    with pytest.raises(UserError, match="nothing is preserved"):
        ESD(**QUICK, preserve_weight=1.0).fit(model, TASK)
    with pytest.raises(UserError, match="guidance is 1"):
        ESD(guidance=1.0)
