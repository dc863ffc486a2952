"""TRCE against its equation, what it trains, and what its parts do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.closed_form.trce_embedding import TRCEEmbedding
from toolkit.arch.sd import SD
from toolkit.concepts import Concept, EraseTask
from toolkit.edits.base import Edit
from toolkit.edits.chain import Chain
from toolkit.edits.delta import Delta
from toolkit.errors import UserError
from toolkit.io.files import load_edit, save_edit
from toolkit.model import Model
from toolkit.runs import seeded
from toolkit.sample import partly_denoised
from trainers.erase.trce import TRCE, Turning, early_steps, trained_names
from trainers.loop import Batch

QUICK: dict[str, Any] = {"trajectories": 2, "sampling_steps": 4, "max_train_steps": 3}
TASK = EraseTask((Concept("cat", anchor="dog"), Concept("bird")), preserve=("cow",), templates=("a {}",))


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(SD.tiny(prediction_type="v_prediction"))


def moved(objective: Turning) -> None:
    with torch.no_grad():
        for parameter in objective.weights.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=seeded("moved"))


def apart(one: Tensor, other: Tensor) -> float:
    return (one - other).square().mean().item()


def test_the_loss_is_a_margin_between_what_is_preferred_and_what_is_rejected(model: Model) -> None:
    """Against the equation written out, one prediction at a time, with the model before and after the first stage."""
    method = TRCE(**QUICK, eta=1.5, margin=0.1, unconditional_weight=3.0, seed=7, train_batch_size=4)
    first, drawn = TRCEEmbedding().fit(model, TASK), early_steps(model, method, TASK)
    with model.attached(first):
        objective = Turning(model, method, drawn)
        with objective.weights:
            moved(objective)
            value, shown = objective.loss(Batch(6, 1, 2))
    after, erase, keep, seen = model.reference([first]), 0.0, 0.0, set[int]()
    nothing = model.arch.encode([""])
    for place in (4, 5, 6, 7):
        draw = seeded("erase", 7, 6, place)
        row, step = (int(torch.randint(size, (), generator=draw)) for size in (2, 2))  # two of the four steps are early
        seen.add(row)
        x, t = partly_denoised(model, [("a cat", "a bird")[row]], [7 + row], [step], steps=4, guidance=3.0)
        concept, anchor = (model.arch.encode([(("a cat", "a dog"), ("a bird", ""))[row][side]]) for side in (0, 1))
        with torch.no_grad():
            c, s, u = (model.arch.predict(x, t, text) for text in (concept, anchor, nothing))
        prefer, reject = s + 1.5 * (s - u) if row == 0 else u - 1.5 * (c - u), c + 1.5 * (c - u)
        with model.attached(first), objective.weights, torch.no_grad():
            now = [model.arch.predict(x, t, text) for text in (concept, nothing)]
        erase += sum(max(0.0, apart(e, prefer) - apart(e, reject) + 0.1) for e in now) / 8
        for i in range(4):
            draw = seeded("keep", 7, 6, place, i)
            row, step = (int(torch.randint(size, (), generator=draw)) for size in (2, 4))
            y, t = partly_denoised(after, [""], [7 + row], [step], steps=4, guidance=3.0)
            with torch.no_grad():
                stays = after.arch.predict(y, t, nothing)
                with model.attached(first), objective.weights:
                    keep += apart(model.arch.predict(y, t, nothing), stays) / 16
    assert seen == {0, 1} and erase > 0 and keep > 0
    assert shown == pytest.approx({"erase": erase, "keep": keep}, rel=1e-3)
    assert value.item() == pytest.approx(erase + 3.0 * keep, rel=1e-3)


def test_two_parts_of_a_step_are_one_of_twice_the_size(model: Model) -> None:
    drawn = early_steps(model, TRCE(**QUICK), TASK)

    def mean(size: int, parts: int) -> float:
        objective = Turning(model, TRCE(**QUICK, train_batch_size=size), drawn)
        with objective.weights:
            moved(objective)
            return sum(objective.loss(Batch(3, part, parts))[0].item() for part in range(parts)) / parts

    assert mean(2, 2) == pytest.approx(mean(4, 1), rel=1e-5)


def test_nearer_to_what_is_preferred_by_the_margin_nothing_is_learned(model: Model) -> None:
    method = TRCE(**QUICK, unconditional_weight=0.0)
    drawn = early_steps(model, method, TASK)
    gradients = []
    for prefer in (0.0, 100.0):  # what the model says is near 0, and what is rejected is the other
        drawn.target = torch.full_like(drawn.target, prefer)
        drawn.target[:, :, 1] = 100.0 - prefer
        objective = Turning(model, method, drawn)
        with objective.weights:
            objective.loss(Batch(0))[0].backward()
        gradients.append(max(float(p.grad.abs().max()) for p in objective.weights.parameters() if p.grad is not None))
    assert gradients[0] == 0 < gradients[1]


def test_what_is_trained_is_the_self_attention_and_the_queries_on_top_of_the_first_stage(model: Model, tmp_path: Path) -> None:
    edit = TRCE(**QUICK, learning_rate=1e-2).fit(model, TASK)
    assert isinstance(edit, Chain)
    solved, trained = edit.edits
    alone = TRCEEmbedding().fit(model, TASK)
    assert solved.info == alone.info and all(torch.equal(solved.delta(site), alone.delta(site)) for site in alone.sites())
    names = set(trained.sites())
    assert isinstance(trained, Delta) and names == set(trained_names(model.arch))
    assert names == {
        f"denoiser.{name}"
        for name, _ in model.arch.components()["denoiser"].named_parameters()
        if ".attn1." in name or ".attn2.to_q." in name
    }
    assert edit.info.on == () and trained.info.on == ("trce_embedding",) and edit.info.notes["steps"] == 3
    loaded = load_edit(save_edit(edit, tmp_path / "edit.safetensors"))
    assert isinstance(loaded, Chain) and loaded.edits[1].info == trained.info
    assert TRCE(**QUICK).fit(model.reference([alone]), TASK).info.on == ("trce_embedding",)


def test_training_turns_the_concept_and_the_weight_keeps_what_is_drawn_without_a_prompt(model: Model) -> None:
    """The second stage on and off: the prediction comes nearer to the preferred one, and what is drawn without a prompt follows less."""
    task = EraseTask((Concept("cat", anchor="dog"),), templates=("a {}",))
    options: dict[str, Any] = {**QUICK, "max_train_steps": 25, "eta": 1.0, "margin": 1.0, "learning_rate": 3e-3}
    drawn = early_steps(model, TRCE(**options), task)
    x, t, text, target = drawn.at([0, 0], [0, 1], model.arch.device)
    y, when = partly_denoised(model, [""] * 4, range(10, 14), range(4), steps=4, guidance=3.0)
    nothing = model.arch.encode([""] * 4)

    def measured(edit: Edit) -> tuple[float, Tensor]:
        with model.attached(edit), torch.no_grad():
            now = model.arch.predict(x, t, text)
            return apart(now, target[:, 0]) - apart(now, target[:, 1]), model.arch.predict(y, when, nothing)

    off, before = measured(TRCEEmbedding().fit(model, task))
    free, drifted = measured(TRCE(**options, unconditional_weight=0.0).fit(model, task))
    held, stayed = measured(TRCE(**options, unconditional_weight=100.0).fit(model, task))
    assert free < off and held < off
    assert apart(stayed, before) < 0.5 * apart(drifted, before)


def test_early_is_a_part_of_the_steps(model: Model) -> None:
    shapes = [early_steps(model, TRCE(**QUICK, early=early), TASK).latents.shape[1] for early in (0.1, 0.5, 0.6, 1.0)]
    assert shapes == [1, 2, 3, 4]


def test_what_would_have_no_effect_is_said(model: Model) -> None:
    with pytest.warns(UserWarning, match="nothing is learned; raise margin"):
        early_steps(model, TRCE(**QUICK, margin=0.0, eta=0.0), EraseTask((Concept("cat", anchor="cat"),)))
    with pytest.raises(UserError, match="trajectories is 1, for 2 concepts"):
        TRCE(**{**QUICK, "trajectories": 1}).fit(model, TASK)
    with pytest.raises(UserError, match=r"early is 0\.0"):
        TRCE(early=0.0)
    with pytest.raises(UserError, match=r"eta is -1\.0"):
        TRCE(eta=-1.0)
