"""multibooth: the loss and the word against the equations, what is trained, resuming, and its edits in regions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pipelines.attention.regional import Region, regional
from toolkit.arch.sd import SD
from toolkit.arch.sdxl import SDXL
from toolkit.concepts import CustomizeTask, Subject
from toolkit.edits.chain import Chain
from toolkit.edits.low_rank import LowRank
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.runs import TrainingRun, seeded
from toolkit.sample import sample
from trainers.customize.multibooth import MultiBooth, QueryLayer, own_word
from trainers.loop import Batch

QUICK: dict[str, Any] = {"clip": "metric-clip", "max_train_steps": 4, "learning_rate": 0.01, "rank": 2, "num_queries": 3}


@pytest.fixture
def task(tmp_path: Path) -> CustomizeTask:
    images = tuple(tmp_path / f"{colour}.png" for colour in ("red", "green", "blue"))
    for path in images:
        picture = Image.new("RGB", (20, 20), path.stem)
        picture.paste("white", (2, 2, 9, 12))
        picture.save(path)
    return CustomizeTask((Subject("<toy>", "cat", images),))


def parts(edit: Any) -> tuple[TokenEdit, LowRank]:
    word, change = edit.edits
    assert isinstance(edit, Chain) and isinstance(word, TokenEdit) and isinstance(change, LowRank)
    return word, change


def stirred(concept: Any) -> None:
    """Everything that starts at zero at something else."""
    with torch.no_grad():
        for index, parameter in enumerate(concept.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=seeded("stir", index)).to(parameter))


def attention(module: Any, asked: Tensor, read: Tensor) -> Tensor:
    """Multi-head attention of one picture's rows, written out."""
    weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    if module.in_proj_weight is not None:
        weights = list(module.in_proj_weight.chunk(3))
    biases = module.in_proj_bias.chunk(3)
    q, k, v = (rows @ w.double().T + b.double() for rows, w, b in zip((asked, read, read), weights, biases, strict=True))
    heads, size = module.num_heads, q.shape[1] // module.num_heads
    out = []
    for h in range(heads):
        own = slice(h * size, (h + 1) * size)
        out.append((q[:, own] @ k[:, own].T / size**0.5).softmax(-1) @ v[:, own])
    return torch.cat(out, 1) @ module.out_proj.weight.double().T + module.out_proj.bias.double()


def embedded(model: Model, encoder: Any) -> list[Tensor]:
    """v of each picture, in float64."""
    found = []
    for seen in encoder.seen.double():
        queries, name = encoder.queries.double(), encoder.name.double()
        for layer in encoder.layers:
            norms = [lambda x, n=n: F.layer_norm(x, x.shape[-1:], n.weight.double(), n.bias.double()) for n in layer.norms]
            both = torch.cat([queries, name])
            both = both + attention(layer.own, norms[0](both), norms[0](both))
            queries, name = both[: len(queries)], both[len(queries) :]
            queries = queries + attention(layer.across, norms[1](queries), norms[2](seen))
            both = torch.cat([queries, name])
            wide = norms[3](both) @ layer.widened.weight.double().T + layer.widened.bias.double()
            both = both + F.gelu(wide) @ layer.narrowed.weight.double().T + layer.narrowed.bias.double()
            queries, name = both[: len(queries)], both[len(queries) :]
        found.append(queries.mean(0))
    return found


