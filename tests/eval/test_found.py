"""What a method finds by itself, called by the words that an experiment asks by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.found import STEM, called, untold
from eval.subjects import Lesson, Portrait, side_by_side
from toolkit.edits.token import TokenEdit
from toolkit.errors import PalimpsestError
from toolkit.model import Model
from toolkit.world.scenes import World
from trainers.customize.concept_express import ConceptExpress
from trainers.found_concepts import Found

PAIR = (Portrait("penguin", "bird", "<pal>"), Portrait("umbrella", "parachute", "<toy>"))


@pytest.fixture
def lesson() -> Lesson:
    return side_by_side(PAIR, "twemoji", 0, 1)


def finds(monkeypatch: pytest.MonkeyPatch, world: World, lesson: Lesson, names: Sequence[str]) -> TokenEdit:
    """An edit with a word for each of these objects in their order, whose masks are found so; "" is a mask of nothing that is there."""
    scene = lesson.pictures[0]
    _, covers = world.render(scene, np.random.default_rng(0))
    true = {name: torch.from_numpy(cover).float() for (_, name), cover in zip(scene.items, covers, strict=True)}
    elsewhere = (torch.stack(list(true.values())).sum(0) == 0).float()
    masks = torch.stack([true.get(name, elsewhere) for name in names])
    monkeypatch.setattr(ConceptExpress, "find", lambda *given: Found(masks, masks))
    return TokenEdit.from_rows({f"<asset{i}>": {"text_encoder": torch.full((1, 4), float(i))} for i in range(len(names))})


def values(edit: TokenEdit) -> dict[str, float]:
    return {token: float(rows["text_encoder"][0, 0]) for token, rows in edit.tokens.items()}


def test_pictures_are_given_without_a_word(world: World, lesson: Lesson, tmp_path: Path) -> None:
    (subject,) = untold(lesson, world, tmp_path).subjects
    assert (subject.token, subject.class_name, subject.captions, subject.masks) == (STEM, "", (), ())
    assert [path.parent for path in subject.images] == [tmp_path]


def test_words_go_where_their_masks_are(monkeypatch: pytest.MonkeyPatch, world: World, lesson: Lesson, tiny: Model) -> None:
    edit = finds(monkeypatch, world, lesson, ["umbrella", "", "penguin"])
    edit = TokenEdit.from_rows(edit.tokens, replace(edit.info, notes={"steps": 7}))
    made = called(edit, lesson, ConceptExpress(), tiny, world)
    assert values(made) == {"<pal>": 2, "<toy>": 0}
    assert made.info.notes["steps"] == 7 and set(made.info.triggers) == {"<pal>", "<toy>"}


def test_what_is_not_found_has_no_word(monkeypatch: pytest.MonkeyPatch, world: World, lesson: Lesson, tiny: Model) -> None:
    edit = finds(monkeypatch, world, lesson, ["umbrella"])
    assert values(called(edit, lesson, ConceptExpress(), tiny, world)) == {"<toy>": 0}


def test_nothing_is_said_of_what_was_not_learnt(monkeypatch: pytest.MonkeyPatch, world: World, lesson: Lesson, tiny: Model) -> None:
    edit = finds(monkeypatch, world, lesson, ["umbrella"])
    finds(monkeypatch, world, lesson, ["umbrella", "penguin"])  # on another model, say
    with pytest.raises(PalimpsestError, match="2 found, 1 learnt"):
        called(edit, lesson, ConceptExpress(), tiny, world)
