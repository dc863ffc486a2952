"""What every method promises, on a tiny random instance of every architecture that it declares."""

import dataclasses
import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.contract.fitting import CASES, DEVICE, METHODS, Fitted, quick, snapshot, tiny_of
from toolkit import registry
from toolkit.commands import open_method
from toolkit.concepts import Concept, CustomizeTask, DebiasTask, EraseTask, MergeTask, Subject
from toolkit.edits.low_rank import LowRank
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError
from toolkit.io.files import load_edit, save_edit
from toolkit.model import Model, load_model
from toolkit.sample import sample


def same(one: dict[str, object], other: dict[str, object]) -> bool:
    def equal(a: object, b: object) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)

    return one.keys() == other.keys() and all(equal(value, other[name]) for name, value in one.items())


def prompts(fitted: Fitted) -> list[str]:
    """Prompts that the edit is about, and one that it is not."""
    about = [f"a photo of a {word}" for word in fitted.edit.info.triggers]
    if not isinstance(fitted.task, CustomizeTask):
        about += [f"a photo of a {word}" for concept in fitted.task.concepts for word in concept.words]
    return [*about, "a plain background"]


def drawn(model: Model, fitted: Fitted) -> Tensor:
    texts = prompts(fitted)
    return sample(model, texts, range(len(texts)), steps=2)


def test_fitting_leaves_the_model_as_it_was(fitted: Fitted) -> None:
    assert same(fitted.before, fitted.after) and fitted.model.edits == ()


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU adds the gradients of embeddings in any order")
def test_fitting_is_repeatable(fitted: Fitted) -> None:
    again = fitted.method.fit(fitted.model, fitted.task).tensors()
    first = fitted.edit.tensors()
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


def test_what_needs_the_text_alone_is_fitted_with_the_rest_left_in_its_file(fitted: Fitted, tmp_path: Path) -> None:
    if fitted.method.needs() == "all":
        pytest.skip("it looks at more than the text encoders and the layers that read text")
    model = load_model(str(fitted.model.save(tmp_path / "model")), device=DEVICE, lazily=True)
    edit = fitted.method.fit(model, fitted.task)
    first, again = fitted.edit.tensors(), edit.tensors()
    assert edit.info == fitted.edit.info
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


def test_the_edit_says_where_it_comes_from(fitted: Fitted) -> None:
    info = fitted.edit.info
    assert info.method == fitted.method.name() and dict(info.config) == fitted.method.config()
    assert dict(info.base) == fitted.model.fingerprint
    if isinstance(fitted.task, CustomizeTask) and not getattr(fitted.method, "finds", False):
        assert info.triggers == tuple(subject.token for subject in fitted.task.subjects)


def test_the_edit_is_finite_and_readable_without_a_model(fitted: Fitted) -> None:
    sites = fitted.edit.sites()
    assert sites and all(fitted.edit.delta(site).isfinite().all() for site in sites)
    assert any(fitted.edit.delta(site).any() for site in sites)
    with pytest.raises(UserError):
        fitted.edit.delta("nowhere")


def test_saved_and_loaded_it_is_the_same(fitted: Fitted, tmp_path: Path) -> None:
    loaded = load_edit(save_edit(fitted.edit, tmp_path / "edit.safetensors"))
    assert type(loaded) is type(fitted.edit) and set(loaded.sites()) == set(fitted.edit.sites())
    assert json.dumps(dataclasses.asdict(loaded.info)) == json.dumps(dataclasses.asdict(fitted.edit.info))
    with fitted.model.attached(fitted.edit):
        expected = drawn(fitted.model, fitted)
    with fitted.model.attached(loaded):
        assert torch.equal(drawn(fitted.model, fitted), expected)


def test_attached_it_changes_images_and_detached_it_does_not(fitted: Fitted) -> None:
    plain = drawn(fitted.model, fitted)
    with fitted.model.attached(fitted.edit):
        changed = drawn(fitted.model, fitted)
    assert changed.isfinite().all() and not torch.equal(changed[:-1], plain[:-1])
    assert same(snapshot(fitted.model), fitted.before) and torch.equal(drawn(fitted.model, fitted), plain)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_among_others_it_is_detached_in_any_order(fitted: Fitted, order: tuple[int, ...]) -> None:
    model = fitted.model
    changes = {site: torch.full_like(linear.weight, 0.01) for site, linear in model.arch.text_linears().items()}
    widths = {part: embedding.embedding_dim for part, embedding in model.arch.token_embeddings().items()}
    token = TokenEdit.from_rows({"<another>": {part: torch.ones(2, width) for part, width in widths.items()}})
    edits = (LowRank.from_deltas(changes), fitted.edit, token)
    for edit in edits:
        model.attach(edit)
    for index in order:
        model.detach(edits[index])
    assert same(snapshot(model), fitted.before)


