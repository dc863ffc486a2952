"""DoCo against its equations, what surgery does, and what is trained."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.arch.sd import SD
from toolkit.concepts import Concept, EraseTask
from toolkit.edits.delta import Delta
from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.runs import TrainingRun, seeded
from toolkit.sample import trajectory
from trainers.erase.doco import Correction, Discriminator, DoCo, without_conflict
from trainers.erase.drawings import Drawings, NoisedDrawings
from trainers.loop import Batch

QUICK: dict[str, Any] = {"trajectories": 2, "sampling_steps": 3, "max_train_steps": 4, "guidance": 2.0}
TASK = EraseTask((Concept("cat", ("kitty",), "dog"), Concept("bird")), templates=("a {}",))
KEPT = EraseTask(TASK.concepts, preserve=("a cow", "a tree"), templates=TASK.templates)


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def model(request: pytest.FixtureRequest) -> Model:
    return Model(SD.tiny(prediction_type=request.param))


def moved(model: Model, method: DoCo, task: EraseTask = TASK) -> Correction:
    """An objective whose weights are no longer the model's."""
    objective = Correction(model, method, task)
    with torch.no_grad():
        for parameter in objective.weights.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=seeded("moved"))
    return objective


def noised(model: Model, objective: Correction, what: str, place: int, asked: dict[str, list[str]]) -> tuple[Any, ...]:
    """A sample as the docstring draws it: x_t and t of a drawing, its noise and itself, its prompt and the one that it stands for."""
    draw = seeded(what, 7, 5, place)
    row = int(torch.randint(2, (), generator=draw))
    base, others = list(asked.items())[row]
    prompt = others[int(torch.randint(len(others), (), generator=draw))]
    t = torch.randint(model.arch.train_timesteps, (1,), generator=draw)
    with objective.weights.off():
        x0 = trajectory(model, [base], [7 + row], steps=3, guidance=2.0)
    noise = torch.randn(x0.shape, generator=draw)
    alpha, sigma = model.arch.signal_and_noise(t)
    return alpha * x0 + sigma * noise, t, noise, x0, base, prompt


