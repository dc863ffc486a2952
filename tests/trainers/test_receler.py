"""Receler against its equation, and what its attack and its masks do."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.arch.sd import SD
from toolkit.arch.text import Text
from toolkit.attention import attention_maps, token_mask
from toolkit.concepts import Concept, EraseTask
from toolkit.edits.module import ModuleEdit
from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.runs import TrainingRun, seeded
from toolkit.sample import partly_denoised
from trainers.erase.receler import Erasing, Receler, with_soft_tokens
from trainers.loop import Batch
from trainers.weights import ModuleWeights

QUICK: dict[str, Any] = {"trajectories": 2, "sampling_steps": 4, "max_train_steps": 2, "rank": 4, "attack_steps": 2, "attack_tokens": 3}
TASK = EraseTask((Concept("cat", anchor="dog"), Concept("bird")), templates=("a {}",))


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(SD.tiny(prediction_type="v_prediction"))


def moved(weights: ModuleWeights) -> None:
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=seeded("moved"))


def noting(place: dict[str, Tensor], site: str) -> Any:
    """A hook that keeps a module's output."""
    return lambda module, given, output: place.__setitem__(site, output)


def attacked(model: Model, x: Tensor, t: Tensor, prompt: str, shown: Tensor, place: int) -> Text:
    """The prompt's rows, with those of the attack written over the ones after its last token; one sample alone."""
    rows = model.arch.encode(["a cat", "a bird"]).hidden[:, 1:].flatten(0, 1)
    noise = torch.randn(3, rows.shape[1], generator=seeded("attack", 7, 5, place))
    soft = (rows.mean(0) + rows.std(0) * noise).requires_grad_()
    optimizer, text = torch.optim.Adam([soft], lr=0.2), model.arch.encode([prompt])
    last = int(text.length[0]) - 1

    def written() -> Text:
        hidden = torch.cat([text.hidden[0, :last], soft, text.hidden[0, last + 3 :]])[None]
        return Text(hidden, text.ids, text.length, text.pooled)

    for _ in range(2):
        optimizer.zero_grad()
        (model.arch.predict(x, t, written()) - shown).square().mean().backward(inputs=[soft])
        optimizer.step()
    with torch.no_grad():
        return written()


def test_the_loss_is_that_of_the_attacked_concept_and_of_what_is_added_elsewhere(model: Model) -> None:
    """Against the equations written out, one sample at a time."""
    options: dict[str, Any] = {"eta": 1.5, "locality_weight": 0.3, "mask_threshold": 0.4, "attack_learning_rate": 0.2}
    objective = Erasing(model, Receler(**QUICK, **options, seed=7, train_batch_size=3), TASK)
    arch, sites, wanted = model.arch, model.arch.cross_attention_sites(), 0.0
    with objective.weights:
        moved(objective.weights)
        value, parts = objective.loss(Batch(5, 1, 2))
        for place in (3, 4, 5):
            draw = seeded("erase", 7, 5, place)
            row, step = (int(torch.randint(size, (), generator=draw)) for size in (2, 4))
            prompt, base, word = [("a cat", "a dog", "cat"), ("a bird", "", "bird")][row]
            with objective.weights.off(), torch.no_grad():
                x, t = partly_denoised(model, [prompt], [7 + row], [step], steps=4, guidance=3.0)
                b, nothing = (arch.predict(x, t, arch.encode([text])) for text in (base, ""))
                with attention_maps(arch) as maps:
                    c = arch.predict(x, t, arch.encode([prompt]))
                seen = maps.of_tokens(token_mask(arch, [prompt], [word]), (x.shape[2], x.shape[3]))[0]
            mask = (seen - seen.min()) / (seen.max() - seen.min()) >= 0.4
            text = attacked(model, x, t, prompt, c, place)
            given: dict[str, Tensor] = {}  # what each attention gives, before anything is added
            handles = [module.register_forward_hook(noting(given, site), prepend=True) for site, module in sites.items()]
            changed = arch.predict(x, t, text)
            for handle in handles:
                handle.remove()
            erase, local = (changed - (b - 1.5 * (c - nothing))).square().mean(), torch.zeros(())
            for site, module in objective.weights.edit(model.info(Receler())).modules.items():
                down, down_bias, up, up_bias = (module.weights[name] for name in ("down.weight", "down.bias", "up.weight", "up.bias"))
                added = F.gelu(given[site][0] @ down.T + down_bias) @ up.T + up_bias
                every = int((mask.numel() / len(added)) ** 0.5)
                outside = ~mask[::every, ::every].flatten()
                local = local + added[outside].square().mean() / len(sites)
            wanted += (erase + 0.3 * local).item() / 3
    assert value.item() == pytest.approx(wanted, rel=1e-3)
    assert value.item() == pytest.approx(parts["erase"] + 0.3 * parts["local"], rel=1e-5) and parts["local"] > 1e-4


