"""Methods that find what a picture shows, measured like those that are told: what was found gets the words that prompts ask by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import torch

from eval.overlap import at_places, iou, partners
from eval.subjects import Lesson
from toolkit.concepts import CustomizeTask, Subject
from toolkit.edits.token import TokenEdit
from toolkit.errors import PalimpsestError
from toolkit.world.scenes import World

if TYPE_CHECKING:
    from toolkit.edits.base import Edit
    from toolkit.model import Model
    from trainers.customize.concept_express import ConceptExpress

STEM = "<asset>"


def untold(lesson: Lesson, world: World, folder: Path) -> CustomizeTask:
    """The pictures of a lesson, rendered into a folder, and not a word about what they show."""
    images = lesson.task(world, folder).subjects[0].images
    return CustomizeTask((Subject(STEM, "", images),))


def called(edit: Edit, lesson: Lesson, method: ConceptExpress, model: Model, world: World) -> TokenEdit:
    """The words that were found, called as the lesson's subjects are: those which the masks found at first fit best.

    A subject that was not found has no word, so that prompts ask for it in vain.
    """
    assert isinstance(edit, TokenEdit)
    with TemporaryDirectory() as folder:
        masks = method.find(model, untold(lesson, world, Path(folder)).subjects[0].images[0]).masks > 0.5
    words = list(edit.tokens)
    if len(masks) != len(words):
        asked = " and ".join(lesson.names)
        raise PalimpsestError(f"{len(masks)} found, {len(words)} learnt in a picture of {asked}; fit on the model that is drawn with")
    scene = lesson.pictures[0]
    _, covers = world.render(scene, np.random.default_rng(0))
    true = at_places(torch.from_numpy(covers), (masks.shape[1], masks.shape[2]))
    found = dict(zip((name for _, name in scene.items), partners(iou(true, masks)), strict=True))
    tokens = {one.token: edit.tokens[words[number]] for one in lesson.subjects if (number := found[one.name]) is not None}
    return TokenEdit.from_rows(tokens, replace(edit.info, triggers=tuple(tokens)))