def implied(model: Model, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Clean latents, written out."""
    alpha, sigma = model.arch.signal_and_noise(t)
    return alpha * x - sigma * output if velocity(model) else (x - sigma * output) / alpha


def velocity(model: Model) -> bool:
    return model.arch.pipe.scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize(("surgery", "prior_weight"), [(1.0, None), (0.5, 0.3), (0.0, None)])
def test_losses_and_gradients_are_those_of_the_equation(model: Model, surgery: float, prior_weight: float | None) -> None:
    """Both losses, and the gradient that the denoiser goes along, against the equations written out."""
    method = DoCo(**QUICK, seed=7, train_batch_size=3, surgery=surgery, prior_weight=prior_weight)
    objective, arch = moved(model, method, KEPT), model.arch
    weight = prior_weight if prior_weight is not None else 0.0 if surgery else 0.1
    parameters, judge = list(objective.weights.parameters()), objective.discriminator
    told, fooled, prior = [], [], []
    with objective.weights:
        for place in (3, 4, 5):
            asked = {"a dog": ["a cat", "a kitty"], "a": ["a bird"]}
            x, t, _, _, anchor, prompt = noised(model, objective, "erase", place, asked)
            concept = implied(model, arch.predict(x, t, arch.encode([prompt])), x, t)
            with objective.weights.off(), torch.no_grad():
                wanted = implied(model, arch.predict(x, t, arch.encode([anchor])), x, t)
            # cross-entropy of a logit with 0 is softplus of it, with 1 of its negative
            told.append(F.softplus(judge(wanted)).mean() + F.softplus(-judge(concept.detach())).mean())
            fooled.append(F.softplus(judge(concept)).mean())
            x, t, noise, x0, kept, _ = noised(model, objective, "prior", place, {"a cow": ["a cow"], "a tree": ["a tree"]})
            alpha, sigma = arch.signal_and_noise(t)
            target = alpha * noise - sigma * x0 if velocity(model) else noise
            prior.append((arch.predict(x, t, arch.encode([kept])) - target).square().mean())
        discriminator, adversarial, stays = (torch.stack(values).mean() for values in (told, fooled, prior))
        a = torch.autograd.grad(adversarial, parameters)
        b = torch.autograd.grad(stays, parameters)
        own = torch.autograd.grad(discriminator, list(judge.parameters()))
        value, values = objective.loss(Batch(5, 1, 2))
        value.backward()
    assert values["discriminator"] == pytest.approx(discriminator.item(), rel=1e-4)
    assert values["adversarial"] == pytest.approx(adversarial.item(), rel=1e-4)
    assert values["prior"] == pytest.approx(stays.item(), rel=1e-4)
    assert value.item() == pytest.approx((discriminator + adversarial + weight * stays).item(), rel=1e-4)
    disagree = 0
    for one, other, parameter in zip(a, b, parameters, strict=True):
        dot = (one * other).sum()
        disagree += bool(dot < 0)
        removed = surgery * dot / (other * other).sum() * other if dot < 0 else 0.0
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, one - removed + weight * other, rtol=1e-3, atol=1e-6)
    assert 0 < disagree < len(parameters)  # both cases are seen
    for gradient, parameter in zip(own, judge.parameters(), strict=True):
        assert parameter.grad is not None  # of its own loss alone: what fools it teaches the denoiser only
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


def test_surgery_takes_out_what_points_the_other_way() -> None:
    a, b = torch.tensor([[3.0, -4.0]]), torch.tensor([[0.0, 2.0]])
    assert torch.allclose(without_conflict(a, b), torch.tensor([[3.0, 0.0]]))
    assert torch.allclose(without_conflict(a, b, 0.5), torch.tensor([[3.0, -2.0]]))
    assert torch.equal(without_conflict(-a, b), -a) and torch.equal(without_conflict(a, 0 * b), a)
    assert torch.allclose(without_conflict(1e-3 * a, 1e-6 * b), torch.tensor([[3e-3, 0.0]]), atol=1e-9)  # lengths do not matter


def test_with_surgery_what_is_preserved_drifts_less(model: Model) -> None:
    """The same short steps along the gradient with surgery and without: how the preserved prompts' error has grown."""
    grown = []
    for surgery in (1.0, 0.0):
        method = DoCo(**QUICK, warmup=0.0, train_batch_size=4, surgery=surgery, prior_weight=0.0)
        objective = Correction(model, method, KEPT)
        kept = Drawings(model, method, {prompt: [prompt] for prompt in KEPT.preserve})
        samples = [kept.noised("prior", Batch(step)) for step in range(4)]
        with objective.weights:
            before = error(model, samples)
            for step in range(4):
                objective.loss(Batch(step))[0].backward()
                for parameter in objective.weights.parameters():
                    assert parameter.grad is not None
                    parameter.data -= 0.02 * F.normalize(parameter.grad.flatten(), dim=0).view_as(parameter)
                objective.weights.zero_grad()
            grown.append(error(model, samples) - before)
    assert grown[0] < grown[1] - 1e-4
    assert velocity(model) or grown[0] < 0.5 * grown[1]  # where it grows at all


@torch.no_grad()
def error(model: Model, samples: list[NoisedDrawings]) -> float:
    errors = [(model.arch.predict(one.latents, one.t, one.drawn) - one.target).square().mean() for one in samples]
    return torch.stack(errors).mean().item()


def test_two_parts_are_one_batch_of_twice_the_size(model: Model) -> None:
    """Surgery alone looks at a part on its own; what else there is, the discriminator too, does not."""
    method = DoCo(**QUICK, train_batch_size=2, surgery=0.0)
    parts, whole = moved(model, method, KEPT), moved(model, replace(method, train_batch_size=4), KEPT)
    with parts.weights:
        for part in (0, 1):
            (parts.loss(Batch(3, part, 2))[0] / 2).backward()
    with whole.weights:
        whole.loss(Batch(3))[0].backward()
    for half, full in zip(parts.module.parameters(), whole.module.parameters(), strict=True):
        assert half.grad is not None and full.grad is not None and full.grad.any()
        torch.testing.assert_close(half.grad, full.grad, rtol=1e-3, atol=1e-6)


def test_the_discriminator_learns_first_and_is_not_in_the_edit(model: Model) -> None:
    objective = moved(model, DoCo(**QUICK, warmup=0.5))
    with objective.weights:
        objective.loss(Batch(1))[0].backward()
        assert all(parameter.grad is None for parameter in objective.weights.parameters())
        assert all(parameter.grad is not None for parameter in objective.discriminator.parameters())
        assert set(objective.loss(Batch(2))[1]) == {"discriminator", "adversarial", "prior"}
    first, second = objective.optimizer([], objective.method.loop()).param_groups
    assert (first["lr"], second["lr"], second["betas"]) == (4.8e-5, 1e-4, (0.5, 0.999))
    assert {len(first["params"]), len(second["params"])} == {len(list(part.parameters())) for part in objective.module.children()}


@pytest.mark.parametrize("which", ["x_strict", "x", "all"])
def test_only_the_chosen_parameters_change(model: Model, which: str) -> None:
    options = {**QUICK, "max_train_steps": 2, "train_batch_size": 1, "parameters": which, "learning_rate": 1e-2}
    edit = DoCo.from_config(options).fit(model, TASK)
    assert isinstance(edit, Delta)
    names = set(edit.sites())
    cross, strict = {name for name in names if ".attn2." in name}, {f"{site}.weight" for site in model.arch.text_linears()}
    assert {"x_strict": names == strict, "x": strict < names == cross, "all": strict < cross < names}[which]
    assert {p.requires_grad for p in model.arch.components()["denoiser"].parameters()} == {False}


def test_an_interrupted_fit_gives_the_same_edit(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = DoCo(**QUICK, train_batch_size=1, mixed_precision="bf16", gradient_checkpointing=True)
    whole, always = method.fit(model, TASK), Correction.loss

    def failing(self: Correction, batch: Batch):
        if batch.step == 3:
            raise KeyboardInterrupt
        return always(self, batch)

    monkeypatch.setattr(Correction, "loss", failing)
    with pytest.raises(KeyboardInterrupt):
        method.fit(model, TASK, run=TrainingRun(tmp_path, checkpointing_steps=1))
    monkeypatch.setattr(Correction, "loss", always)
    resumed = method.fit(model, TASK, run=TrainingRun(tmp_path, checkpointing_steps=1))
    assert all(torch.equal(resumed.delta(site), whole.delta(site)) and whole.delta(site).any() for site in whole.sites())


@pytest.mark.parametrize(("side", "strided", "patches"), [(4, 1, 1), (8, 1, 3), (16, 2, 3), (64, 4, 3), (96, 4, 5)])
def test_the_discriminator_is_as_deep_as_latents_allow(side: int, strided: int, patches: int) -> None:
    made, again = Discriminator((4, side, side), 3), Discriminator((4, side, side), 3)
    assert sum(isinstance(layer, nn.Conv2d) for layer in made) == strided + 1
    latents = torch.randn(2, 4, side, side, generator=seeded("latents"))
    assert made(latents).shape == (2, 1, patches, patches) and torch.equal(made(latents), again(latents))
    assert torch.allclose(made(latents)[:1], made(latents[:1]), atol=1e-5)  # a sample's answer is its own
    with pytest.raises(UserError, match="sides of at least 4"):
        Discriminator((4, 2, 2), 0)


def test_what_would_have_no_effect_is_said(model: Model) -> None:
    with (
        pytest.warns(UserWarning, match="what the task preserves has no effect"),
        DoCo(**QUICK, surgery=0, prior_weight=0).objective(model, KEPT),
    ):
        pass
    with pytest.raises(UserError, match="is to turn into itself"):
        Correction(model, DoCo(**QUICK), EraseTask((Concept("cat", ("dog",), "dog"),)))
    with pytest.raises(UserError, match="for 3 preserved prompts"):
        Correction(model, DoCo(**QUICK), replace(KEPT, preserve=("a cow", "a tree", "a house")))
    wrong: list[dict[str, Any]] = [{"trajectories": 0}, {"surgery": 1.5}, {"prior_weight": -1.0}, {"warmup": 1.0}]
    wrong += [{"optimizer": "prodigy"}, {"mixed_precision": "fp16"}, {"discriminator_learning_rate": 0.0}]
    for options in wrong:
        (name, value), *_ = options.items()
        with pytest.raises(UserError, match=f"{name} (is )?{value}"):
            DoCo(**options)