def test_the_attack_brings_the_prediction_back(model: Model) -> None:
    """The more steps it takes, the nearer the changed model comes to what the frozen one shows for the concept."""
    left = []
    for steps in (1, 8):
        objective = Erasing(model, Receler(**{**QUICK, "attack_steps": steps}, locality_weight=0.0), TASK)
        with objective.weights:
            moved(objective.weights)
            latents, t, text, _ = objective.samples.at([0, 1], [1, 2], model.arch.device)
            shown = objective.shown[[0, 1], [1, 2]]
            found = objective._attacked(latents, t, text, shown, [seeded("one"), seeded("two")])
            with torch.no_grad():
                left.append(F.mse_loss(model.arch.predict(latents, t, found), shown).item())
            assert {p.grad for p in objective.weights.parameters()} == {None}
    assert left[1] < left[0]


def test_soft_tokens_follow_the_last_one(model: Model) -> None:
    text = model.arch.encode(["a cat", "two red dogs"])
    soft = torch.randn(2, 3, text.hidden.shape[2], generator=seeded("soft"))
    found = with_soft_tokens(text, soft)
    for row in range(2):
        last = int(text.length[row]) - 1
        assert torch.equal(found.hidden[row, last : last + 3], soft[row])
        rest = [*range(last), *range(last + 3, text.hidden.shape[1])]
        assert torch.equal(found.hidden[row, rest], text.hidden[row, rest])


def test_locality_keeps_erasers_still_where_the_concept_is_not(model: Model) -> None:
    task = EraseTask((Concept("cat"),), templates=("a {}",))
    method: dict[str, Any] = {"trajectories": 2, "sampling_steps": 4, "rank": 4, "attack_steps": 0, "mask_threshold": 0.5}
    added = []
    for weight in (1e-6, 100.0):
        objective = Erasing(model, Receler(**method, locality_weight=weight), task)
        optimizer = torch.optim.Adam(objective.weights.parameters(), lr=0.02)
        with objective.weights:
            for step in range(12):
                optimizer.zero_grad()
                objective.loss(Batch(step))[0].backward()
                optimizer.step()
            added.append(objective.loss(Batch(0))[1]["local"])
    assert added[1] < 0.2 * added[0]


def test_only_erasers_behind_cross_attention_are_fitted(model: Model) -> None:
    edit = Receler(**QUICK).fit(model, TASK)
    assert isinstance(edit, ModuleEdit)
    assert edit.sites() == list(model.arch.cross_attention_sites())
    assert {module.sizes("")["r"] for module in edit.modules.values()} == {4}
    assert {p.requires_grad for p in model.arch.components()["denoiser"].parameters()} == {False}


def test_an_interrupted_fit_gives_the_same_edit(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = Receler(**{**QUICK, "max_train_steps": 4}, learning_rate=1e-2)
    whole = method.fit(model, TASK)
    run, always = TrainingRun(tmp_path, checkpointing_steps=2), Erasing.loss

    def failing(self: Erasing, batch: Batch):
        if batch.step == 3:
            raise KeyboardInterrupt
        return always(self, batch)

    monkeypatch.setattr(Erasing, "loss", failing)
    with pytest.raises(KeyboardInterrupt):
        method.fit(model, TASK, run=run)
    monkeypatch.setattr(Erasing, "loss", always)
    resumed = method.fit(model, TASK, run=run)
    assert all(torch.equal(resumed.delta(site), whole.delta(site)) for site in whole.sites())


def test_parts_are_one_batch_and_checkpointing_changes_nothing(model: Model) -> None:
    whole = Receler(**QUICK, train_batch_size=2, learning_rate=1e-2).fit(model, TASK)
    parts = Receler(**QUICK, gradient_accumulation_steps=2, learning_rate=1e-2).fit(model, TASK)
    again = Receler(**QUICK, train_batch_size=2, learning_rate=1e-2, gradient_checkpointing=True).fit(model, TASK)
    for site in whole.sites():
        assert torch.allclose(parts.delta(site), whole.delta(site), atol=2e-3)
        assert torch.allclose(again.delta(site), whole.delta(site), atol=2e-3)


def test_what_would_have_no_effect_is_said(model: Model) -> None:
    with pytest.warns(UserWarning, match="what the task preserves has no effect"):
        Receler(**QUICK).fit(model, EraseTask((Concept("cat"),), preserve=("dog",), templates=("a {}",)))
    with pytest.raises(UserError, match="attack_steps is 0, so attack_tokens has no effect"):
        Receler(attack_steps=0, attack_tokens=4)
    with pytest.raises(UserError, match="locality_weight is 0, so mask_threshold has no effect"):
        Receler(locality_weight=0.0, mask_threshold=0.5)
    wrongs: list[dict[str, Any]] = [{"mask_threshold": 0.0}, {"guidance": 1.0}, {"attack_steps": -1}, {"rank": 0}]
    for wrong in wrongs:
        with pytest.raises(UserError, match=next(iter(wrong))):
            Receler(**wrong)
    with pytest.raises(UserError, match="the longest prompt leaves room for"):
        Receler(**{**QUICK, "attack_tokens": 80}).fit(model, TASK)
    with pytest.raises(UserError, match="does not contain 'cat' as words of their own"):
        Receler(**QUICK).fit(model, EraseTask((Concept("cat"),), templates=("a {}s",)))
