"""MACE against its equation, what it trains, where it looks, and its fusion."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pipelines.closed_form.mace_fuse import MACEFuse
from pipelines.closed_form.mace_refine import MACERefine
from toolkit.arch.sd import SD
from toolkit.concepts import Concept, EraseTask
from toolkit.edits.base import EditInfo
from toolkit.edits.low_rank import LowRank
from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.runs import seeded
from trainers.erase.mace import MACE, Shown, TurningAway, likelihoods, region_of
from trainers.loop import Batch, train

QUICK: dict[str, Any] = {"n_images": 2, "sampling_steps": 2, "max_train_steps": 3}
TASK = EraseTask((Concept("cat", ("kitty",), anchor="dog"), Concept("bird")), preserve=("cow",), templates=("a {}",))
CAT = EraseTask((Concept("cat"),), preserve=("cow",), templates=("a {}",))


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(SD.tiny(prediction_type="v_prediction"))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    """Two pictures of one colour, and masks that are white on the left half."""
    for name in ("red", "green"):
        for part, picture in (("images", Image.new("RGB", (16, 16), name)), ("masks", Image.new("L", (16, 16)))):
            (tmp_path / part).mkdir(exist_ok=True)
            if part == "masks":
                picture.paste(255, (0, 0, 8, 16))
            picture.save(tmp_path / part / f"{name}.png")
    return str(tmp_path / "images"), str(tmp_path / "masks")


def objective_of(model: Model, method: MACE, task: EraseTask = TASK) -> TurningAway:
    return TurningAway(model, method, [Shown(model, method, task, number) for number in range(len(task.concepts))])


def test_the_loss_is_the_attention_inside_the_region(model: Model) -> None:
    """Against the equation written out for the concept whose turn it is, with scores computed from what each layer is given."""
    arch = model.arch
    objective = objective_of(model, MACE(**QUICK, seed=7, train_batch_size=3))
    shown = objective.shown[1]
    inputs: dict[str, Any] = {}
    with objective.weights:
        with torch.no_grad():
            for parameter in objective.weights.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=seeded("moved", *parameter.shape))
        value = objective.loss(Batch(5, 1, 2))[0].item()
        lora = objective.weights.each[1].edit(EditInfo())
    handles = [
        attention.register_forward_pre_hook(lambda m, given, kwargs, site=site: inputs.update({site: (given, kwargs)}), with_kwargs=True)
        for site, attention in arch.cross_attention_sites().items()
    ]
    wanted, weights = 0.0, objective.likely
    with model.attached(lora), torch.no_grad():
        for place in (3, 4, 5):
            draw = seeded("mace", 7, 5, place)
            row, _ = (int(torch.randint(size, (), generator=draw)) for size in (2, 1))
            t = torch.multinomial(weights, 1, generator=draw)
            eps = torch.randn(shown.latents.shape[1:], generator=draw)
            text = arch.encode(["a bird"])
            arch.predict(arch.add_noise(shown.latents[row][None], eps[None], t), t, text)
            tokens = range(2, int(text.length[0]) - 1)  # after BOS and "a", before EOT
            for site, attention in arch.cross_attention_sites().items():
                layer: Any = attention
                given, kwargs = inputs[site]
                x = given[0]
                q, k = layer.to_q(x)[0], layer.to_k(kwargs["encoder_hidden_states"])[0]
                width = q.shape[1] // layer.heads
                side = int(len(q) ** 0.5)
                region = F.avg_pool2d(shown.regions[row][None, None], shown.regions.shape[1] // side).flatten()
                for head in range(layer.heads):
                    own = slice(head * width, (head + 1) * width)
                    attended = (q[:, own] @ k[:, own].T / width**0.5).softmax(-1)[:, tokens]
                    wanted += (attended * region[:, None]).square().sum().item() / layer.heads / 3
    for handle in handles:
        handle.remove()
    assert value == pytest.approx(wanted, rel=1e-4)


def test_a_step_trains_one_concept_and_each_has_all_the_steps(model: Model) -> None:
    method = MACE(**QUICK, learning_rate=1e-2)
    objective = objective_of(model, method)
    with objective.weights:
        objective.loss(Batch(1))[0].backward()
        first, second = ([p.grad is not None for p in lora.parameters()] for lora in objective.weights.each)
    assert not any(first) and any(second)
    edit = method.fit(model, TASK)
    assert edit.info.notes["steps"] == 6 and edit.info.on == ()
    sites = model.arch.text_linears()
    assert {site.removesuffix(".weight") for site in edit.sites()} == set(sites)
    assert not any(p.requires_grad for part in model.arch.components().values() for p in part.parameters())


def test_keys_and_values_are_trained_but_for_the_last_values(model: Model) -> None:
    objective = objective_of(model, MACE(**QUICK), CAT)
    with objective.weights:
        objective.loss(Batch(0))[0].backward()
    grads = [lora.grad is not None and bool(lora.grad.any()) for lora in objective.weights.each[0].up]
    sites = list(model.arch.text_linears())
    values = set(model.arch.value_linears())
    untrained = [site for site, trained in zip(sites, grads, strict=True) if not trained]
    assert len(untrained) == 1 and untrained[0] in values


def test_training_takes_attention_away_and_fusing_keeps_that(model: Model) -> None:
    """On the samples of the loss: beside the frozen model, with the LoRA, and with the whole edit against the refinement alone."""
    method = MACE(**{**QUICK, "max_train_steps": 20}, learning_rate=1e-2, preserve_scale=0.0, prior="", fuse_preserve_scale=0.0, lamb=0.1)
    task = EraseTask((Concept("cat", anchor="dog"),), templates=("a {}",))
    refined = MACERefine(prior="", preserve_scale=0.0, lamb=0.1).fit(model, task)
    edit = method.fit(model, task)
    objective = objective_of(model, method, task)  # its LoRA is zero

    def attended() -> float:
        return sum(objective.loss(Batch(step))[0].item() for step in range(20))

    with objective.weights, torch.no_grad():
        with model.attached(refined):
            off = attended()
        with model.attached(edit):
            on = attended()
    assert on < off


def test_the_edit_is_the_refinement_and_the_fused_loras(model: Model) -> None:
    method = MACE(**QUICK, learning_rate=1e-2)
    edit = method.fit(model, CAT)
    refined = MACERefine().fit(model, CAT)
    with model.attached(refined):
        objective = objective_of(model.reference(), method, CAT)  # pictures of the model as it was
        objective = TurningAway(model, method, objective.shown)
        with objective.weights:
            train(objective, method.loop(), in_place=True, quiet=True)
            lora = objective.weights.each[0].edit(EditInfo(base=model.fingerprint))
        fused = MACEFuse().fuse(model, [(lora, CAT.concepts[0])], CAT.preserve)
    assert isinstance(edit, LowRank)
    for site in edit.sites():
        torch.testing.assert_close(edit.delta(site), refined.delta(site) + fused.delta(site), atol=1e-5, rtol=1e-3)


def test_a_batch_in_parts_is_the_same(model: Model) -> None:
    whole, parts = (objective_of(model, MACE(**QUICK, train_batch_size=size)) for size in (4, 2))
    with torch.no_grad(), whole.weights, parts.weights:
        halves = [parts.loss(Batch(3, part, 2))[0].item() for part in (0, 1)]
        assert whole.loss(Batch(3))[0].item() == pytest.approx(sum(halves) / 2, rel=1e-5)


def test_a_region_is_where_attention_is_near_its_largest() -> None:
    attended = torch.tensor([[[1.0, 2.0], [2.9, 3.0]]])
    assert region_of(attended, 0.5).tolist() == [[[0, 1], [1, 1]]]
    assert region_of(attended, 0.9).tolist() == [[[0, 0], [1, 1]]]
    assert region_of(attended, 0.0).all()


def test_regions_are_of_the_frozen_models_attention_or_of_masks(model: Model, folders: tuple[str, str]) -> None:
    images, masks = folders
    everywhere = Shown(model, MACE(**QUICK, region_threshold=0.0), CAT, 0)
    somewhere = Shown(model, MACE(**QUICK), CAT, 0)
    assert everywhere.regions.all() and 0 < somewhere.regions.mean() < 1
    given = Shown(model, MACE(images=images, masks=masks), CAT, 0)
    width = given.regions.shape[2]
    assert given.regions[..., : width // 2].eq(1).all() and given.regions[..., width // 2 :].eq(0).all()
    assert len(Shown(model, MACE(images=images), CAT, 0).regions) == 2


def test_timesteps_are_drawn_where_objects_form() -> None:
    likely = likelihoods(1000, "importance")
    assert likely.argmax().item() == 300 and likely[200].item() == pytest.approx(0.5, abs=1e-3)
    assert likely[200:400].sum() > 0.8 * likely.sum()
    assert likelihoods(1000, "uniform").unique().tolist() == [1]


def test_gradients_are_the_same_with_checkpointing(model: Model) -> None:
    plain, again = (MACE(**QUICK, learning_rate=1e-2, gradient_checkpointing=on).fit(model, CAT) for on in (False, True))
    assert all(torch.allclose(plain.delta(site), again.delta(site), atol=1e-5) for site in plain.sites())


def test_preserved_prompts_are_kept_by_the_fusion(model: Model) -> None:
    sites = model.arch.text_linears()
    draw = seeded("fused")
    factors = {
        site: (torch.randn(lin.out_features, 1, generator=draw), torch.randn(1, lin.in_features, generator=draw))
        for site, lin in sites.items()
    }
    pairs = [(LowRank.from_factors(factors, EditInfo(base=model.fingerprint)), Concept("cat"))]
    rows = model.arch.encode(["cow"]).hidden[0].double()

    def moved(preserve: tuple[str, ...]) -> float:
        edit = MACEFuse(prior="", preserve_scale=10.0, lamb=0.1).fuse(model, pairs, preserve)
        return sum((rows @ edit.delta(site).double().T).square().sum().item() for site in sites)

    assert moved(("cow",)) < 0.5 * moved(())


def test_what_would_have_no_effect_is_said(model: Model, folders: tuple[str, str]) -> None:
    images, masks = folders
    with pytest.raises(UserError, match="n_images, guidance given beside images"):
        MACE(images=images, n_images=5, guidance=2.0)
    with pytest.raises(UserError, match="masks given without images"):
        MACE(masks=masks)
    with pytest.raises(UserError, match="region_threshold given beside masks"):
        MACE(images=images, masks=masks, region_threshold=0.2)
    with pytest.raises(UserError, match="region_threshold is 1"):
        MACE(region_threshold=1.0)
    with pytest.raises(UserError, match="the task has 2"):
        MACE(images=images).fit(model, TASK)
    with pytest.raises(UserError, match=r"does not contain 'cat' as tokens of its own"):
        MACE(**QUICK).fit(model, EraseTask((Concept("cat"),), templates=("a {}s",)))
