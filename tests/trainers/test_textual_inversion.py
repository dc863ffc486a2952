"""Textual inversion: it learns, repeats itself, touches nothing but its words, and says what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from toolkit.arch.sd import SD
from toolkit.cli import main
from toolkit.concepts import Concept, CustomizeTask, EraseTask, Subject
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError
from toolkit.io.files import load_edit
from toolkit.model import Model
from toolkit.prompt_search import TokenRows
from toolkit.runs import seeded
from trainers.customize.textual_inversion import TEMPLATES, TextualInversion
from trainers.loop import Batch, LoopConfig, train
from trainers.subjects import Denoising, Photos, Prompts, captions_of, evenly

SITE = "text_encoder:<toy>"


def photo(folder: Path, name: str = "photo.png", colour: str = "red") -> Path:
    Image.new("RGB", (20, 20), colour).save(folder / name)
    return folder / name


def task(tmp_path: Path, **options: Any) -> CustomizeTask:
    images = tuple(photo(tmp_path, f"{colour}.png", colour) for colour in ("red", "green", "blue"))
    return CustomizeTask((Subject("<toy>", "cat", images, **options),))


def denoising(model: Model, rows: TokenRows, method: TextualInversion, *subjects: Subject) -> Denoising:
    pictures = Photos.of(model.arch, subjects, method, TEMPLATES["object"])
    return Denoising(rows, pictures, Prompts(model.arch, "no", grad=True), method)


def snapshot(model: Model) -> tuple[list[object], list[torch.Tensor]]:
    parts = model.arch.components().values()
    objects = [*model.arch.tokenizers().values(), *model.arch.token_embeddings().values()]
    return objects, [p.clone() for part in parts for p in part.state_dict().values()]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_on_a_fixed_batch_goes_down(tmp_path: Path, prediction: Any) -> None:
    model = Model(SD.tiny(prediction_type=prediction))
    method = TextualInversion(train_batch_size=8, num_vectors=2)
    with TokenRows(model, {"<toy>": "cat"}, vectors=2) as rows:
        objective = denoising(model, rows, method, *task(tmp_path).subjects)
        always = objective.loss
        objective.loss = lambda batch: always(Batch(0))  # the same pictures, noise and timesteps in every step
        losses = train(objective, LoopConfig(max_train_steps=60, learning_rate=0.05, lr_scheduler="constant"), in_place=True, quiet=True)
    assert losses[-1] < 0.996 * losses[0] and sorted(losses, reverse=True)[:3] == losses[:3]


def test_the_loss_is_the_denoisers_error(tiny: Model, tmp_path: Path) -> None:
    """Against the equation written out: one picture, one caption, the step's noise and timesteps."""
    method = TextualInversion(train_batch_size=2, timestep_sampling="uniform", seed=3)
    subject = Subject("<toy>", "cat", (photo(tmp_path),), captions=("a <toy> on red",))
    with TokenRows(tiny, {"<toy>": "cat"}, seed=3) as rows:
        objective = denoising(tiny, rows, method, subject)
        value = objective.loss(Batch(5))[0].item()
        draw = seeded("textual_inversion", 3, 5)
        torch.randperm(1, generator=draw)
        torch.randperm(1, generator=draw)
        torch.randint(1, (), generator=draw)
        torch.randint(1, (), generator=draw)
        z = torch.cat([objective.pictures.at(0, "", seeded("none")).latent] * 2)
        noise = torch.randn(z.shape, generator=draw)
        t = (torch.rand(2, generator=draw, dtype=torch.float64) * 1000).long()
        alpha = tiny.arch.signal_and_noise(t)[0].flatten()
        with torch.no_grad():
            text = tiny.arch.encode(["a <toy> on red"] * 2)
            noisy = alpha.view(-1, 1, 1, 1) * z + (1 - alpha**2).sqrt().view(-1, 1, 1, 1) * noise
            expected = (tiny.arch.predict(noisy, t, text) - noise).square().mean().item()
    assert value == pytest.approx(expected, rel=1e-5)


