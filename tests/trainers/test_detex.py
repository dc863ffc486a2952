"""detex: the prompts of each picture, where the error counts, what its own words are, and that only the subject's word is kept."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from toolkit.clip import load_metric_clip
from toolkit.concepts import CustomizeTask, Subject
from toolkit.edits.chain import Chain
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.runs import TrainingRun
from trainers.customize.detex import Detex
from trainers.loop import Batch

PLAIN: dict[str, Any] = {"prior": "none", "initializer_tokens": (), "clip": "metric-clip"}


@pytest.fixture
def task(tmp_path: Path) -> CustomizeTask:
    """Two pictures of one subject with masks of their left half, and one of another without."""
    images = tuple(tmp_path / f"{colour}.png" for colour in ("red", "green", "blue"))
    for path in images:
        Image.new("RGB", (16, 16), path.stem).save(path)
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 0, 8, 16))
    mask.save(tmp_path / "mask.png")
    masks = (tmp_path / "mask.png",) * 2
    return CustomizeTask((Subject("<toy>", "dog", images[:2], masks), Subject("<pal>", "cat", images[2:])))


def embedded(model: Model, word: str) -> Tensor:
    """The row that the text encoder looks up for a word."""
    (ids,) = model.arch.tokenizers()["text_encoder"]([word], add_special_tokens=False).input_ids
    return model.arch.token_embeddings()["text_encoder"](torch.tensor(ids))


def features(task: CustomizeTask) -> Tensor:
    """What the CLIP says of the files, unit length."""
    paths = [path for subject in task.subjects for path in subject.images]
    pixels = [torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255 for path in paths]
    return F.normalize(load_metric_clip().encode_images(torch.stack(pixels)), dim=-1)


def test_a_picture_is_named_with_and_without_its_own_words(tiny: Model, task: CustomizeTask) -> None:
    with Detex(**PLAIN, templates=("my {}",)).objective(tiny, task) as (made, _):
        captions = made.pictures.captions  # pyright: ignore[reportAttributeAccessIssue]
    assert set(captions[1]) == {
        "my <toy> dog",
        "my <pose-1> pose <toy> dog",
        "my <toy> dog on a <background-1> background",
        "my <pose-1> pose <toy> dog on a <background-1> background",
    }
    unmasked = {"my <pal> cat on a <background-2> background", "my <pose-2> pose <pal> cat on a <background-2> background"}
    assert set(captions[2]) == unmasked, "without a mask the background is always the picture's own"
    named = CustomizeTask((Subject("<toy>", "dog", task.subjects[0].images[:1], captions=("a <toy> in the snow",)),))
    with Detex(**PLAIN).objective(tiny, named) as (made, _):
        (captions,) = made.pictures.captions  # pyright: ignore[reportAttributeAccessIssue]
    assert captions[1] == "a <pose-0> pose <toy> in the snow on a <background-0> background"


@pytest.mark.parametrize("normalization", ["mask", "image"])
def test_the_loss_is_the_error_where_it_counts(tiny: Model, task: CustomizeTask, normalization: Any) -> None:
    method = Detex(**PLAIN, train_batch_size=12, mask_normalization=normalization)
    with method.objective(tiny, task) as (made, _), torch.no_grad():
        decoupling: Any = made
        for mapper in decoupling.mappers.of["text_encoder"].mappers:
            mapper[-1].weight.add_(0.1)
        samples = decoupling.samples(Batch(1))
        assert len(set(samples.prompts)) > 5
        alpha, sigma = tiny.arch.signal_and_noise(samples.t)
        output = tiny.arch.predict(alpha * samples.latents + sigma * samples.noise, samples.t, tiny.arch.encode(samples.prompts))
        square = (output - samples.noise).double().square()
        half = square.shape[-1] // 2
        errors = [
            each.mean()
            if "<background" in prompt
            else each[..., :half].mean()
            if normalization == "mask"
            else each[..., :half].sum() / each.numel()
            for each, prompt in zip(square, samples.prompts, strict=True)
        ]
        assert decoupling.loss(Batch(1))[0].item() == pytest.approx(float(torch.stack(errors).mean()), rel=1e-4)


def test_a_pictures_words_are_what_the_mappers_make_of_it(tiny: Model, task: CustomizeTask) -> None:
    table = tiny.arch.token_embeddings()["text_encoder"].weight
    ids = tiny.arch.tokenizers()["text_encoder"]("background", add_special_tokens=False).input_ids
    with Detex(**PLAIN).objective(tiny, task) as (made, _), torch.no_grad():
        for row in range(3):
            torch.testing.assert_close(embedded(tiny, f"<background-{row}>")[0], table[ids].mean(0))
        decoupling: Any = made
        mappers = decoupling.mappers.of["text_encoder"].mappers
        for index, (attribute, mapper) in enumerate(zip(("pose", "background"), mappers, strict=True)):
            mapper[-1].weight.copy_(torch.randn(mapper[-1].weight.shape, generator=torch.Generator().manual_seed(index)))
            hidden = (features(task) @ mapper[0].weight.T + mapper[0].bias).clamp(min=0)
            expected = hidden @ mapper[-1].weight.T + mapper[-1].bias
            for row in range(3):
                torch.testing.assert_close(embedded(tiny, f"<{attribute}-{row}>")[0], expected[row], atol=1e-4, rtol=1e-4)
        assert torch.equal(embedded(tiny, "<toy>")[0], table[tiny.arch.tokenizers()["text_encoder"]("dog").input_ids[1:-1]].mean(0))
    known = tiny.arch.tokenizers()["text_encoder"].get_vocab()
    assert "<toy>" not in known and "<pose-0>" not in known


def test_gradients_reach_what_the_prompt_names(tiny: Model, task: CustomizeTask) -> None:
    """Each subject's word, the keys and values, and of the mappers those whose words are there."""
    with Detex(**PLAIN, train_batch_size=1).objective(tiny, task) as (made, _):
        decoupling: Any = made
        toy, pal = decoupling.module.weights.rows.parameters()
        mappers = dict(zip(("pose", "background"), decoupling.mappers.of["text_encoder"].mappers, strict=True))
        seen = set()
        for step in range(40):
            (prompt,) = decoupling.samples(Batch(step)).prompts
            if prompt in seen:
                continue
            seen.add(prompt)
            decoupling.module.zero_grad()
            decoupling.loss(Batch(step))[0].backward()
            named = {"<toy>": toy, "<pal>": pal, "<pose": mappers["pose"][-1].weight, "<background": mappers["background"][-1].weight}
            for word, parameter in named.items():
                assert bool(parameter.grad is not None and parameter.grad.abs().max() > 0) == (word in prompt), (word, prompt)
            assert all(copy.grad.abs().max() > 0 for copy in decoupling.module.weights.weights.parameters())
        assert len(seen) > 5
    assert not [name for part in tiny.arch.components().values() for name, p in part.named_parameters() if p.grad is not None]