def test_an_edit_on_top_of_it_can_be_fitted(fitted: Fitted) -> None:
    fresh = fitted.model.reference()
    fresh.attach(fitted.edit)
    before = snapshot(fresh)
    task = fitted.task
    if isinstance(task, CustomizeTask):  # other words than those that are attached
        renamed = [dataclasses.replace(subject, token=f"{subject.token}2", captions=()) for subject in task.subjects]
        task = CustomizeTask(tuple(renamed))
    if isinstance(task, (MergeTask, DebiasTask)):  # edits whose words are not attached, a concept that is not balanced
        task = fitted.method.example_task(fresh)
    second = fitted.method.fit(fresh, task)
    assert same(snapshot(fresh), before) and second.info.on == (fitted.method.name(),)


def test_merged_it_is_what_it_is_attached(fitted: Fitted, tmp_path: Path) -> None:
    if not fitted.edit.mergeable:
        pytest.skip("declares that it cannot be merged")
    with fitted.model.attached(fitted.edit):
        expected = drawn(fitted.model, fitted)
        saved = fitted.model.save(tmp_path / "model")
    merged = fitted.model.reference([fitted.edit])
    merged.merge()
    assert merged.edits == () and torch.equal(drawn(merged, fitted), expected)
    torch.testing.assert_close(drawn(load_model(str(saved), device=DEVICE), fitted), expected, atol=1e-4, rtol=0)


def test_half_of_it_is_between(fitted: Fitted) -> None:
    if not all(part.scalable for part, _ in fitted.edit.parts()):
        with pytest.raises(UserError, match="cannot be scaled"):
            fitted.model.attach(fitted.edit, 0.5)
        return
    with fitted.model.attached(fitted.edit, scale=0.0):
        torch.testing.assert_close(drawn(fitted.model, fitted), drawn(fitted.model.reference(), fitted))


@pytest.mark.parametrize(("name", "family"), CASES)
def test_another_models_edit_is_refused_when_strict(name: str, family: str) -> None:
    method, model = quick(METHODS[name]), tiny_of(family)
    edit = method.fit(model, method.example_task(model))
    other = tiny_of(family, seed=1)
    other.strict = True
    before = snapshot(other)
    with pytest.raises(UserError, match="another base"):
        other.attach(edit)
    assert same(snapshot(other), before)


@pytest.mark.parametrize("name", METHODS)
def test_a_config_survives_json_and_the_command_line(name: str) -> None:
    method = quick(METHODS[name])
    assert METHODS[name].from_config(json.loads(json.dumps(method.config()))) == method
    written = {key: ",".join(value) if isinstance(value, (list, tuple)) else value for key, value in method.config().items()}
    words = [f"{key}={'none' if value is None else value}" for key, value in written.items() if value != ""]
    assert open_method(METHODS[name].kind, name, words) == method


@pytest.mark.parametrize("name", METHODS)
def test_every_option_says_what_it_does(name: str) -> None:
    assert all(field.metadata.get("help") for field in dataclasses.fields(METHODS[name]))


@pytest.mark.parametrize("name", METHODS)
def test_the_command_line_lists_it(name: str) -> None:
    rows = registry.load("command", "methods").run(Namespace())["methods"]
    method = METHODS[name]
    expected = {"name": name, "kind": method.kind, "architectures": [*method.architectures]}
    assert {**expected, "paper": method.paper, "training_free": method.training_free} in rows


@pytest.mark.parametrize(("name", "family"), CASES)
def test_a_task_of_another_kind_is_refused(name: str, family: str) -> None:
    tasks = {
        "erase": EraseTask((Concept("cat"),)),
        "customize": CustomizeTask((Subject("<toy>", "cat", (Path("missing.png"),)),)),
        "merge": MergeTask(()),
        "debias": DebiasTask((Concept("cat"),), ("big", "small"), lambda model, concept: (1.0, 0.0)),
    }
    model = tiny_of(family)
    for kind, task in tasks.items():
        if kind != METHODS[name].kind:
            with pytest.raises(UserError, match=type(task).__name__):
                METHODS[name]().fit(model, task)
