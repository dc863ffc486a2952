"""mcpl: the attention mask and the contrast against the equations, what they train, whose captions and masks count, and what is told."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from toolkit.attention import attention_maps, token_mask
from toolkit.concepts import CustomizeTask, Subject
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.prompt_search import TokenRows
from toolkit.runs import TrainingRun
from trainers.customize.mcpl import MCPL, TEMPLATES, attended, contrast, together
from trainers.loop import Batch
from trainers.scenes import Scenes

BOTH = "a red <a> on the left and a <b> on the right"
TURNED = "my <b> beside a red <a>"


def scene(folder: Path, name: str = "scene.png", colour: str = "red") -> tuple[Path, ...]:
    Image.new("RGB", (16, 16), colour).save(folder / name)
    return (folder / name,)


def half(folder: Path, name: str, box: tuple[int, int, int, int]) -> tuple[Path, ...]:
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, box)
    mask.save(folder / name)
    return (folder / name,)


@pytest.fixture
def task(tmp_path: Path) -> CustomizeTask:
    """Two subjects in two pictures, which have captions."""
    images, captions = (*scene(tmp_path), *scene(tmp_path, "other.png", "blue")), (BOTH, TURNED)
    return CustomizeTask((Subject("<a>", "dog", images, captions=captions), Subject("<b>", "cat", images, captions=captions)))


@pytest.fixture
def sharp(tiny: Model) -> Model:
    """One whose cross-attention differs from place to place, which that of an untrained model hardly does."""
    for attention in tiny.arch.cross_attention_sites().values():
        layer: Any = attention
        layer.to_q.weight.mul_(60)
    return tiny


def nce(rows: list[torch.Tensor], words: list[str], temperature: float) -> float:
    """One anchor and one positive after the other."""
    rows = [row.double() / row.double().norm() for row in rows]
    losses = []
    for i, word in enumerate(words):
        positives = [j for j, other in enumerate(words) if other == word and j != i] or [i]
        negatives = torch.stack([(rows[i] @ rows[j] / temperature).exp() for j, other in enumerate(words) if other != word]).sum()
        near = [(rows[i] @ rows[j] / temperature).exp() for j in positives]
        losses.append(sum(float(-(one / (one + negatives)).log()) for one in near) / len(near))
    return sum(losses) / len(losses)


def test_the_loss_is_the_masked_error_and_the_contrast(sharp: Model, task: CustomizeTask) -> None:
    """Against the equations, for one prediction: two pictures with their captions, one of two words bound to an adjective."""
    arch = sharp.arch
    method = MCPL(adjectives=("red", ""), mask_normalization="image", contrast_weight=0.2, num_vectors=2)
    with method.objective(sharp, task) as (made, _):
        discovering: Any = made
        value, shown = discovering.loss(Batch(1))
        samples = discovering.samples(Batch(1))
        assert set(samples.prompts) == {BOTH, TURNED}
        alpha, sigma = arch.signal_and_noise(samples.t)
        with torch.no_grad(), attention_maps(arch) as maps:
            output = arch.predict(alpha * samples.latents + sigma * samples.noise, samples.t, arch.encode(samples.prompts))
        finest = max(maps.probabilities(site).shape[2] for site in maps.sites)
        sites = [site for site in maps.sites if maps.probabilities(site).shape[2] == finest]
        errors, sizes = [], []
        for row, prompt in enumerate(samples.prompts):
            seen = torch.stack([maps.probabilities(site)[row].mean(0) for site in sites]).mean(0)
            of = [seen[:, token_mask(arch, [prompt], [word])[0]].sum(-1).view(int(finest**0.5), -1) for word in ("<a>", "<b>")]
            union = torch.zeros_like(of[0])
            for one in of:
                strength = one * one / (of[0] + of[1])
                union[strength > 0.3 * strength.max()] = 1
            mask = torch.nn.functional.interpolate(union[None, None], samples.latents.shape[2:])[0]
            sizes.append(float(mask.mean()))
            errors.append(float((mask * (output[row] - samples.noise[row]) ** 2).mean()))
        assert all(0.02 < size < 0.98 for size in sizes)
        rows, words = [], []
        for prompt in (BOTH, TURNED):
            hidden = arch.encode([prompt]).hidden[0]
            both = token_mask(arch, [prompt], ["red <a>"])[0]
            a, b = (token_mask(arch, [prompt], [word])[0] for word in ("<a>", "<b>"))
            assert a.sum() == b.sum() == 2
            rows += [hidden[a].mean(0), hidden[both & ~a].mean(0), hidden[b].mean(0)]
            words += ["a", "a", "b"]
    assert shown["contrast"] == pytest.approx(nce(rows, words, 0.3), rel=1e-4)
    assert value.item() == pytest.approx(sum(errors) / len(errors) + 0.2 * shown["contrast"], rel=1e-4)


def test_places_are_a_words_where_it_is_attended_to_and_the_others_less() -> None:
    looked = torch.tensor([[[0.9, 0.5], [0.5, 0.0]], [[0.1, 0.5], [0.1, 0.2]]])
    assert attended(looked, 0.3).tolist() == [[[1, 1], [1, 0]], [[0, 1], [0, 1]]]
    assert attended(looked, 0.6).tolist() == [[[1, 0], [0, 0]], [[0, 1], [0, 1]]]
    assert attended(torch.tensor([[[0.4, 0.1]]]), 0.3).tolist() == [[[1, 0]]], "one word has all of the share"


def test_contrast_of_words() -> None:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 8, generator=draw)
    for words in ([0, 0, 1, 1, 0], [0, 1, 1, 1, 2]):
        expected = nce(list(rows), [str(word) for word in words], 0.2)
        assert contrast(rows, torch.tensor(words), 0.2).item() == pytest.approx(expected, rel=1e-5)
    alone = rows.clone().requires_grad_()
    value = contrast(alone, torch.zeros(5, dtype=torch.long), 0.2)
    value.backward()
    assert value.item() == 0 and not alone.grad.any(), "where no other word is, nothing is told apart"  # type: ignore[union-attr]


def test_contrast_reaches_every_vector_and_sets_words_apart(tiny: Model, task: CustomizeTask) -> None:
    with MCPL(num_vectors=2).objective(tiny, task) as (made, _):
        discovering: Any = made
        first = discovering.alike(Batch(0))
        first.backward()
        rows = list(discovering.module.parameters())
        assert len(rows) == 2 and all(row.grad.abs().sum(1).min() > 0 for row in rows)
        optimizer = torch.optim.Adam(rows, lr=0.05)
        for _ in range(20):
            optimizer.zero_grad()
            discovering.alike(Batch(0)).backward()
            optimizer.step()
        assert discovering.alike(Batch(0)) < 0.9 * first


def test_parts_of_a_batch_are_the_batch(tiny: Model, tmp_path: Path) -> None:
    images = tuple(path for i in range(4) for path in scene(tmp_path, f"{i}.png", ("red", "green", "blue", "gray")[i]))
    captions = ("a <a> and a <b>", "<b> left of <a>", "only <a> on gray", "a photo of <b>")
    first = Subject("<a>", "dog", images[:3], captions=captions[:3])
    task = CustomizeTask((first, Subject("<b>", "cat", (*images[:2], images[3]), captions=(*captions[:2], captions[3]))))
    values: list[list[torch.Tensor]] = []
    for size, parts in ((4, 1), (2, 2)):
        with MCPL(train_batch_size=size, contrast_weight=1.0).objective(tiny, task) as (made, _):
            for part in range(parts):
                (made.loss(Batch(3, part, parts))[0] / parts).backward()
            values.append([row.grad.clone() for row in made.module.parameters() if row.grad is not None])
    assert len(values[0]) == 2
    for whole, part in zip(*values, strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-7)


def test_masks_of_the_users_take_the_place_of_attention(sharp: Model, tmp_path: Path) -> None:
    one, left, right = scene(tmp_path), half(tmp_path, "left.png", (0, 0, 8, 16)), half(tmp_path, "right.png", (8, 0, 16, 8))

    def weights(*masks: tuple[Path, ...], **options: Any) -> torch.Tensor:
        """What the error counts, after one prediction."""
        task = CustomizeTask(tuple(Subject(token, "dog", one, mask) for token, mask in zip(("<a>", "<b>"), masks, strict=True)))
        counted: list[torch.Tensor] = []
        with MCPL(**{"mask_normalization": "image", **options}).objective(sharp, task) as (made, _):
            discovering: Any = made
            masked, samples = discovering.masked, discovering.samples(Batch(0))
            discovering.masked = lambda *given: counted.append(masked(*given)) or counted[-1]
            discovering.loss_of(samples, Batch(0))
            assert discovering.maps is None, "maps hold the graph"
        return (counted or [samples.weights])[0]

    places = torch.zeros(8, 8)
    places[:, :4], places[:4, 4:] = 1, 1
    assert torch.equal(weights(left, right), places.expand(4, 1, 8, 8))
    partly, none = weights(left, ()), weights((), ())
    assert (partly[:, :, :, :4] == 1).all() and torch.equal(partly[:, :, :, 4:].unique(), torch.tensor([0.0, 1.0]))
    assert (none[:, :, :, :4] == 0).any() and set(none.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(weights((), (), mask_normalization="mask"), none / none.mean((2, 3), keepdim=True))
    assert torch.equal(weights((), left, attention_mask=False)[0, 0], torch.tensor([1.0] * 4 + [0.0] * 4).expand(8, 8))


def test_it_learns_words_alone_and_goes_on_where_it_was(tiny: Model, task: CustomizeTask, tmp_path: Path) -> None:
    before = {f"{part}.{name}": p.clone() for part, module in tiny.arch.components().items() for name, p in module.named_parameters()}
    options: dict[str, Any] = {"num_vectors": 2, "learning_rate": 0.01, "adjectives": ("red", ""), "train_batch_size": 2}
    edit = MCPL(**options, max_train_steps=4).fit(tiny, task)
    assert isinstance(edit, TokenEdit) and edit.info.triggers == ("<a>", "<b>")
    after = {f"{part}.{name}": p for part, module in tiny.arch.components().items() for name, p in module.named_parameters()}
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    start = TokenRows(tiny, {"<a>": "dog", "<b>": "cat"}, vectors=2).edit()
    assert all((edit.delta(site) != start.delta(site)).any(1).all() for site in edit.sites()), "every vector of both is trained"
    run = TrainingRun(tmp_path / "run", checkpointing_steps=2)
    MCPL(**options, max_train_steps=2).fit(tiny, task, run=run)
    resumed = MCPL(**options, max_train_steps=4).fit(tiny, task, run=run)
    assert resumed.info.notes["steps"] == 4 and all(torch.equal(resumed.delta(site), edit.delta(site)) for site in edit.sites())


def test_prompts_are_the_captions_or_all_templates(tiny: Model, task: CustomizeTask, tmp_path: Path) -> None:
    third = scene(tmp_path, "third.png")
    a, b = task.subjects
    with MCPL(adjectives=("red", "")).objective(tiny, CustomizeTask((a, b))) as (made, _):
        discovering: Any = made
        assert discovering.pictures.captions == [(BOTH,), (TURNED,)]
        assert [[one.token for one in named] for named in discovering.pictures.asked.values()] == [["<a>", "<b>"], ["<b>", "<a>"]]
    plain = CustomizeTask((Subject("<a>", "dog", third), Subject("<b>", "cat", third)))
    with MCPL(adjectives=("red", "")).objective(tiny, plain) as (made, _):
        discovering: Any = made
        assert discovering.pictures.captions == [tuple(one.format("a red <a> and a <b>") for one in TEMPLATES)]
    own = CustomizeTask((Subject("<a>", "dog", third, captions=("just <a>",)), Subject("<b>", "cat", third, captions=("a <b>",))))
    pictures = Scenes(tiny.arch, own.subjects, MCPL(), TEMPLATES, together)
    assert pictures.captions == [("just <a>", "a <b>")] and pictures.asked["a <b>"] == own.subjects[1:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_threshold": 1.0}, "no place passes it"),
        ({"contrast_temperature": 0.0}, "contrast_temperature is 0"),
        ({"num_vectors": 0}, "num_vectors is 0"),
        ({"attention_mask": False, "mask_threshold": 0.5}, "mask_threshold given with attention_mask false"),
        ({"contrast_weight": 0.0, "adjectives": ("red", "blue")}, "adjectives given with contrast_weight 0"),
    ],
)
def test_options_that_make_no_sense_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MCPL(**options)


def test_mistakes_in_the_task_are_told(tiny: Model, task: CustomizeTask, tmp_path: Path) -> None:
    def told(message: str, *subjects: Subject, **options: Any) -> None:
        with pytest.raises(UserError, match=message):
            MCPL(max_train_steps=1, **options).fit(tiny, CustomizeTask(subjects))

    a, b = task.subjects
    told("3 adjectives for 2 subjects", a, b, adjectives=("red", "", ""))
    told("the adjectives red, red are not distinct", a, b, adjectives=("red", "red"))
    told("does not say 'old <b>'", a, b, adjectives=("red", "old"))
    told("contrast_temperature has no effect with one subject", Subject("<a>", "dog", a.images), contrast_temperature=0.1)
    everywhere = half(tmp_path, "mask.png", (0, 0, 16, 16)) * 2
    told("mask_threshold has no effect with masks for all", Subject("<a>", "dog", a.images, everywhere), mask_threshold=0.5)
    told("mask_normalization image has no effect", a, b, mask_normalization="image", attention_mask=False)
    told(r"no caption of .*scene.png names <b>", Subject("<a>", "dog", a.images[:1], captions=("my <a>",)), Subject("<b>", "cat", a.images))
    told(r"names <b>, which is not given this picture", a, Subject("<b>", "cat", scene(tmp_path, "third.png")))
    assert tiny.edits == ()
