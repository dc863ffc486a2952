"""AdvUnlearn against its equation: what it trains, what it attacks with, and what that is good for."""

from pathlib import Path
from typing import Any

import pytest
import torch

from toolkit.arch.sd import SD
from toolkit.arch.sdxl import SDXL
from toolkit.concepts import Concept, EraseTask
from toolkit.edits.delta import Delta
from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.prompt_search import TokenRows
from toolkit.runs import TrainingRun, seeded
from toolkit.sample import partly_denoised
from trainers.erase.advunlearn import AdvUnlearn, Attack, Robust
from trainers.loop import Batch

QUICK: dict[str, Any] = {"trajectories": 4, "sampling_steps": 4, "max_train_steps": 3, "attack_steps": 2}
TASK = EraseTask((Concept("cat", anchor="dog"), Concept("bird")), preserve=("cow", "horse"), templates=("a {}",))
ASKED = [("a cat", "a dog"), ("a bird", "")]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(SD.tiny(prediction_type="v_prediction"))


def moved(objective: Robust) -> None:
    """Move the text encoder, always in the same way."""
    with torch.no_grad():
        draw = seeded("moved")
        for parameter in objective.weights.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)


def attack_of(objective: Robust) -> Attack:
    assert objective.attack is not None
    return objective.attack


def test_the_loss_is_that_of_the_attacked_prompt_and_of_what_is_kept(model: Model) -> None:
    """Against the equation written out, with the prefixes that the attack has found."""
    method = AdvUnlearn(**QUICK, eta=1.5, seed=7, train_batch_size=2, preserve_weight=0.5, preserve_per_sample=2)
    objective = Robust(model, method, TASK)

    def read(kind: str, place: int, prompts: list[str]) -> tuple[str, torch.Tensor, torch.Tensor, int]:
        draw = seeded(kind, 7, 5, place)
        row, step = (int(torch.randint(4, (), generator=draw)) for _ in range(2))
        x, t = partly_denoised(model, [prompts[row % 2]], [7 + row], [step], steps=4, guidance=3.0)
        return prompts[row % 2], x, t, row

    with objective.weights, attack_of(objective).rows.unlisted():
        moved(objective)
        value, shown = objective.loss(Batch(5, 1, 2))
        erase = keep = 0.0
        for i, place in enumerate((2, 3)):
            with objective.weights.off():
                prompt, x, t, row = read("erase", place, [asked for asked, _ in ASKED])
                c, b, nothing = (model.arch.predict(x, t, model.arch.encode([text])) for text in (prompt, ASKED[row % 2][1], ""))
            answer = model.arch.predict(x, t, model.arch.encode([f"<attack-{i}> {prompt}"]))
            erase += (answer - (b - 1.5 * (c - nothing))).square().mean().item() / 2
        for place in (4, 5, 6, 7):
            with objective.weights.off():
                prompt, x, t, _ = read("keep", place, ["cow", "horse"])
                before = model.arch.predict(x, t, model.arch.encode([prompt]))
            keep += (model.arch.predict(x, t, model.arch.encode([prompt])) - before).square().mean().item() / 4
    assert shown["erase"] == pytest.approx(erase, rel=1e-4) and shown["keep"] == pytest.approx(keep, rel=1e-4)
    assert value.item() == pytest.approx(erase + 0.5 * keep, rel=1e-4) and keep > 0


