"""cones: h is that of the equation, what it exceeds is shut for good, and subjects unite."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from toolkit.concepts import CustomizeTask, Subject
from toolkit.edits.chain import Chain
from toolkit.edits.delta import Delta
from toolkit.edits.mask import Mask
from toolkit.errors import UserError
from toolkit.io.files import save_edit
from toolkit.model import Model
from toolkit.runs import TrainingRun, seeded
from trainers.customize.cones import Cones, exceeded
from trainers.loop import Batch


@pytest.fixture
def subjects(tmp_path: Path) -> tuple[Subject, Subject]:
    """A cat and a dog, two pictures of each."""
    paths = {colour: tmp_path / f"{colour}.png" for colour in ("red", "green", "blue", "black")}
    for colour, path in paths.items():
        Image.new("RGB", (20, 20), colour).save(path)
    return (
        Subject("sks", "cat", (paths["red"], paths["green"])),
        Subject("olis", "dog", (paths["blue"], paths["black"])),
    )


@pytest.fixture
def task(subjects: tuple[Subject, Subject]) -> CustomizeTask:
    return CustomizeTask(subjects[:1])


def fit(model: Model, task: CustomizeTask, run: TrainingRun | None = None, **options: Any) -> Mask:
    """With a word that the model knows, so that the edit is the mask alone."""
    small: dict[str, Any] = {"max_train_steps": 3, "train_batch_size": 2, "share": 0.05, "new_word": False}
    if "tau" in options:
        del small["share"]
    edit = Cones(**{**small, **options}).fit(model, task, run=run)
    assert isinstance(edit, Mask)
    return edit


def masks(edit: Mask, model: Model) -> dict[str, Tensor]:
    """M of every parameter that could be shut."""
    layers = {f"{site}.weight": layer.weight for site, layer in model.arch.text_linears().items()}
    return {name: edit.kept(name) if name in edit.bits else torch.ones_like(own).bool() for name, own in layers.items()}


def by_hand(model: Model, task: CustomizeTask, step: int, kept: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """theta * dL(theta * M) / dtheta, M the derivative of the product: the objective's own samples, everything else written out."""
    method = Cones(new_word=False, train_batch_size=2, **options)
    with method.objective(model, task) as (objective, _):
        samples = objective.each[0].samples(Batch(step))  # pyright: ignore[reportAttributeAccessIssue]
    (subject,) = task.subjects
    alpha, sigma = model.arch.signal_and_noise(samples.t)
    noisy = alpha * samples.latents + sigma * samples.noise
    said = model.arch.encode([f"a photo of {subject.token} {subject.class_name}"] * 2)
    about = model.arch.encode([f"a photo of {subject.class_name}"] * 2)
    with torch.no_grad():
        before = model.arch.predict(noisy, samples.t, about)
    theta = {name: model.arch.parameter(name) for name in kept}
    plain = {name: own.detach().clone() for name, own in theta.items()}
    for name, own in theta.items():
        own.data = plain[name] * kept[name]
        own.requires_grad_(True)
    loss = (model.arch.predict(noisy, samples.t, said) - samples.noise).square().mean()
    if method.prior == "prediction":
        loss = loss + method.prior_weight * (model.arch.predict(noisy, samples.t, about) - before).square().mean()
    grads = torch.autograd.grad(loss, list(theta.values()))
    for name, own in theta.items():
        own.requires_grad_(False)
        own.data = plain[name]
    return {name: plain[name] * grad * kept[name] for (name, grad) in zip(theta, grads, strict=True)}


@pytest.mark.parametrize("options", [{"prior": "none"}, {"prior_weight": 100.0}])
def test_what_has_h_above_tau_is_shut(tiny: Model, task: CustomizeTask, options: dict[str, Any]) -> None:
    kept = {f"{site}.weight": torch.ones_like(layer.weight).bool() for site, layer in tiny.arch.text_linears().items()}
    tau = float(torch.cat([h.flatten() for h in by_hand(tiny, task, 0, kept, **options).values()]).quantile(0.9))
    assert tau > 0
    for step in range(3):
        h = by_hand(tiny, task, step, kept, **options)
        mine = masks(fit(tiny, task, max_train_steps=step + 1, tau=tau, **options), tiny)
        for name, value in h.items():
            expected = kept[name] & (value <= tau)
            clear = (value - tau).abs() > 1e-4 * tau  # the rest may fall on either side, by rounding
            assert torch.equal(mine[name][clear], expected[clear]) and clear.float().mean() > 0.99
        assert all((kept[name] | ~mine[name]).all() for name in kept), "what is shut stays shut"
        assert sum(int((kept[name] & ~mine[name]).sum()) for name in kept) > 0
        kept = mine


def test_the_prior_holds_back(tiny: Model, task: CustomizeTask) -> None:
    edits = [fit(tiny, task, prior_weight=weight).tensors() for weight in (1.0, 1e4)]
    assert edits[0].keys() != edits[1].keys() or any(not torch.equal(edits[0][name], edits[1][name]) for name in edits[0])