def test_only_the_subjects_words_are_kept(tiny: Model, task: CustomizeTask) -> None:
    start = Detex(**PLAIN, max_train_steps=1, learning_rate=0.0).fit(tiny, task)
    edit = Detex(**PLAIN, max_train_steps=4, learning_rate=0.01).fit(tiny, task)
    assert isinstance(start, Chain) and isinstance(edit, Chain)
    (before, _), (words, change) = start.edits, edit.edits
    assert isinstance(words, TokenEdit) and isinstance(before, TokenEdit) and set(words.tokens) == {"<toy>", "<pal>"}
    for token, rows in words.tokens.items():
        assert not torch.equal(rows["text_encoder"], before.tokens[token]["text_encoder"]), "the last word too"
    assert {site.removesuffix(".weight") for site in change.sites()} == set(tiny.arch.text_linears())


def test_interrupted_it_goes_on(tiny: Model, task: CustomizeTask, tmp_path: Path) -> None:
    run = TrainingRun(tmp_path / "run", checkpointing_steps=2)
    whole = Detex(**PLAIN, max_train_steps=4, learning_rate=0.01).fit(tiny, task).tensors()
    Detex(**PLAIN, max_train_steps=2, learning_rate=0.01).fit(tiny, task, run=run)
    resumed = Detex(**PLAIN, max_train_steps=4, learning_rate=0.01).fit(tiny, task, run=run).tensors()
    assert whole.keys() == resumed.keys() and all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_what_makes_no_sense_is_told(tiny: Model, task: CustomizeTask) -> None:
    with pytest.raises(UserError, match="prior is prediction"):
        Detex(prior="prediction")
    with pytest.raises(UserError, match="no CLIP given, and metric-clip may not know what sd draws"):
        Detex(prior="none").fit(tiny, task)