def test_a_step_of_the_attack_goes_towards_what_the_frozen_model_said(model: Model) -> None:
    """Its first step is one of the sign of the error's gradient, from the embedding of a random word; "fast" makes a longer one."""
    table = model.arch.token_embeddings()["text_encoder"].weight
    given: list[tuple[dict[str, Any], float]] = [({"attack_steps": 1}, 0.01), ({"attack_steps": 5, "attack": "fast"}, 0.05)]
    for options, far in given:
        method = AdvUnlearn(**{**QUICK, **options, "attack_learning_rate": 0.01, "seed": 3})
        objective = Robust(model, method, TASK)
        attack = attack_of(objective)
        with objective.weights, attack.rows.unlisted():
            moved(objective)
            attack._start(4, [0])
            (row,) = attack.rows.parameters()
            word = table[torch.randint(len(table), (1,), generator=seeded("prefix", 3, 4, 0, "text_encoder"))]
            assert torch.equal(row, word)
            draw = seeded("attack", 3, 4, 0, 0)
            place, step = ([0, 2][int(torch.randint(2, (), generator=draw))], int(torch.randint(4, (), generator=draw)))
            with objective.weights.off():
                x, t = partly_denoised(model, ["a cat"], [3 + place], [step], steps=4, guidance=3.0)
                frozen = model.arch.predict(x, t, model.arch.encode(["a cat"]))
            error = (model.arch.predict(x, t, attack.rows(["<attack-0> a cat"])) - frozen).square().mean()
            (gradient,) = torch.autograd.grad(error, row)
            assert attack.find(Batch(4), [0]) == pytest.approx(error.item(), rel=1e-4)
            assert torch.allclose(row, word - far * gradient.sign(), atol=1e-4)
            assert all(parameter.grad is None for parameter in objective.weights.parameters())


def test_the_attack_brings_back_what_the_frozen_model_said(model: Model) -> None:
    method = AdvUnlearn(**{**QUICK, "attack_steps": 60, "attack_learning_rate": 0.05, "trajectories": 2, "sampling_steps": 1})
    objective = Robust(model, method, TASK)
    attack = attack_of(objective)
    with objective.weights, attack.rows.unlisted():
        moved(objective)
        after = attack.find(Batch(2), [0])
        attack._start(2, [0])
        latents, t, _, target = attack.frozen.at([0], [0], model.arch.device)
        before = (model.arch.predict(latents, t, model.arch.encode(["<attack-0> a cat"])) - target).square().mean().item()
    assert after < 0.8 * before


def test_two_halves_of_a_batch_are_the_whole(model: Model) -> None:
    def gradient(size: int, batches: list[Batch]) -> list[torch.Tensor]:
        objective = Robust(model, AdvUnlearn(**QUICK, train_batch_size=size), TASK)
        with objective.weights, attack_of(objective).rows.unlisted():
            moved(objective)
            for batch in batches:
                (objective.loss(batch)[0] / len(batches)).backward()
        return [parameter.grad for parameter in objective.weights.parameters() if parameter.grad is not None]

    whole, halves = gradient(2, [Batch(3)]), gradient(1, [Batch(3, 0, 2), Batch(3, 1, 2)])
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(whole, halves, strict=True))


