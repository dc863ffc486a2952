"""RealEra against its equation, and what its two stages and its random embeddings do."""

import json
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.closed_form.realera_embedding import RealEraEmbedding, around
from pipelines.closed_form.rows import encode_prompts
from toolkit.arch.sd import SD
from toolkit.arch.sdxl import SDXL
from toolkit.concepts import Concept, EraseTask
from toolkit.edits.low_rank import LowRank
from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.runs import seeded
from toolkit.sample import partly_denoised
from trainers.erase.realera import Alignment, RealEra, moved_together
from trainers.loop import Batch, train

QUICK: dict[str, Any] = {"trajectories": 2, "sampling_steps": 4, "max_train_steps": 2}
TASK = EraseTask((Concept("cat", anchor="dog"), Concept("bird")), preserve=("cow",), templates=("a {} here",))
ALONE = replace(TASK, preserve=())
NEAR, FURTHER = ((0.0, 1.0), (0.5, 0.9)), ((1.0, 1.6), (-1.0, 0.5))


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(SD.tiny(prediction_type="v_prediction"))


def shaken(objective: Alignment) -> None:
    with torch.no_grad():
        for parameter in objective.weights.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=seeded("moved"))


def perturbed(rows: Tensor, first: int, last: int, embedding: Tensor) -> Tensor:
    """A prompt's rows [L, d] as the docstring says it: e + x = a e + |e| w, and a r + |r| w for the rows that know of e."""
    e = rows[last].double()
    a = float(embedding @ e / (e @ e))
    w = (embedding - a * e) / e.norm()
    return torch.stack([row if i < first else (a * row.double() + row.double().norm() * w).float() for i, row in enumerate(rows)])


@pytest.mark.parametrize("closed_form", [True, False])
def test_the_loss_is_that_of_the_concept_its_neighbours_and_what_is_beyond(model: Model, closed_form: bool) -> None:
    """Against the equation written out, one prediction at a time, the trained model's with the edit attached as a user has it."""
    options: dict[str, Any] = {**QUICK, "neighbours": 2, "beyond": 1, "neighbour_weight": 0.7, "beyond_weight": 1.3, "eta": 1.5}
    method = RealEra(**options, closed_form=closed_form, seed=7, train_batch_size=4)
    objective = Alignment(model, method, TASK)
    with objective.weights:
        shaken(objective)
        value, shown = objective.loss(Batch(5, 1, 2))
    edit, seen, wanted = objective.weights.edit(model.info(method)), set[int](), {"erase": 0.0, "neighbours": 0.0, "beyond": 0.0}
    for place in (4, 5, 6, 7):
        draw = seeded("erase", 7, 5, place)
        row, step = (int(torch.randint(size, (), generator=draw)) for size in (2, 4))
        seen.add(row)
        prompt, base = [("a cat here", "a dog here"), ("a bird here", "")][row]
        x, t = partly_denoised(model, [prompt], [7 + row], [step], steps=4, guidance=3.0)
        text, end = model.arch.encode([prompt]), int(model.arch.encode([prompt.removesuffix(" here")]).length) - 1
        first = int(model.arch.encode(["a"]).length) - 1
        e = text.hidden[0, end - 1]
        near = around(e[None], 2, *NEAR, seeded("neighbours", 7, 5, place))
        further = around(e[None], 1, *FURTHER, seeded("beyond", 7, 5, place))
        mined = [replace(text, hidden=perturbed(text.hidden[0], first, end - 1, each)[None]) for each in (*near, *further)]
        with torch.no_grad():
            b, c, nothing = (model.arch.predict(x, t, model.arch.encode([words])) for words in (base, prompt, ""))
            stay = model.arch.predict(x, t, mined[2])
            with model.attached(edit):
                concept, one, two, beyond = (model.arch.predict(x, t, each) for each in (text, *mined))
        target = b - 1.5 * (c - nothing)
        wanted["erase"] += (concept - target).square().mean().item() / 4
        wanted["neighbours"] += sum((each - target).square().mean().item() for each in (one, two)) / 8
        wanted["beyond"] += (beyond - stay).square().mean().item() / 4
    assert seen == {0, 1}
    assert shown == pytest.approx(wanted, rel=1e-3)
    assert value.item() == pytest.approx(wanted["erase"] + 0.7 * wanted["neighbours"] + 1.3 * wanted["beyond"], rel=1e-3)


def test_two_parts_of_a_step_are_one_of_twice_the_size(model: Model) -> None:
    def mean(size: int, parts: int) -> float:
        objective = Alignment(model, RealEra(**QUICK, train_batch_size=size), TASK)
        with objective.weights:
            shaken(objective)
            return sum(objective.loss(Batch(3, part, parts))[0].item() for part in range(parts)) / parts

    assert mean(2, 2) == pytest.approx(mean(4, 1), rel=1e-5)