@pytest.mark.parametrize("options", [{}, {"query_layers": 2, "num_queries": 1}], ids=["default", "two layers"])
def test_the_word_of_a_picture_is_the_encoders_scaled_to_its_class(tiny: Model, task: CustomizeTask, options: dict[str, Any]) -> None:
    table = tiny.arch.token_embeddings()["text_encoder"].weight
    ids = tiny.arch.tokenizers()["text_encoder"]("cat", add_special_tokens=False).input_ids
    length = table[ids].double().norm(dim=1).mean()
    with MultiBooth(**{**QUICK, **options}).objective(tiny, task) as (made, edit), torch.no_grad():
        concept: Any = made.module
        torch.testing.assert_close(concept.encoders["text_encoder"].unscaled(), table[ids].mean(0).expand(3, -1), atol=1e-2, rtol=0)
        stirred(concept)
        each = embedded(tiny, concept.encoders["text_encoder"])
        words = [torch.stack(each).mean(0), *each]
        expected = torch.stack([v * length / v.norm() for v in words]).float()
        torch.testing.assert_close(concept.encoders["text_encoder"](), expected, atol=1e-5, rtol=1e-4)
        assert (expected[1:] - expected[[2, 3, 1]]).abs().amax(1).min() > 1e-3, "pictures differ"
        word, _ = parts(edit(tiny.info(MultiBooth())))
        torch.testing.assert_close(word.tokens["<toy>"]["text_encoder"], expected[:1], atol=1e-5, rtol=1e-4)
        own = tiny.arch.token_embeddings()["text_encoder"].weight[-4:]
        torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_the_error_at_each_pictures_word_and_its_norm(task: CustomizeTask, prediction: Any) -> None:
    tiny = Model(SD.tiny(prediction_type=prediction))
    with MultiBooth(**QUICK, train_batch_size=2, norm_weight=0.3).objective(tiny, task) as (made, _), torch.no_grad():
        encoding: Any = made
        stirred(encoding.module)
        value, shown = encoding.loss(Batch(1))
        samples = encoding.samples(Batch(1))
        assert len(set(samples.rows)) == 2
        for row, prompt in zip(samples.rows, samples.prompts, strict=True):
            assert f"{own_word(row)} cat" in prompt and "<toy>" not in prompt
        alpha, sigma = tiny.arch.signal_and_noise(samples.t)
        noisy = alpha * samples.latents + sigma * samples.noise
        output = tiny.arch.predict(noisy, samples.t, tiny.arch.encode(samples.prompts))
        target = samples.noise if prediction == "epsilon" else alpha * samples.noise - sigma * samples.latents
        each = embedded(tiny, encoding.module.encoders["text_encoder"])
        square = sum(float(each[row].square().sum()) for row in samples.rows) / 2
    assert shown["norm"] == pytest.approx(square**0.5, rel=1e-4)
    assert value.item() == pytest.approx(float((output - target).square().mean()) + 0.3 * square, rel=1e-4)


@pytest.mark.parametrize("family", [SD, SDXL], ids=["sd", "sdxl"])
def test_encoders_and_factors_are_trained_and_nothing_else(family: Any, task: CustomizeTask) -> None:
    model = Model(family.tiny())
    before = {f"{part}.{name}": p.clone() for part, module in model.arch.components().items() for name, p in module.named_parameters()}
    with MultiBooth(**QUICK).objective(model, task) as (made, _):
        concept: Any = made.module
        stirred(concept)
        made.loss(Batch(0))[0].backward()
        for name, parameter in concept.named_parameters():
            assert parameter.grad is not None and (parameter.grad.any() or name.endswith("in_proj_bias")), name
        assert set(concept.encoders) == set(model.arch.token_embeddings())
    assert all(p.grad is None for module in model.arch.components().values() for p in module.parameters())
    start = MultiBooth(**{**QUICK, "learning_rate": 0.0}).fit(model, task)
    edit = MultiBooth(**QUICK).fit(model, task)
    (first, _), (word, change) = parts(start), parts(edit)
    assert set(change.up) == set(model.arch.text_linears()) and all(up.shape[1] == 2 and up.any() for up in change.up.values())
    assert list(word.tokens) == ["<toy>"] and edit.info.triggers == ("<toy>",)
    for part, row in word.tokens["<toy>"].items():
        assert len(row) == 1 and not torch.equal(row, first.tokens["<toy>"][part])
    after = {f"{part}.{name}": p for part, module in model.arch.components().items() for name, p in module.named_parameters()}
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_resumed_run_is_an_uninterrupted_one(tiny: Model, task: CustomizeTask, tmp_path: Path) -> None:
    whole = MultiBooth(**QUICK).fit(tiny, task).tensors()
    MultiBooth(**{**QUICK, "max_train_steps": 2}).fit(tiny, task, run=TrainingRun(tmp_path / "run", checkpointing_steps=2))
    resumed = MultiBooth(**QUICK).fit(tiny, task, run=TrainingRun(tmp_path / "run", checkpointing_steps=2)).tensors()
    assert whole.keys() == resumed.keys() and all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_what_acts_while_training_is_what_the_edit_does(tiny: Model, task: CustomizeTask) -> None:
    latents, t = torch.ones(1, *tiny.arch.latent_shape(16, 16)), torch.tensor([300])
    with MultiBooth(**QUICK).objective(tiny, task) as (made, make), torch.no_grad():
        stirred(made.module)
        training = tiny.arch.predict(latents, t, tiny.arch.encode(["a <toy> cat"]))
        edit = make(tiny.info(MultiBooth()))
    with tiny.attached(edit), torch.no_grad():
        torch.testing.assert_close(tiny.arch.predict(latents, t, tiny.arch.encode(["a <toy> cat"])), training, atol=1e-4, rtol=1e-4)


