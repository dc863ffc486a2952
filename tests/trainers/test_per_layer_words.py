"""Textual inversion with rows for each layer: gradients, what it gives, resuming, and that plain rows are a case of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from toolkit.arch.flux import Flux
from toolkit.arch.sd import SD
from toolkit.arch.sdxl import SDXL
from toolkit.concepts import CustomizeTask, Subject
from toolkit.edits.layer_token import LayerTokenEdit
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError
from toolkit.io.files import load_edit, save_edit
from toolkit.layer_rows import LayerRows
from toolkit.model import Model
from toolkit.prompt_search import TokenRows
from toolkit.runs import TrainingRun
from toolkit.sample import sample
from trainers.customize.textual_inversion import TEMPLATES, TextualInversion
from trainers.loop import Batch
from trainers.subjects import Denoising, Photos, Prompts

FAMILIES = pytest.mark.parametrize("family", [SD, SDXL])
QUICK = TextualInversion(per_layer=True, max_train_steps=2, num_vectors=2, train_batch_size=2)


def task(folder: Path) -> CustomizeTask:
    for name in ("red", "blue"):
        Image.new("RGB", (20, 20), name).save(folder / f"{name}.png")
    subjects = [Subject("<toy>", "cat", (folder / "red.png",)), Subject("<pal>", "dog", (folder / "blue.png",))]
    return CustomizeTask(tuple(subjects))


def denoising(model: Model, rows: Any, method: TextualInversion, folder: Path) -> Denoising:
    pictures = Photos.of(model.arch, task(folder).subjects, method, TEMPLATES["object"])
    return Denoising(rows, pictures, Prompts(model.arch, "no", grad=True), method)


def snapshot(model: Model) -> tuple[list[object], list[torch.Tensor]]:
    objects = [*model.arch.tokenizers().values(), *model.arch.token_embeddings().values(), *model.arch.readers]
    return objects, [p.clone() for part in model.arch.components().values() for p in part.state_dict().values()]


@FAMILIES
def test_every_row_of_every_layer_gets_its_own_gradient(family: type[SD], tmp_path: Path) -> None:
    model = Model(family.tiny())
    with LayerRows(model, {"<toy>": "cat", "<pal>": "dog"}, vectors=2).unlisted() as rows:
        objective, gradients = denoising(model, rows, QUICK, tmp_path), []
        objective.loss(Batch(0))[0].backward()
        sites, parameters = len(model.arch.cross_attention_sites()), list(rows.parameters())
        assert len(parameters) == 2 * len(model.arch.token_embeddings())
        for parameter in parameters:
            assert parameter.shape[:2] == (sites, 2) and parameter.grad is not None
            assert (parameter.grad.abs().sum(-1) > 0).all()
            gradients.append(parameter.grad)
            assert len({tuple(grad.flatten().tolist()) for grad in parameter.grad}) == sites
        others = [p for part in model.arch.components().values() for p in part.parameters() if not any(p is own for own in parameters)]
        assert others and all(p.grad is None for p in others)


@FAMILIES
def test_gradients_of_equal_rows_add_up_to_those_of_one(family: type[SD], tmp_path: Path) -> None:
    """The loss and, by the chain rule, its gradient: against plain textual inversion from the same start."""
    found = []
    for kind in (TokenRows, LayerRows):
        model = Model(family.tiny())
        with kind(model, {"<toy>": "cat", "<pal>": "dog"}, vectors=2).unlisted() as rows:
            loss = denoising(model, rows, QUICK, tmp_path).loss(Batch(0))[0]
            loss.backward()
            grads = [p.grad for p in rows.parameters()]
        found.append((loss.detach(), [grad if grad is None or grad.ndim == 2 else grad.sum(0) for grad in grads]))
    (plain, one), (layered, every) = found
    torch.testing.assert_close(layered, plain, atol=1e-6, rtol=1e-5)
    for single, total in zip(one, every, strict=True):
        assert single is not None and single.abs().max() > 0
        torch.testing.assert_close(total, single, atol=1e-7, rtol=1e-3)


@FAMILIES
def test_it_gives_words_and_leaves_the_model(family: type[SD], tmp_path: Path) -> None:
    model = Model(family.tiny())
    before = snapshot(model)
    edit = QUICK.fit(model, task(tmp_path))
    after = snapshot(model)
    assert all(a is b for a, b in zip(before[0], after[0], strict=True)) and len(before[0]) == len(after[0])
    assert all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True)) and model.edits == ()
    assert isinstance(edit, LayerTokenEdit) and edit.info.triggers == ("<toy>", "<pal>") and edit.info.method == "textual_inversion"
    assert edit.info.base == model.fingerprint and edit.info.config["per_layer"] is True
    start = TokenRows(model, {"<toy>": "cat", "<pal>": "dog"}, vectors=2).edit()
    for token, parts in edit.tokens.items():
        for part, sites in parts.items():
            assert list(sites) == list(model.arch.cross_attention_sites())
            assert all((rows != start.tokens[token][part]).any(1).all() for rows in sites.values())
    prompts = ["a <toy>", "a cat", "a <pal> and a <toy>"]
    with model.attached(edit):
        expected = sample(model, prompts, [0, 1, 2], steps=2)
    with model.attached(load_edit(save_edit(edit, tmp_path / "edit.safetensors"))):
        assert torch.equal(sample(model, prompts, [0, 1, 2], steps=2), expected)
    assert isinstance(replace(QUICK, per_layer=False).fit(model, task(tmp_path)), TokenEdit)


def test_the_edit_reads_like_the_rows_did(tiny: Model) -> None:
    """While the rows change, also without a graph, they are what is drawn."""
    with LayerRows(tiny, {"<toy>": "cat"}).unlisted() as rows:
        (parameter,) = rows.parameters()
        images = []
        for shift in (0.0, 1.0):
            with torch.no_grad():
                parameter[0] += shift * (torch.arange(32) % 5)
                parameter[1] -= shift * (torch.arange(32) % 5)  # of which the mean does not know
            images.append((sample(tiny, ["a <toy>"], [0], steps=2), rows.edit()))
    for image, edit in images:
        with tiny.attached(edit):
            torch.testing.assert_close(sample(tiny, ["a <toy>"], [0], steps=2), image, atol=1e-5, rtol=0)
    assert (images[0][0] - images[1][0]).abs().max() > 1e-4


def test_it_resumes_bit_exactly(tiny: Model, tmp_path: Path) -> None:
    subjects, run = task(tmp_path), TrainingRun(tmp_path / "run", checkpointing_steps=2)
    whole = replace(QUICK, max_train_steps=4).fit(tiny, subjects)
    QUICK.fit(tiny, subjects, run=run)
    resumed = replace(QUICK, max_train_steps=4).fit(tiny, subjects, run=run)
    assert resumed.info.notes["steps"] == 4
    assert all(torch.equal(resumed.delta(site), whole.delta(site)) for site in whole.sites())


def test_gradient_checkpointing_changes_nothing(tiny: Model, tmp_path: Path) -> None:
    """The layers read their own rows when they are computed again."""
    plain, again = (replace(QUICK, gradient_checkpointing=on).fit(tiny, task(tmp_path)) for on in (False, True))
    assert all(torch.allclose(plain.delta(site), again.delta(site), atol=1e-6) for site in plain.sites())


def test_it_builds_on_words_that_are_attached(tiny: Model, tmp_path: Path) -> None:
    first = QUICK.fit(tiny, task(tmp_path))
    subject = Subject("<hat>", "cat", (tmp_path / "red.png",), captions=("a <toy> with a <hat>",))
    with tiny.attached(first):
        edit = QUICK.fit(tiny, CustomizeTask((subject,)))
        assert [attached for attached, _ in tiny.edits] == [first] and edit.info.on == ("textual_inversion",)
        tiny.attach(edit)
        assert sample(tiny, ["a <toy> with a <hat>"], [0], steps=1).isfinite().all()


def test_a_family_without_cross_attention_is_refused() -> None:
    with pytest.raises(UserError, match="flux has no cross-attention"):
        LayerRows(Model(Flux.tiny()), {"<toy>": "cat"})