@pytest.mark.parametrize("layers", [None, 1])
@pytest.mark.parametrize("family", [SD, SDXL])
def test_what_is_trained_is_read(family: type[SD], layers: int | None) -> None:
    model = Model(family.tiny())
    objective = Robust(model, AdvUnlearn(**QUICK, layers=layers, warmup_steps=0), TASK)
    with objective.weights, attack_of(objective).rows.unlisted():
        moved(objective)
        objective.loss(Batch(0))[0].backward()
    names = model.arch.encoder_parameters(layers)
    for name, parameter in zip(names, objective.weights.copies, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.any() or name.endswith("k_proj.bias")  # one number added to all scores changes no attention
    every = {f"{part}.{name}" for part in model.arch.tokenizers() for name, _ in model.arch.components()[part].named_parameters()}
    left = every - set(names)
    if layers:
        assert all(".layers.0." in name for name in names) and not any(".layers.0." in name for name in left)
    else:
        unread = ("embeddings.", *(("text_encoder.encoder.layers.1.", "text_encoder.final_") if family is SDXL else ()))
        assert all(any(part in name.replace("text_model.", "") for part in unread) for name in left)
        assert any("final_layer_norm" in name for name in names)
    with pytest.raises(UserError, match="layers is 9, and 2 layers of the text encoder are read"):
        model.arch.encoder_parameters(9)


def test_before_the_first_attack_it_is_esd_of_the_text_encoder(model: Model) -> None:
    """And an attack makes another edit of it."""
    options: dict[str, Any] = {**QUICK, "attack_steps": AdvUnlearn.attack_steps, "learning_rate": 1e-3}
    plain = AdvUnlearn(**options, adversarial=False).fit(model, TASK)
    edit = AdvUnlearn(**options, warmup_steps=2).fit(model, TASK)
    assert isinstance(plain, Delta) and all(name.startswith("text_encoder.") for name in plain.sites())
    assert any(not torch.equal(edit.delta(name), plain.delta(name)) for name in plain.sites())
    assert edit.info.on == () and model.arch.token_embeddings()["text_encoder"].weight.shape[0] == len(
        model.arch.tokenizers()["text_encoder"]
    )
    assert AdvUnlearn(max_train_steps=50).first_attack() == 10 and AdvUnlearn(warmup_steps=3).first_attack() == 3
    both = [Robust(model, method, TASK) for method in (AdvUnlearn(**options, warmup_steps=2), AdvUnlearn(**options, adversarial=False))]
    for step, same in ((1, True), (2, False)):
        values = []
        for objective in both:
            rows = objective.attack.rows if objective.attack else TokenRows(model, {"<unused>": None})
            with objective.weights, rows.unlisted():
                values.append(objective.loss(Batch(step))[0].item())
        assert (values[0] == values[1]) == same


def test_an_interrupted_fit_gives_the_same_edit(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = AdvUnlearn(**{**QUICK, "max_train_steps": 4}, learning_rate=1e-3, warmup_steps=1)
    whole = method.fit(model, TASK)
    run = TrainingRun(tmp_path, checkpointing_steps=2, sample_steps=2, sample_prompts=("a cat",))
    always = Robust.loss

    def failing(self: Robust, batch: Batch):
        if batch.step == 3:
            raise KeyboardInterrupt
        return always(self, batch)

    monkeypatch.setattr(Robust, "loss", failing)
    with pytest.raises(KeyboardInterrupt):
        method.fit(model, TASK, run=run)
    assert "<attack-0>" not in model.arch.tokenizers()["text_encoder"].get_vocab()
    monkeypatch.setattr(Robust, "loss", always)
    resumed = method.fit(model, TASK, run=run)
    assert all(torch.equal(resumed.delta(site), whole.delta(site)) for site in whole.sites())


def test_an_encoder_trained_against_attacks_withstands_one_better(model: Model) -> None:
    """What a prefix brings back, found with the same budget after training with the attack and without."""
    options: dict[str, Any] = {**QUICK, "max_train_steps": 25, "learning_rate": 3e-3, "preserve_weight": 0.0}
    del options["attack_steps"]
    found = {"attack_steps": 6, "attack_learning_rate": 0.1}
    task = EraseTask((Concept("cat"),), templates=("a {}",))
    errors = []
    for trained in ({**found, "warmup_steps": 5}, {"adversarial": False}):
        edit = AdvUnlearn(**{**options, **trained}).fit(model, task)
        objective = Robust(model, AdvUnlearn(**{**options, **found}, seed=1), task)
        with model.attached(edit), attack_of(objective).rows.unlisted():
            errors.append(sum(attack_of(objective).find(Batch(step), [0]) for step in range(8)))
    assert errors[0] > 1.1 * errors[1]


def test_what_would_have_no_effect_is_said(model: Model) -> None:
    with pytest.raises(UserError, match="attack, attack_steps given, and adversarial is false"):
        AdvUnlearn(adversarial=False, attack="fast", attack_steps=3)
    with pytest.raises(UserError, match="preserve_per_sample is 2, and preserve_weight 0"):
        AdvUnlearn(preserve_weight=0.0, preserve_per_sample=2)
    with pytest.raises(UserError, match="warmup_steps is 10 of 10 steps"):
        AdvUnlearn(max_train_steps=10, warmup_steps=10)
    for options in ({"layers": 0}, {"attack_tokens": 0}, {"guidance": 1.0}, {"attack_learning_rate": 0.0}):
        with pytest.raises(UserError, match=next(iter(options))):
            AdvUnlearn(**options)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="nothing is preserved"):
        AdvUnlearn(**QUICK).fit(model, EraseTask((Concept("cat"),)))
    with pytest.warns(UserWarning, match="what the task preserves has no effect"):
        AdvUnlearn(**QUICK, preserve_weight=0.0).fit(model, TASK)
    with pytest.raises(UserError, match="trajectories is 1, for 2 concepts"):
        AdvUnlearn(trajectories=1).fit(model, TASK)
