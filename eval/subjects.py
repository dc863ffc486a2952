"""Personal subjects of the embedded world: pictures of objects that the model has never seen, composed like photos."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from toolkit.concepts import CustomizeTask, Subject
from toolkit.cut_outs import with_cut_outs
from toolkit.images import save_png
from toolkit.options import Configured, option
from toolkit.pictures import METADATA
from toolkit.runs import check_writable, write_atomic
from toolkit.world.captions import AT
from toolkit.world.scenes import Scene, World

PICTURES = (("blue", "center"), ("yellow", "center"), ("green", "left"), ("pink", "right"), ("gray", "center"))
SIDES = ("left", "right")


@dataclass(frozen=True)
class Given(Configured):
    """What a method that learns is given with the pictures, and what it is asked by."""

    captions: bool = option(True, "captions that say what else is in a picture")
    each: bool = option(False, "of a picture of several subjects also a caption of each of them alone")
    masks: bool = option(False, "for each picture and subject a mask, the true one")
    class_after: bool = option(False, "put the class name after the word, in captions and when it is asked")
    world: bool = option(False, "everything else that the embedded model draws, to be kept")
    cut_outs: int = option(0, "more pictures, of the subjects cut out by their true masks")

    def __repr__(self) -> str:
        """What is not as usual: results are named by this, and a new option leaves the names of others' as they are."""
        return f"Given({', '.join(f'{name}={getattr(self, name)!r}' for name in self.changed())})"


@dataclass(frozen=True)
class Portrait:
    """A subject to learn: the object, the word for what it is nearest to among what the model knows, its token."""

    name: str
    class_name: str
    token: str


@dataclass(frozen=True)
class Lesson:
    """Subjects to learn, and their pictures, each of which shows all of them. told: whether captions say the background."""

    subjects: tuple[Portrait, ...]
    pictures: tuple[Scene, ...]
    told: bool = True
    given: Given = Given()

    @property
    def kind(self) -> str:
        """subjects, pairs or entangled."""
        return "pairs" if len(self.subjects) > 1 else "subjects" if self.told else "entangled"

    @property
    def names(self) -> tuple[str, ...]:
        """The objects."""
        return tuple(portrait.name for portrait in self.subjects)

    @property
    def words(self) -> tuple[str, ...]:
        """What they are asked by."""
        return tuple(f"{one.token} {one.class_name}" if self.given.class_after else one.token for one in self.subjects)

    def caption(self, scene: Scene, only: str | None = None) -> str:
        """What is said of a picture, or of one object in it: no place when it is the middle."""
        items = [(place, name) for place, name in scene.items if only in (None, name)]
        at = [f" {AT[place][0]}" if place != "center" else "" for place, _ in items]
        called = dict(zip(self.names, self.words, strict=True))
        parts = [f"a {called[name]}{where}" for (_, name), where in zip(items, at, strict=True)]
        return " and ".join(parts) + (f" on a {scene.background} background" if self.told else "")

    def task(self, world: World, folder: Path) -> CustomizeTask:
        """Render the pictures into a folder.

        The captions are also in the folder's metadata.jsonl, so that `palimpsest customize --images` trains on the same.
        """
        check_writable(folder)
        images: list[Path] = []
        masks: dict[str, list[Path]] = {name: [] for name in self.names}
        for index, scene in enumerate(self.pictures):
            pixels, covers = world.render(scene, np.random.default_rng(index))
            images.append(save_png(Image.fromarray(pixels), folder / f"{index}.png"))
            for (_, name), cover in zip(scene.items, covers, strict=True) if self.given.masks or self.given.cut_outs else ():
                masks[name].append(save_png(Image.fromarray(cover), check_writable(folder / "masks" / name) / f"{index}.png"))
        captions = tuple(map(self.caption, self.pictures)) if self.given.captions else ()
        rows = [{"file_name": image.name, "text": text} for image, text in zip(images, captions, strict=False)]
        if rows:
            write_atomic(folder / METADATA, "".join(json.dumps(row) + "\n" for row in rows))
        task = CustomizeTask(tuple(self._subject(one, tuple(images), tuple(masks[one.name]), captions) for one in self.subjects))
        if not self.given.cut_outs:
            return task
        colours, given = [background for background, _ in PICTURES], self.given
        task = with_cut_outs(task, folder / "cut-outs", given.cut_outs, backgrounds=colours, class_after=given.class_after, each=given.each)
        return task if self.given.masks else CustomizeTask(tuple(replace(one, masks=()) for one in task.subjects))

    def _subject(self, one: Portrait, images: tuple[Path, ...], masks: tuple[Path, ...], captions: tuple[str, ...]) -> Subject:
        """One of them; with captions of it alone every picture is there twice."""
        if self.given.each and captions and len(self.subjects) > 1:
            images, masks = 2 * images, 2 * masks
            captions = (*(self.caption(scene, one.name) for scene in self.pictures), *captions)
        return Subject(one.token, one.class_name, images, masks, captions)


def subject(world: World, folder: Path, name: str, class_name: str, token: str, style: str) -> Subject:
    """A subject by itself, with its pictures rendered into a folder."""
    return alone(Portrait(name, class_name, token), style).task(world, folder).subjects[0]


def alone(portrait: Portrait, style: str) -> Lesson:
    """A subject by itself: `PICTURES` (background, place) in one style."""
    return Lesson((portrait,), tuple(Scene(background, style, ((place, portrait.name),)) for background, place in PICTURES))


def entangled(portrait: Portrait, style: str, background: str) -> Lesson:
    """A subject by itself at the places of `PICTURES`, always on one background, which no caption says."""
    scenes = tuple(Scene(background, style, ((place, portrait.name),)) for _, place in PICTURES)
    return Lesson((portrait,), scenes, told=False)


def side_by_side(pair: Sequence[Portrait], style: str, first: int, count: int) -> Lesson:
    """Two subjects in so many pictures, the sides in turn, on the backgrounds of `PICTURES` from this number on."""
    names = [portrait.name for portrait in pair]
    scenes = [
        Scene(PICTURES[(first + i) % len(PICTURES)][0], style, tuple(zip(SIDES, names if i % 2 == 0 else names[::-1], strict=True)))
        for i in range(count)
    ]
    return Lesson(tuple(pair), tuple(scenes))
