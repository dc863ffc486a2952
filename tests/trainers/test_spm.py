"""SPM against its equation, what it trains, and what its anchors and its gate do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from toolkit.arch.sd import SD
from toolkit.arch.sdxl import SDXL
from toolkit.concepts import Concept, EraseTask
from toolkit.edits.gated import Gated
from toolkit.edits.low_rank import LowRank
from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.runs import TrainingRun, seeded
from toolkit.sample import partly_denoised
from trainers.erase.spm import SPM, Adapter, elsewhere
from trainers.loop import Batch

QUICK: dict[str, Any] = {"sampling_steps": 3, "max_train_steps": 3, "anchors": 2}
TASK = EraseTask((Concept("cat", anchor="dog"), Concept("bird")), templates=("a {}",))
PAIRS = [("a cat", "a dog"), ("a bird", "")]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(SD.tiny(prediction_type="v_prediction"))


def moved(objective: Adapter, by: float = 0.05) -> None:
    with torch.no_grad():
        for parameter in objective.weights.parameters():
            parameter += by * torch.randn(parameter.shape, generator=seeded("moved"))


def test_the_loss_is_the_equation(model: Model) -> None:
    """Against it written out: latents of the model in training, the frozen model beyond the base, anchors and what is preserved."""
    task = EraseTask(TASK.concepts, ("a cow", "a horse"), TASK.templates)
    method = SPM(**QUICK, eta=1.5, seed=7, train_batch_size=2, anchor_weight=20.0, preserve_weight=3.0, guidance=2.0)
    objective, arch = Adapter(model, method, task), model.arch
    with objective.weights:
        moved(objective)
        value, shown = objective.loss(Batch(5, 1, 2))
        wanted = {"erase": 0.0, "anchor": 0.0, "keep": 0.0}
        for place in (2, 3):
            draw = seeded("spm", 7, 5, place)
            word, done, seed, keep = (int(torch.randint(size, (), generator=draw)) for size in (2, 3, 2**31, 2))
            (prompt, base), kept = PAIRS[word], task.preserve[keep]
            anchors = [arch.encode([""]), *(elsewhere(arch.encode([prompt]), draw) for _ in range(2))]
            x, t = partly_denoised(model, [prompt], [seed], [done], steps=3, guidance=2.0)
            with objective.weights.off(), torch.no_grad():
                b, c, k = (arch.predict(x, t, arch.encode([text])) for text in (base, prompt, kept))
                same = [arch.predict(x, t, anchor) for anchor in anchors]
            erased = arch.predict(x, t, arch.encode([prompt])) - (b - 1.5 * (c - b))
            wanted["erase"] += erased.square().mean().item() / 2
            wanted["keep"] += (arch.predict(x, t, arch.encode([kept])) - k).square().mean().item() / 2
            for anchor, was in zip(anchors, same, strict=True):
                wanted["anchor"] += (arch.predict(x, t, anchor) - was).square().mean().item() / 6
    assert shown == pytest.approx(wanted, rel=1e-3) and min(wanted.values()) > 0
    assert value.item() == pytest.approx(wanted["erase"] + 20 * wanted["anchor"] + 3 * wanted["keep"], rel=1e-3)


def test_two_parts_are_one_batch(model: Model) -> None:
    whole, parts = (Adapter(model, SPM(**QUICK, train_batch_size=size), TASK) for size in (2, 1))
    values = []
    for objective, batches in ((whole, [Batch(4)]), (parts, [Batch(4, 0, 2), Batch(4, 1, 2)])):
        with objective.weights:
            moved(objective)
            values.append(sum(objective.loss(batch)[0].item() for batch in batches) / len(batches))
    assert values[0] == pytest.approx(values[1], rel=1e-3)


@pytest.mark.parametrize("gate", [True, False])
def test_the_attentions_projections_change_by_rank_one(model: Model, gate: bool) -> None:
    edit = SPM(**QUICK, gate=gate).fit(model, TASK)
    assert set(edit.sites()) == {f"{site}.weight" for site in model.arch.lora_targets()}
    assert isinstance(edit, Gated if gate else LowRank) and edit.mergeable != gate
    ranks = [int(torch.linalg.matrix_rank(edit.delta(site), rtol=1e-4)) for site in edit.sites()]
    assert set(ranks) == {1}
    assert {p.requires_grad for p in model.arch.components()["denoiser"].parameters()} == {False}
    twice = SPM(**QUICK, gate=False, rank=2).fit(model, TASK)
    assert max(int(torch.linalg.matrix_rank(twice.delta(site), rtol=1e-4)) for site in twice.sites()) == 2


def drift(model: Model, edit: Any, *prompts: str) -> float:
    """How far an edit moves predictions."""
    with torch.no_grad():
        x = torch.randn(len(prompts), *model.arch.latent_shape(16, 16), generator=seeded("drift"))
        given = x, torch.full((len(prompts),), 500), model.arch.encode(list(prompts))
        before: Tensor = model.arch.predict(*given)
        with model.attached(edit):
            return (model.arch.predict(*given) - before).norm().item()


def test_the_gate_keeps_what_is_not_the_concept(model: Model) -> None:
    """Names and synonyms, alone or in a sentence, are acted on as without a gate; other prompts and no prompt are not at all."""
    task = EraseTask((Concept("cat", ("kitty",)),), templates=("a {}",))
    with_gate, without = (SPM(**QUICK, learning_rate=1e-2, gate=gate).fit(model, task) for gate in (True, False))
    for prompt in ("cat", "a picture of a cat", "a kitty"):
        assert drift(model, with_gate, prompt) == pytest.approx(drift(model, without, prompt), rel=1e-3)
    other = ("dog", "", "horse")
    assert drift(model, with_gate, *other) < 1e-5 < 1e-2 < drift(model, without, *other)


def test_anchors_keep_what_is_not_the_concept_without_a_gate(model: Model) -> None:
    options: dict[str, Any] = {**QUICK, "anchors": 4, "max_train_steps": 12, "gate": False, "learning_rate": 1e-2, "eta": 3.0}
    with_anchors = SPM(**options).fit(model, TASK)
    without = SPM(**{**options, "anchor_weight": 0.0}).fit(model, TASK)
    assert drift(model, with_anchors, "", "dog", "horse") < 0.7 * drift(model, without, "", "dog", "horse")


def test_an_anchor_is_elsewhere_and_about_as_long() -> None:
    text = SDXL.tiny().encode(["a cat"])
    for seed in range(5):
        anchor = elsewhere(text, seeded("anchor", seed))
        for was, now in ((text.hidden, anchor.hidden), (text.pooled, anchor.pooled)):
            assert was is not None and now is not None and now.shape == was.shape
            assert 0.8 <= now.norm() / was.norm() <= 1.2 and not torch.equal(now, was)
    assert torch.cosine_similarity(anchor.hidden.flatten(), text.hidden.flatten(), dim=0).abs() < 0.2


def test_steps_share_a_drawing_also_after_an_interruption(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = SPM(**{**QUICK, "max_train_steps": 6}, steps_per_drawing=3, gradient_accumulation_steps=2, learning_rate=1e-2)
    made, draw, always = list[int](), Adapter._draw, Adapter.loss
    monkeypatch.setattr(Adapter, "_draw", lambda self, number, places: made.append(number) or draw(self, number, places))
    whole = method.fit(model, TASK)
    assert made == [0, 0, 1, 1]

    def failing(self: Adapter, batch: Batch):
        if batch.step == 5:
            raise KeyboardInterrupt
        return always(self, batch)

    run = TrainingRun(tmp_path, checkpointing_steps=5)
    monkeypatch.setattr(Adapter, "loss", failing)
    with pytest.raises(KeyboardInterrupt):
        method.fit(model, TASK, run=run)
    monkeypatch.setattr(Adapter, "loss", always)
    made.clear()
    resumed = method.fit(model, TASK, run=run)
    assert made == [] and all(torch.equal(resumed.delta(site), whole.delta(site)) for site in whole.sites())


def test_what_would_have_no_effect_is_said(model: Model) -> None:
    kept = EraseTask((Concept("cat"),), preserve=("dog",), templates=("a {}",))
    with pytest.warns(UserWarning, match="what the task preserves has no effect"):
        SPM(**QUICK).fit(model, kept)
    with pytest.raises(UserError, match="nothing is preserved"):
        SPM(**QUICK, preserve_weight=1.0).fit(model, TASK)
    for options, message in [
        ({"gate": False, "gate_floor": 0.5}, "gate_floor has no effect with gate=False"),
        ({"anchor_weight": 0.0, "anchors": 2}, "anchors has no effect with anchor_weight=0.0"),
        ({"gate_floor": 1.0}, "needs less than 1"),
        ({"rank": 0}, "rank is 0, needs at least 1"),
        ({"guidance": 0.5}, "guidance is 0.5"),
        ({"anchor_weight": -1.0}, "needs at least 0"),
    ]:
        with pytest.raises(UserError, match=message):
            SPM(**options)
