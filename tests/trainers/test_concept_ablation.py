"""Concept ablation against its equation, and what it trains."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from toolkit.arch.sd import SD
from toolkit.concepts import Concept, EraseTask
from toolkit.edits.delta import Delta
from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.runs import seeded
from toolkit.sample import trajectory
from trainers.erase.concept_ablation import Ablation, ConceptAblation
from trainers.erase.prompts import concept_prompts
from trainers.loop import Batch

QUICK: dict[str, Any] = {"trajectories": 2, "sampling_steps": 3, "max_train_steps": 3, "gradient_accumulation_steps": 1}
TASK = EraseTask((Concept("cat", ("kitty",), "dog"), Concept("bird")), templates=("a {}",))
KEPT = EraseTask(TASK.concepts, preserve=("a cow", "a tree"), templates=TASK.templates)


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def model(request: pytest.FixtureRequest) -> Model:
    return Model(SD.tiny(prediction_type=request.param))


def moved(model: Model, method: ConceptAblation, task: EraseTask = TASK) -> Ablation:
    """An objective whose weights are no longer the model's."""
    objective = Ablation(model, method, task)
    with torch.no_grad():
        for parameter in objective.weights.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=seeded("moved"))
    return objective


@pytest.mark.parametrize("target", ["model", "frozen", "noise"])
def test_the_loss_is_the_distance_to_what_the_anchor_says(model: Model, target: Any) -> None:
    """Against the equation written out: drawings of the anchor with noise, and the model's answers to two prompts."""
    method = ConceptAblation(**QUICK, target=target, seed=7, train_batch_size=3, guidance=2.0)
    objective, arch = moved(model, method), model.arch
    wanted = 0.0
    for place in (3, 4, 5):
        draw = seeded("erase", 7, 5, place)
        row = int(torch.randint(2, (), generator=draw))
        base, prompts = [("a dog", ["a cat", "a kitty"]), ("a", ["a bird"])][row]
        prompt = prompts[int(torch.randint(len(prompts), (), generator=draw))]
        t = torch.randint(arch.train_timesteps, (1,), generator=draw)
        x0 = trajectory(model, [base], [7 + row], steps=3, guidance=2.0)
        noise = torch.randn(x0.shape, generator=draw)
        alpha, sigma = arch.signal_and_noise(t)
        x = alpha * x0 + sigma * noise
        with torch.no_grad():
            frozen = arch.predict(x, t, arch.encode([base]))
            with objective.weights:
                said, anchor = (arch.predict(x, t, arch.encode([text])) for text in (prompt, base))
        velocity = alpha * noise - sigma * x0
        noised = velocity if arch.pipe.scheduler.config.prediction_type == "v_prediction" else noise
        wanted += (said - {"model": anchor, "frozen": frozen, "noise": noised}[target]).square().mean().item() / 3
    with objective.weights:
        assert objective.loss(Batch(5, 1, 2))[0].item() == pytest.approx(wanted, rel=1e-4)


def test_two_parts_are_one_batch_of_twice_the_size(model: Model) -> None:
    method = ConceptAblation(**QUICK, train_batch_size=2, prior_weight=0.5, preserve_weight=2.0)
    parts, whole = moved(model, method, KEPT), moved(model, replace(method, train_batch_size=4), KEPT)
    with parts.weights, torch.no_grad():
        halves = [parts.loss(Batch(3, part, 2))[0].item() for part in (0, 1)]
    with whole.weights, torch.no_grad():
        assert whole.loss(Batch(3))[0].item() == pytest.approx(sum(halves) / 2, rel=1e-4)