def test_edits_of_two_subjects_are_drawn_in_regions(tiny: Model, task: CustomizeTask) -> None:
    """Each region reads its own word through its own change; one of them everywhere is the model with that edit attached."""
    subject = task.subjects[0]
    edits = []
    for token, seed in (("<toy>", 0), ("<pal>", 1)):
        one = CustomizeTask((Subject(token, "cat", subject.images),))
        edits.append(MultiBooth(**{**QUICK, "learning_rate": 0.1}, seed=seed).fit(tiny, one))
    toy, pal = edits
    boxes = ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))
    drawing: dict[str, Any] = {"steps": 2, "guidance": 3.0}
    with regional(tiny, [Region("a <toy> cat", box=boxes[0], edit=toy), Region("a <pal> cat", box=boxes[1], edit=pal)]) as acting:
        both = sample(tiny, ["a room"], [0], hooks=[acting], **drawing)
    with regional(tiny, [Region("a <toy> cat", box=boxes[0], edit=toy), Region("a cat", box=boxes[1])]) as acting:
        one = sample(tiny, ["a room"], [0], hooks=[acting], **drawing)
    assert both.isfinite().all() and (both - one).abs().max() > 1e-4
    with regional(tiny, [Region("a room", box=(0.0, 0.0, 1.0, 1.0), edit=None)]) as acting:
        plain = sample(tiny, ["a room"], [0], hooks=[acting], **drawing)
    torch.testing.assert_close(plain, sample(tiny, ["a room"], [0], **drawing), atol=1e-5, rtol=0)
    with regional(tiny, [Region("a <toy> cat", box=(0.0, 0.0, 1.0, 1.0), edit=toy)]) as acting:
        inside = sample(tiny, ["a <toy> cat"], [0], hooks=[acting], **drawing)
    with tiny.attached(toy):
        torch.testing.assert_close(inside, sample(tiny, ["a <toy> cat"], [0], **drawing), atol=1e-4, rtol=0)


def test_a_region_can_read_the_images_prompt_too_as_the_paper_has_it(tiny: Model, task: CustomizeTask) -> None:
    """Its encoding added to the region's own: everywhere, that is what a model with the edit makes of the sum."""
    edit = MultiBooth(**{**QUICK, "learning_rate": 0.1}).fit(tiny, task)
    latents, t = torch.ones(1, *tiny.arch.latent_shape(16, 16)), torch.tensor([300])

    def summed(prompts: Sequence[str]) -> Tensor:
        return tiny.arch.encode(prompts).hidden + tiny.arch.encode(["a room"]).hidden

    with regional(tiny, [Region("a <toy> cat", box=(0.0, 0.0, 1.0, 1.0), edit=edit)], encode=summed) as acting, torch.no_grad():
        acting.tell([None], 1)
        inside = tiny.arch.predict(latents, t, tiny.arch.encode(["a room"]))
    with tiny.attached(edit), torch.no_grad():
        text = replace(tiny.arch.encode(["a <toy> cat"]), hidden=summed(["a <toy> cat"]))
        torch.testing.assert_close(inside, tiny.arch.predict(latents, t, text), atol=1e-5, rtol=1e-5)


def test_what_it_cannot_do_is_told(tiny: Model, task: CustomizeTask) -> None:
    subject = task.subjects[0]
    two = CustomizeTask((subject, Subject("<pal>", "dog", subject.images)))
    with pytest.raises(UserError, match=r"2 subjects given, and each gets a module of its own .* fit them one at a time"):
        MultiBooth(**QUICK).fit(tiny, two)
    with pytest.raises(UserError, match="no CLIP given"):
        MultiBooth().fit(tiny, task)
    for name, value in (("rank", 0), ("num_queries", 0), ("query_layers", 0), ("norm_weight", -1.0)):
        options: dict[str, Any] = {name: value}
        with pytest.raises(UserError, match=name):
            MultiBooth(**options)


def test_a_layer_adds_nothing_at_first() -> None:
    layer = QueryLayer(128, 24)
    queries, name, places = torch.randn(2, 3, 128), torch.randn(2, 1, 128), torch.randn(2, 4, 24)
    after = layer(queries, name, places)
    assert layer.own.num_heads == 2 and torch.equal(after[0], queries) and torch.equal(after[1], name)


def test_the_class_is_kept_and_all_layers_are_adapted_when_asked_for(tiny: Model, task: CustomizeTask) -> None:
    prior: dict[str, Any] = {"prior": "distillation", "num_class_images": 2, "class_image_steps": 2}
    method = MultiBooth(**QUICK, **prior, layers="all")
    with method.objective(tiny, task) as (learning, _):
        made: Any = learning
        stirred(made.module)
        value, shown = made.loss(Batch(0))
        assert value.item() == pytest.approx(shown["subject"] + shown["class"] + 0.01 * shown["norm"] ** 2, rel=1e-4)
        assert shown["class"] > 0
    _, change = parts(method.fit(tiny, task))
    assert set(change.sites()) == {f"{site}.weight" for site in tiny.arch.denoiser_layers()}
    with pytest.raises(UserError, match="prediction"):
        MultiBooth(prior="prediction")