def test_share_sets_tau(tiny: Model, task: CustomizeTask) -> None:
    once = fit(tiny, task, max_train_steps=1, share=0.05)
    assert once.info.notes["shut"][0] == pytest.approx(0.05, abs=0.001)
    again = fit(tiny, task, max_train_steps=1, tau=once.info.notes["tau"][0])
    assert {name: tensor.tolist() for name, tensor in again.tensors().items()} == {n: t.tolist() for n, t in once.tensors().items()}
    values = [torch.arange(10.0), torch.arange(10.0, 20.0).view(2, 5)]
    assert [exceeded(values, share) for share in (0.001, 0.1, 0.5, 0.999)] == [18.0, 17.0, 9.0, 0.0]
    assert exceeded([-torch.ones(3)], 0.5) == 0.0, "what would raise the loss stays"


def test_subjects_have_a_mask_each_and_the_edit_is_the_union(tiny: Model, subjects: tuple[Subject, Subject]) -> None:
    one, two = (fit(tiny, CustomizeTask((subject,))) for subject in subjects)
    both = fit(tiny, CustomizeTask(subjects))
    united = Mask.union([one, two])
    assert all(torch.equal(both.kept(name), united.kept(name)) for name in united.sites()) and both.bits.keys() == united.bits.keys()
    assert any(not torch.equal(one.kept(name), two.kept(name)) for name in one.bits.keys() & two.bits.keys())
    assert both.info.notes["tau"] == [*one.info.notes["tau"], *two.info.notes["tau"]] and both.info.triggers == ("sks", "olis")


def test_it_is_small(tiny: Model, task: CustomizeTask, tmp_path: Path) -> None:
    edit = fit(tiny, task)
    layers = tiny.arch.text_linears()
    dense = sum(4 * layer.weight.numel() for layer in layers.values())
    assert sum(tensor.nbytes for tensor in edit.tensors().values()) <= 0.1 * dense
    header = 1024 + 300 * len(layers)  # what names take, which is little beside the weights of a model of ordinary size
    assert save_edit(edit, tmp_path / "edit.safetensors").stat().st_size <= 0.1 * dense + header


def test_the_new_word_is_the_classs_twin(tiny: Model, subjects: tuple[Subject, Subject]) -> None:
    task = CustomizeTask((Subject("<toy>", "cat", subjects[0].images),))
    method = Cones(max_train_steps=2, train_batch_size=2)
    edit = method.fit(tiny, task)
    assert isinstance(edit, Chain) and [part.kind() for part, _ in edit.parts()] == ["token", "mask"]
    with tiny.attached(edit):
        ids = tiny.arch.tokenizers()["text_encoder"]("cat", add_special_tokens=False).input_ids
        table = tiny.arch.token_embeddings()["text_encoder"].weight
        assert torch.equal(table[-1], table[ids].mean(0))
        with pytest.raises(UserError, match="'<toy>' is already a word"):
            method.fit(tiny, task)
        other = Cones(max_train_steps=2, train_batch_size=2, new_word=False).fit(tiny, task)
    assert isinstance(other, Mask) and other.info.on == ("cones",)


def test_on_top_of_others_it_acts_as_it_will(tiny: Model, task: CustomizeTask) -> None:
    sites = tiny.arch.text_linears()
    changes = {site: torch.randn(layer.weight.shape, generator=seeded("added", site)) for site, layer in sites.items()}
    added = Delta.from_deltas({f"{site}.weight": 0.1 * change for site, change in changes.items()})
    tiny.attach(added)
    method = Cones(new_word=False, max_train_steps=2, share=0.2, prior="none")
    with method.objective(tiny, task) as (objective, make):
        objective.loss(Batch(0))[0].backward()
        optimizer = objective.optimizer([], method.loop())
        optimizer.step()
        value: Any = objective.loss(Batch(1))[0]
        acting = {site: layer.weight.detach().clone() for site, layer in sites.items()}
        edit = make(tiny.info(method))
    with tiny.attached(edit):
        assert all(torch.equal(layer.weight, acting[site]) for site, layer in sites.items())
        with method.objective(tiny, task) as (objective, _):
            assert objective.loss(Batch(1))[0].item() == value.item()


def test_interrupted_it_goes_on(tiny: Model, subjects: tuple[Subject, Subject], tmp_path: Path) -> None:
    task, run = CustomizeTask(subjects), TrainingRun(tmp_path / "run", checkpointing_steps=3)
    whole = fit(tiny, task, max_train_steps=4)
    fit(tiny, task, run, max_train_steps=2)
    resumed = fit(tiny, task, run, max_train_steps=4)
    assert whole.tensors().keys() == resumed.tensors().keys()
    assert all(torch.equal(tensor, resumed.tensors()[name]) for name, tensor in whole.tensors().items())


def test_what_makes_no_sense_is_told(tiny: Model, subjects: tuple[Subject, Subject], tmp_path: Path) -> None:
    task = CustomizeTask(subjects)
    with pytest.raises(UserError, match=r"no parameter's h was above tau 1e\+03, so nothing is shut"):
        fit(tiny, task, tau=1e3)
    with pytest.raises(UserError, match="share given with tau"):
        Cones(tau=0.1, share=0.2)
    with pytest.raises(UserError, match=r"share is 1\.0, needs more than 0"):
        Cones(share=1.0)
    with pytest.raises(UserError, match="class_images are of one class, and the subjects are of cat, dog"):
        fit(tiny, task, prior="images", class_images=str(tmp_path))
    with pytest.raises(UserError, match="unknown option of cones 'learning_rate'"):
        Cones.from_config({"learning_rate": 1e-3})
