"""Subjects that are cut out of their pictures and put elsewhere."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from toolkit.arch.sd import SD
from toolkit.cli import main
from toolkit.concepts import CustomizeTask, Subject
from toolkit.cut_outs import LARGEST, with_cut_outs
from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.pictures import captioned, masks_of, pictures
from toolkit.world.scenes import BACKGROUNDS

RED, GREEN = (200, 10, 20), (10, 150, 30)
BOXES = {"<toy>": (10, 40, 29, 69), "<pal>": (60, 20, 89, 39)}  # in a picture of 100 x 120; the first is 20 wide and 30 high


@pytest.fixture
def task(tmp_path: Path) -> CustomizeTask:
    """Two plain shapes in one picture, a mask of each."""
    picture = Image.new("RGB", (100, 120), "white")
    for box, colour in zip(BOXES.values(), (RED, GREEN), strict=True):
        ImageDraw.Draw(picture).rectangle(box, colour)
    picture.save(tmp_path / "scene.png")
    subjects = []
    for token, box in BOXES.items():
        mask = Image.new("L", picture.size)
        ImageDraw.Draw(mask).rectangle(box, 255)
        mask.save(tmp_path / f"{token}.png")
        subjects.append(Subject(token, "thing", (tmp_path / "scene.png",), (tmp_path / f"{token}.png",)))
    return CustomizeTask(tuple(subjects))


def test_every_pixel_is_the_subjects_or_the_backgrounds(task: CustomizeTask, tmp_path: Path) -> None:
    made = with_cut_outs(task, tmp_path / "out", 12)
    for subject, colour, count in zip(made.subjects, (RED, GREEN), (20 * 30, 30 * 20), strict=True):
        for image, mask, caption in list(zip(subject.images, subject.masks, subject.captions, strict=True))[2:]:
            pixels, inside = np.asarray(Image.open(image)), np.asarray(Image.open(mask)) > 127
            assert pixels.shape == (100, 100, 3) and inside.sum() == count, "as large and as sharp as it was"
            assert (pixels[inside] == colour).all()
            rows, columns = inside.nonzero()
            said = caption.split(subject.token)[1].split(" and ")[0]
            assert ("left" in said, "right" in said) == (columns.mean() < 50, columns.mean() > 50)
            assert ("top" in said, "bottom" in said) == (rows.mean() < 40, rows.mean() > 60)
            background = caption.split(" on a ")[-1].removesuffix(" background")
            assert tuple(pixels[0, 0]) == BACKGROUNDS[background]
            seen = {tuple(pixel) for pixel in pixels.reshape(-1, 3)}
            alone = image not in {picture for other in made.subjects if other is not subject for picture in other.images}
            assert seen == {BACKGROUNDS[background], colour} if alone else seen == {BACKGROUNDS[background], RED, GREEN}


def test_all_arrangements_take_turns(task: CustomizeTask, tmp_path: Path) -> None:
    made = with_cut_outs(task, tmp_path / "out", 8, backgrounds=("red", "blue"), class_after=True)
    toy, pal = made.subjects
    together = set(toy.images) & set(pal.images)
    assert {path.name for path in together} == {"scene.png", "0.png", "2.png", "4.png", "6.png"}
    texts = [text for text in toy.captions if text.startswith("a <")]
    assert Counter(text.rpartition(" on a ")[2] for text in dict.fromkeys(texts)).keys() == {"red background", "blue background"}
    both = [text.rpartition(" on a ")[0] for text in texts if "<pal>" in text]
    assert Counter(both) == {
        "a <toy> thing on the left and a <pal> thing on the right": 2,
        "a <pal> thing on the left and a <toy> thing on the right": 2,
    }
    assert len(texts) == 4 + 2 * 4 - (4 - 2), "four of both, each said alone too, and two of it by itself"
    assert toy.captions[:2] == ("a photo of <toy> thing", "a photo of <toy> thing and <pal> thing")


def test_captions_of_one_alone_are_left_out_on_demand(task: CustomizeTask, tmp_path: Path) -> None:
    toy = with_cut_outs(task, tmp_path / "out", 4, each=False).subjects[0]
    assert len(set(toy.images)) == len(toy.images) and toy.captions[0] == "a photo of <toy> and <pal>"
    assert all(
        ("<pal>" in text) == (path in with_cut_outs(task, tmp_path / "out", 4).subjects[1].images)
        for path, text in zip(toy.images, toy.captions, strict=True)
    )


def test_the_folder_says_what_is_in_it(task: CustomizeTask, tmp_path: Path) -> None:
    made = with_cut_outs(task, tmp_path / "out", 6)
    for subject in made.subjects:
        shown = [path for path in pictures(tmp_path / "out") if path in subject.images]
        images, captions = captioned(shown, tmp_path / "out", subject.token)
        masks = masks_of(images, tmp_path / "out" / "masks" / subject.token.strip("<>"))
        assert set(zip(images, masks, captions, strict=True)) == set(
            zip(subject.images[2:], subject.masks[2:], subject.captions[2:], strict=True)
        )


def test_the_seed_decides(task: CustomizeTask, tmp_path: Path) -> None:
    captions = [
        [subject.captions for subject in with_cut_outs(task, tmp_path / f"{i}", 6, seed=seed).subjects] for i, seed in enumerate((0, 0, 1))
    ]
    assert captions[0] == captions[1] != captions[2]


def test_what_is_large_is_made_smaller(task: CustomizeTask, tmp_path: Path) -> None:
    Image.new("L", (100, 120), 255).save(tmp_path / "all.png")
    whole = Subject("<toy>", "thing", task.subjects[0].images, (tmp_path / "all.png",), ("the <toy>",))
    (made,) = with_cut_outs(CustomizeTask((whole,)), tmp_path / "out", 2).subjects
    assert made.captions[0] == "the <toy>" and len(made.captions) == 3
    inside = np.asarray(Image.open(made.masks[1])) > 127
    assert inside.any(1).sum() == pytest.approx(LARGEST * len(inside), abs=1) and inside.any(0).sum() == pytest.approx(
        inside.any(1).sum() * 100 / 120, abs=1
    )


@pytest.mark.parametrize(("method", "said", "count"), [("disendiff", "<toy> thing", 1 + 2 + 1), ("attencraft", "<toy>", 2 + 2 * 2 + 1)])
def test_customize_trains_on_them(method: str, said: str, count: int, task: CustomizeTask, tmp_path: Path) -> None:
    """With four, of which two show both and one shows the toy alone; a method that learns each where its mask is has captions of each."""
    model = Model(SD.tiny()).save(tmp_path / "model")
    scene, words = str(tmp_path / "scene"), ["--method", method, "--model", str(model), "--token", *BOXES, "--class-name", "thing", "stuff"]
    masks = [tmp_path / "masks" / str(i) for i in range(2)]
    for subject, mask in zip(task.subjects, masks, strict=True):
        for source, folder in ((subject.images[0], Path(scene)), (subject.masks[0], mask)):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "0.png").write_bytes(source.read_bytes())
    quick = ["--set", "max_train_steps=1", "train_batch_size=1", "prior=none"]
    given = ["--images", scene, scene, "--masks", *map(str, masks), "--cut-outs", "4", "--out", str(tmp_path / "out")]
    assert main(["customize", *words, *given, *quick]) == 0
    toy = json.loads((tmp_path / "out" / "config.json").read_text())["task"]["subjects"][0]
    assert len(toy["images"]) == count and all(said in caption for caption in toy["captions"])


def test_what_cannot_be_cut_out_is_an_error(task: CustomizeTask, tmp_path: Path) -> None:
    toy, out = task.subjects[0], tmp_path / "out"
    with pytest.raises(UserError, match="no masks given for <toy>"):
        with_cut_outs(CustomizeTask((Subject("<toy>", "thing", toy.images),)), out, 2)
    with pytest.raises(UserError, match="0 cut-outs asked for"):
        with_cut_outs(task, out, 0)
    assert not out.exists()
    for size, message in (((100, 120), "is black everywhere"), ((50, 50), "is 50x50, its picture")):
        Image.new("L", size).save(tmp_path / "mask.png")
        with pytest.raises(UserError, match=message):
            with_cut_outs(CustomizeTask((Subject("<toy>", "thing", toy.images, (tmp_path / "mask.png",)),)), out, 2)
