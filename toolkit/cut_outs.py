"""More pictures out of a few: subjects are cut out by their masks and put elsewhere, on plain backgrounds.

From one picture a model learns a subject as a difference to that picture's background, and two subjects in it as one pattern.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps

from toolkit.concepts import CustomizeTask, Subject, named
from toolkit.errors import UserError
from toolkit.images import save_png
from toolkit.pictures import METADATA, open_mask, open_photo
from toolkit.runs import check_writable, write_atomic
from toolkit.world.scenes import BACKGROUNDS

CENTRES = {
    "on the left": (1 / 4, 1 / 2),
    "on the right": (3 / 4, 1 / 2),
    "in the top left": (1 / 4, 1 / 4),
    "in the top right": (3 / 4, 1 / 4),
    "in the bottom left": (1 / 4, 3 / 4),
    "in the bottom right": (3 / 4, 3 / 4),
}
T = TypeVar("T")
SIDES, CORNERS = tuple(CENTRES)[:2], tuple(CENTRES)[2:]
LARGEST = 7 / 16  # of a picture's side, so that four have room


class Row(NamedTuple):
    """A picture of a subject, its mask, and what is said of it."""

    image: Path
    mask: Path
    caption: str


def with_cut_outs(
    task: CustomizeTask,
    folder: Path,
    count: int,
    *,
    backgrounds: Sequence[str] = tuple(BACKGROUNDS),
    class_after: bool = False,
    each: bool = True,
    seed: int = 0,
) -> CustomizeTask:
    """The task with `count` more pictures, squares that are written into a folder with their masks and a metadata.jsonl.

    Of several subjects every other picture shows all of them (of more than four, some four), the rest one each in turn. Where, on which of
    `backgrounds` (names of `BACKGROUNDS`) and out of which picture the seed decides; a cut-out is at most `LARGEST` of the side.
    Captions say every subject's word, with `class_after` and its class name, its place and the background; with `each` a picture of
    several has one of each subject alone besides, which is for methods that learn a subject where its mask is. Pictures of the task
    without captions get such captions of "a photo of". No masks is a UserError.
    """
    if count < 1:
        raise UserError(f"{count} cut-outs asked for, needs at least 1; give such a number")
    for subject in task.subjects:
        if not subject.masks:
            raise UserError(f"no masks given for {subject.token}, by which it is to be cut out; give one for each image, or no cut-outs")
    words = {subject: named(subject) if class_after else subject.token for subject in task.subjects}
    rows = {subject: _given(subject, words, each) for subject in task.subjects}
    folders = {subject: check_writable(folder / "masks" / subject.token.strip("<>")) for subject in task.subjects}
    rng, cut = np.random.default_rng(seed), cache(_cut)
    colours, arrangements = _shuffled(rng, backgrounds), _arranged(rng, task.subjects)
    said: dict[tuple[str, str], None] = {}
    for number in range(count):
        shown, background, image = next(arrangements), next(colours), folder / f"{number}.png"
        cuts = {place: cut(subject, int(rng.integers(len(subject.images)))) for subject, place in shown.items()}
        parts = {subject: f"a {words[subject]} {place}" for subject, place in shown.items()}
        for (subject, alone), mask in zip(parts.items(), _compose(cuts, background, image), strict=True):
            path = save_png(mask, folders[subject] / image.name)
            for text in _distinct(alone, " and ".join(parts.values()), each):
                rows[subject].append(Row(image, path, f"{text} on a {background} background"))
                said[image.name, rows[subject][-1].caption] = None
    write_atomic(folder / METADATA, "".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in said))
    return CustomizeTask(tuple(_taught(subject, own) for subject, own in rows.items()))


def _given(subject: Subject, words: Mapping[Subject, str], each: bool) -> list[Row]:
    """A subject's own pictures. Those without captions are said to be photos of it, and of it with the others that are in them."""
    if subject.captions:
        return [Row(*row) for row in zip(subject.images, subject.masks, subject.captions, strict=True)]
    rows: list[Row] = []
    for image, mask in zip(subject.images, subject.masks, strict=True):
        together = " and ".join(word for one, word in words.items() if image in one.images)
        rows += [Row(image, mask, f"a photo of {text}") for text in _distinct(words[subject], together, each)]
    return rows


def _distinct(alone: str, together: str, each: bool) -> list[str]:
    """What is said of a picture: of all subjects in it, and of one alone first, where that is asked for and not the same."""
    return list(dict.fromkeys((alone, together))) if each else [together]


def _taught(subject: Subject, rows: Sequence[Row]) -> Subject:
    images, masks, captions = zip(*rows, strict=True)
    return Subject(subject.token, subject.class_name, images, masks, captions)


def _arranged(rng: np.random.Generator, subjects: Sequence[Subject]) -> Iterator[Mapping[Subject, str]]:
    """Who is in a picture, and where; the first place first."""
    orders = _shuffled(rng, list(permutations(subjects, min(len(subjects), len(CORNERS)))))
    alone, places = _shuffled(rng, subjects), _shuffled(rng, list(CENTRES))
    while True:
        if len(subjects) > 1:
            shown = next(orders)
            yield dict(zip(shown, SIDES if len(shown) <= len(SIDES) else CORNERS, strict=False))
        yield {next(alone): next(places)}


def _cut(subject: Subject, number: int) -> tuple[Image.Image, float]:
    """A subject out of one of its pictures, by number: RGBA, as large as its mask; and how large that is in parts of the picture's
    smaller side."""
    picture = open_photo(subject.images[number])
    mask = open_mask(subject.masks[number], subject.images[number], picture.size)
    box = mask.point([0] * 128 + [255] * 128).getbbox()
    if box is None:
        raise UserError(f"mask {subject.masks[number]} is black everywhere; paint the subject white")
    picture.putalpha(mask)
    cut = picture.crop(box)
    return cut, max(cut.size) / min(picture.size)


def _compose(shown: Mapping[str, tuple[Image.Image, float]], background: str, path: Path) -> list[Image.Image]:
    """Write the picture of what is at each place, as large as the largest cut-out needs to stay as sharp as it was; a mask for each."""
    side = max(round(max(cut.size) / part) for cut, part in shown.values())
    canvas, masks = Image.new("RGB", (side, side), BACKGROUNDS[background]), []
    for place, (cut, part) in shown.items():
        times = side * min(part, LARGEST) / max(cut.size)
        sized = cut if round(times, 3) == 1 else ImageOps.scale(cut, times, Image.Resampling.LANCZOS)
        x, y = CENTRES[place]
        corner = round(side * x - sized.width / 2), round(side * y - sized.height / 2)
        canvas.paste(sized, corner, sized)
        masks.append(Image.new("L", canvas.size))
        masks[-1].paste(sized.getchannel("A"), corner)
    save_png(canvas, path)
    return masks


def _shuffled(rng: np.random.Generator, some: Sequence[T]) -> Iterator[T]:
    """Each of them once in a drawn order, then again."""
    while True:
        for index in rng.permutation(len(some)):
            yield some[index]