def test_prior_and_preserved_prompts_are_added_with_their_weights(model: Model) -> None:
    objective = moved(model, ConceptAblation(**QUICK, prior_weight=0.5, preserve_weight=2.0), KEPT)
    with objective.weights, torch.no_grad():
        loss, values = objective.loss(Batch(0))
        assert set(values) == {"erase", "prior", "keep"} and min(values.values()) > 0
        assert loss.item() == pytest.approx(values["erase"] + 0.5 * values["prior"] + 2 * values["keep"], rel=1e-5)
        seen = objective.anchors.noised("prior", Batch(0))
        own = model.arch.predict(seen.latents, seen.t, seen.drawn)
    assert values["prior"] == pytest.approx((own - seen.target).square().mean().item(), rel=1e-4)
    fresh = Ablation(model, ConceptAblation(**QUICK, preserve_weight=2.0), KEPT)
    with fresh.weights:
        assert fresh.loss(Batch(0))[1]["keep"] == pytest.approx(0, abs=1e-9)  # nothing has moved yet


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_anchors_answer_gets_no_gradient_and_the_concepts_does(model: Model, precision: str) -> None:
    """A model that is asked twice in one step, once without gradient, learns from the other answer, also under autocast."""
    objective = moved(model, ConceptAblation(**QUICK, train_batch_size=1))
    with objective.weights:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            objective.loss(Batch(1))[0].backward()
        found = [parameter.grad.clone() for parameter in objective.weights.parameters() if parameter.grad is not None]
        assert len(found) == len(list(objective.weights.parameters())) and all(grad.any() for grad in found)
        objective.weights.zero_grad()
        seen = objective.anchors.noised("erase", Batch(1))
        with torch.no_grad():
            anchor = model.arch.predict(seen.latents, seen.t, seen.drawn)
        (model.arch.predict(seen.latents, seen.t, seen.asked) - anchor).square().mean().backward()
    for grad, parameter in zip(found, objective.weights.parameters(), strict=True):
        assert parameter.grad is not None and torch.allclose(grad, parameter.grad, rtol=1e-3, atol=1e-6 if precision == "no" else 1e-2)


def test_trained_the_concept_says_what_the_anchor_said(model: Model) -> None:
    method = ConceptAblation(**{**QUICK, "max_train_steps": 40}, target="frozen", learning_rate=3e-3, guidance=1.0)
    task = EraseTask((Concept("cat", anchor="dog"),), templates=("a {}",))
    edit = method.fit(model, task)
    t, x = (
        torch.tensor([300]),
        torch.randn(1, *model.arch.latent_shape(model.arch.image_size, model.arch.image_size), generator=seeded("x")),
    )
    cat, dog = (model.arch.encode([prompt]) for prompt in ("a cat", "a dog"))
    with torch.no_grad():
        anchor, before = model.arch.predict(x, t, dog), model.arch.predict(x, t, cat)
        with model.attached(edit):
            after = model.arch.predict(x, t, cat)
    assert (after - anchor).norm() < 0.5 * (before - anchor).norm()


@pytest.mark.parametrize("which", ["x_strict", "x", "all"])
def test_only_the_chosen_parameters_change(model: Model, which: str) -> None:
    edit = ConceptAblation.from_config({**QUICK, "parameters": which, "learning_rate": 1e-2}).fit(model, TASK)
    assert isinstance(edit, Delta)
    names = set(edit.sites())
    cross, strict = {name for name in names if ".attn2." in name}, {f"{site}.weight" for site in model.arch.text_linears()}
    assert {"x_strict": names == strict, "x": strict < names == cross, "all": strict < cross < names}[which]
    assert {p.requires_grad for p in model.arch.components()["denoiser"].parameters()} == {False}


def test_every_word_is_paired_with_the_drawings_of_its_anchor(model: Model) -> None:
    drawings = Ablation(model, ConceptAblation(**QUICK), TASK).anchors
    assert drawings.drawn == ["a dog", "a"] and set(drawings.place) == {"a dog", "a cat", "a kitty", "a", "a bird"}


def test_without_an_anchor_the_rest_of_the_template_stays() -> None:
    task = EraseTask((Concept("cat", anchor="dog"), Concept("bird")), templates=("a photo of a {}", "{}", "the {} here"))
    bases = dict(concept_prompts(task, without_anchor="template"))
    assert bases["a photo of a bird"] == "a photo of a" and bases["bird"] == "" and bases["the bird here"] == "the here"
    assert bases["a photo of a cat"] == "a photo of a dog" and dict(concept_prompts(task))["the bird here"] == ""


def test_what_would_have_no_effect_is_said(model: Model) -> None:
    with pytest.warns(UserWarning, match="what the task preserves has no effect"):
        ConceptAblation(**QUICK).fit(model, KEPT)
    with pytest.raises(UserError, match="nothing is preserved"):
        ConceptAblation(**QUICK, preserve_weight=1.0).fit(model, TASK)
    with pytest.raises(UserError, match="is to turn into itself"):
        ConceptAblation(**QUICK).fit(model, EraseTask((Concept("cat", ("dog",), "dog"),)))
    with pytest.raises(UserError, match="trajectories is 1, for 2 concepts"):
        ConceptAblation(**{**QUICK, "trajectories": 1}).fit(model, TASK)
    wrong: list[dict[str, Any]] = [{"trajectories": 0}, {"guidance": 0.5}, {"prior_weight": -1.0}]
    for options in wrong:
        with pytest.raises(UserError, match=" is ".join(map(str, next(iter(options.items()))))):
            ConceptAblation(**options)