def test_it_gives_words_and_leaves_the_model(tiny: Model, tmp_path: Path) -> None:
    before = snapshot(tiny)
    method = TextualInversion(max_train_steps=3, num_vectors=2, learning_rate=0.01)
    first = task(tmp_path).subjects[0]
    edit = method.fit(tiny, CustomizeTask((first, Subject("<other>", "dog", (photo(tmp_path),)))))
    after = snapshot(tiny)
    assert all(a is b for a, b in zip(before[0], after[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True)) and tiny.edits == ()
    assert isinstance(edit, TokenEdit) and edit.sites() == [SITE, "text_encoder:<other>"]
    assert all(edit.delta(site).shape == (2, 32) for site in edit.sites())
    assert edit.info.triggers == ("<toy>", "<other>") and edit.info.method == "textual_inversion" and edit.info.base == tiny.fingerprint
    assert edit.info.notes["steps"] == 3 and edit.info.notes["seconds"] > 0 and set(edit.info.notes["loss"]) == {"first", "last"}
    start = TokenRows(tiny, {"<toy>": "cat", "<other>": "dog"}, vectors=2).edit()
    assert all((edit.delta(site) != start.delta(site)).any(1).all() for site in edit.sites()), "every row of every word is trained"


def test_the_seed_determines_the_words(tiny: Model, tmp_path: Path) -> None:
    def rows(**options: Any) -> torch.Tensor:
        return TextualInversion(max_train_steps=3, **options).fit(tiny, task(tmp_path)).delta(SITE)

    assert torch.equal(rows(seed=1), rows(seed=1)) and not torch.equal(rows(seed=1), rows(seed=2))
    assert not torch.equal(rows(), rows(initializer_token="dog")) and not torch.equal(rows(), rows(timestep_sampling="cubic"))
    torch.testing.assert_close(rows(), rows(mixed_precision="bf16"), atol=0.05, rtol=0)


def test_it_builds_on_the_attached_edits(tiny: Model, tmp_path: Path) -> None:
    hat = TokenEdit.from_rows({"<hat>": {"text_encoder": torch.randn(2, 32)}})
    subject = Subject("<toy>", "cat", (photo(tmp_path),), captions=("a <toy> with a <hat>",))
    with tiny.attached(hat):
        edit = TextualInversion(max_train_steps=2).fit(tiny, CustomizeTask((subject,)))
        assert [attached for attached, _ in tiny.edits] == [hat]
        tiny.attach(edit)
        tiny.arch.encode(["a <toy> with a <hat>"])
    assert edit.info.on == ("token",)


def test_prompts_are_the_captions_or_the_templates(tmp_path: Path, tiny: Model) -> None:
    image = photo(tmp_path)
    plain, described = Subject("<toy>", "cat", (image,)), Subject("<toy>", "cat", (image, image), captions=("<toy> red", "blue <toy>"))
    assert captions_of(described, ("a <toy>",)) == [("<toy> red",), ("blue <toy>",)]
    own = Photos.of(tiny.arch, (plain, described), TextualInversion(templates=("my {}",)), TEMPLATES["object"])
    assert own.captions == [("my <toy>",), ("<toy> red",), ("blue <toy>",)]
    objects, styles = (Photos.of(tiny.arch, (plain,), TextualInversion(), TEMPLATES[kind]).captions[0] for kind in ("object", "style"))
    assert all("<toy>" in prompt for prompt in (*objects, *styles)) and all("style of <toy>" in prompt for prompt in styles)


def test_masks_weigh_the_error(tiny: Model, tmp_path: Path) -> None:
    left = Image.new("L", (20, 20))
    left.paste(255, (0, 0, 10, 20))
    left.save(tmp_path / "mask.png")
    subject = Subject("<toy>", "cat", (photo(tmp_path),), masks=(tmp_path / "mask.png",))

    def weight(subject: Subject, **options: Any) -> torch.Tensor:
        return Photos.of(tiny.arch, (subject,), TextualInversion(**options), TEMPLATES["object"]).at(0, "", seeded("none")).weight

    half = torch.tensor([1.0] * 4 + [0.0] * 4).expand(1, 1, 8, 8)
    assert torch.equal(weight(subject), 2 * half) and torch.equal(weight(subject, mask_normalization="image"), half)
    assert torch.equal(weight(Subject("<toy>", "cat", subject.images)), torch.ones(1, 1, 8, 8))
    fit = TextualInversion(max_train_steps=2).fit
    masked, whole = fit(tiny, CustomizeTask((subject,))), fit(tiny, CustomizeTask((Subject("<toy>", "cat", subject.images),)))
    assert not torch.equal(masked.delta(SITE), whole.delta(SITE))
    with pytest.raises(UserError, match="no effect without masks"):
        TextualInversion(mask_normalization="image").fit(tiny, CustomizeTask((Subject("<toy>", "cat", subject.images),)))


def test_pictures_are_spread() -> None:
    draw = seeded("test")
    counts = torch.bincount(evenly(3, 8, draw), minlength=3)
    assert counts.sum() == 8 and counts.min() == 2 and counts.max() == 3 and len(set(evenly(5, 4, draw).tolist())) == 4


def test_the_command_line_learns_from_a_folder(tiny: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, model = tmp_path / "photos", tiny.save(tmp_path / "model")
    folder.mkdir()
    photo(folder)
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "photo.png", "text": "a <toy> on red"}))
    words = ["customize", "--method", "textual_inversion", "--token", "<toy>", "--class-name", "cat"]
    words += ["--model", str(model), "--images", str(folder), "--set", "max_train_steps=2", "num_vectors=2", "--export", "embedding"]
    assert main([*words, "--out", str(tmp_path / "out"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert load_edit(result["edit"]).delta(SITE).shape == (2, 32) and Path(result["export"][0]).is_file()
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "photo.png", "text": "a toy on red"}))
    assert main([*words, "--out", str(tmp_path / "other")]) == 2
    assert "does not contain <toy>" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_vectors": 0}, "num_vectors is 0"),
        ({"max_train_steps": 0}, "max_train_steps is 0"),
        ({"lr_warmup_steps": 5}, "no effect with lr_scheduler constant"),
        ({"templates": ("a photo",)}, "has no place for the word"),
    ],
)
def test_options_that_make_no_sense_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TextualInversion(**options)


def test_mistakes_in_the_task_are_told(tiny: Model, tmp_path: Path) -> None:
    fit = TextualInversion(max_train_steps=1).fit
    with pytest.raises(UserError, match="kind EraseTask, this method needs CustomizeTask"):
        fit(tiny, EraseTask((Concept("cat"),)))
    with pytest.raises(UserError, match=r"no picture file .*gone\.png"):
        fit(tiny, CustomizeTask((Subject("<toy>", "cat", (tmp_path / "gone.png",)),)))
    with pytest.raises(UserError, match="already a word"):
        fit(tiny, CustomizeTask((Subject("photo</w>", "cat", (photo(tmp_path),)),)))
    assert tiny.edits == ()