@pytest.mark.parametrize("family", [SD, SDXL])
def test_what_knows_of_the_concept_moves_together(family: Any) -> None:
    """BOS and what stands before the concept stay, and every other row, and what is pooled, keeps the share that the concept keeps."""
    arch = family.tiny()
    encoded = encode_prompts(arch, replace(ALONE, concepts=ALONE.concepts[:1]), "empty_prompt")
    place = encoded.rows(arch.text_streams()["hidden"].segments(encoded.text)).pairs[0][0]
    text = arch.encode(["a cat here"])
    mined = moved_together(text[[0] * 5], place, partial(RealEraEmbedding().near, make=seeded("draw")))
    before, after = text.hidden.double(), mined.hidden.double()
    assert torch.equal(after[:, : place.start], before[:, : place.start].expand(5, -1, -1)) and place.start == 2
    own, concept = before[:, place.start :], place.end - 1 - place.start
    distance = (after[:, place.start :] - own).norm(dim=-1) / own.norm(dim=-1)
    cosine = torch.cosine_similarity(after[:, place.start :], own.expand(5, -1, -1), dim=-1)
    assert (cosine[:, concept] > 0.499).all() and (cosine[:, concept] < 0.901).all() and (distance[:, concept] < 1.001).all()
    e, moved = own[:, concept], after[:, place.end - 1]
    share = (moved * e).sum(-1) / e.square().sum(-1)
    new = after[:, place.start :] - share[:, None, None] * own
    assert torch.allclose(new / own.norm(dim=-1, keepdim=True), (new[:, [concept]] / e.norm()).expand_as(new), atol=1e-5)
    if text.pooled is not None and mined.pooled is not None:
        similar = torch.cosine_similarity(mined.pooled, text.pooled, dim=-1)
        assert (similar > 0.499).all() and (similar < 0.901).all() and mined.pooled.unique(dim=0).shape == mined.pooled.shape


def errors(model: Model, **options: Any) -> dict[str, float]:
    """How far embeddings that were not trained on are from the loss's goals, after training with these options."""
    few: dict[str, Any] = {**QUICK, "closed_form": False, "max_train_steps": 20, "learning_rate": 1e-2}
    method = RealEra(**few, **options)
    objective = Alignment(model, method, ALONE)
    with objective.weights:
        train(objective, method.loop(), in_place=True, quiet=True)
        objective.method, objective.embedding = RealEra(train_batch_size=8), RealEraEmbedding()
        return objective.loss(Batch(99))[1]


def test_neighbours_go_and_what_is_beyond_stays_when_they_are_trained_on(model: Model) -> None:
    neither, near, beyond = errors(model, neighbours=0, beyond=0), errors(model, beyond=0), errors(model, neighbours=0)
    assert near["neighbours"] < 0.95 * neither["neighbours"]
    assert beyond["beyond"] < 0.8 * neither["beyond"]


def test_the_edit_is_the_closed_form_and_what_is_trained_on_it(model: Model) -> None:
    both, alone = RealEra(**QUICK).fit(model, TASK), RealEra(**QUICK, closed_form=False, rank=2).fit(model, ALONE)
    closed = RealEraEmbedding().fit(model, TASK)
    assert isinstance(both, LowRank) and set(both.sites()) == {f"{site}.weight" for site in model.arch.text_linears()}
    assert both.info.on == () and both.info.method == "realera" and both.info.config["closed_form"] is True
    assert isinstance(alone, LowRank) and alone.sites() == both.sites()
    for site in both.sites():
        trained = both.delta(site) - closed.delta(site)
        kept = torch.linalg.svdvals(trained.double())
        assert kept[3] > 0 and kept[4] < 1e-2 * kept[0] and kept[0] < closed.delta(site).norm()
        assert torch.linalg.matrix_rank(alone.delta(site)) == 2
    assert model.edits == () and json.dumps(both.info.notes)


def test_off_the_model_is_the_original(model: Model) -> None:
    objective = Alignment(model, RealEra(**QUICK), TASK)
    text, x = model.arch.encode(["a cat here"]), torch.randn(1, *model.arch.latent_shape(16, 16), generator=seeded("x"))

    def predict() -> Tensor:
        return model.arch.predict(x, torch.tensor([5]), text).detach()

    plain = predict()
    with objective.weights:
        assert not torch.allclose(predict(), plain, atol=1e-4)  # the closed form, as up is zero
        with objective.weights.off():
            assert torch.equal(predict(), plain)
    assert torch.equal(predict(), plain)


def test_without_an_anchor_the_base_is_nothing_or_the_rest_of_the_template(model: Model) -> None:
    task = EraseTask((Concept("bird"),), templates=("a {} here",))
    nothing, rest = (Alignment(model, RealEra(**QUICK, nothing=nothing), task) for nothing in ("empty_prompt", "template"))  # type: ignore[arg-type]
    named = Alignment(model, RealEra(**QUICK), EraseTask((Concept("bird", anchor=""),), templates=("a {} here",)))
    assert torch.equal(nothing.drawn.target, named.drawn.target) and not torch.equal(nothing.drawn.target, rest.drawn.target)


def test_what_would_have_no_effect_is_said(model: Model) -> None:
    with pytest.warns(UserWarning, match="closed_form is false, and training keeps none"):
        RealEra(**QUICK, closed_form=False).fit(model, TASK)
    for wrong, told in (
        ({"closed_form": False, "lamb": 1.0}, "lamb given beside closed_form false"),
        ({"neighbours": 0, "neighbour_weight": 2.0}, "neighbour_weight given beside neighbours 0"),
        ({"beyond": 0, "beyond_radius": 2.0}, "beyond_radius given beside beyond 0"),
        ({"neighbours": 0, "beyond": 0, "radius": 0.5}, "radius given beside neighbours 0 and beyond 0"),
        ({"neighbour_weight": 0.0}, "neighbour_weight 0.0.*give neighbours or beyond 0"),
        ({"guidance": 1.0}, "guidance is 1.0"),
        ({"rank": 0}, "rank is 0"),
        ({"radius": 2.0}, "radius is 2 and beyond_radius 1.6"),
    ):
        with pytest.raises(UserError, match=told):
            RealEra.from_config(wrong)
    with pytest.raises(UserError, match="trajectories is 2, for 3 concepts"):
        RealEra(**QUICK).fit(model, EraseTask((Concept("cat"), Concept("bird"), Concept("boat"))))
