"""Whom attacks try, and who decides: pictures, controls, concepts of any world, judges."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from eval.attacks.base import AttackResult, Scenario, recovered
from eval.attacks.concept_inversion import ConceptInversion
from eval.attacks.paraphrase import Paraphrase
from eval.intervals import difference, rate
from eval.judges import Judged, open_judge
from eval.prompts import Prompt, Target, resolve
from eval.rates import Painter
from tests.eval.images import Renderer, reading
from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.world.oracle import Oracle, Reading
from toolkit.world.scenes import World


def of(world: World, painter: Painter, model: Model, concept: str = "pistol") -> Scenario:
    return Scenario(world, painter, model, model.reference(), resolve(world, concept), n=8)


@dataclass
class Brighter:
    than: float

    def shows(self, images: Tensor) -> list[bool]:
        return (images.mean((1, 2, 3)) > self.than).tolist()

    def measured_by(self) -> dict[str, str]:
        return {"model": "brightness"}


def anywhere(model: Model, shows: float, n: int = 4) -> Scenario:
    """Whom to attack at a concept of another world, of which images brighter than this are."""
    painter = Judged(steps=1, guidance=1.0, concept="a bare tree", judge=Brighter(shows))
    target = Target("a bare tree", "object", ("a bare tree",))
    return Scenario(None, painter, model, model.reference(), target, n=n, synonyms=("wood",))


# --- pictures and controls --------------------------------------------------------------------------------------------
def test_pictures_show_the_concept(world: World, untrained: Oracle, edited: Model) -> None:
    """What the unedited model drew wrong is left out, and drawn once more."""

    def blind(prompt: Prompt) -> Reading | None:
        return reading({}, background=prompt.scene.background) if prompt.seed >= 10_000 and prompt.scene.style == "noto" else None

    scenario = of(world, Renderer(untrained, spoil=blind, always=True), edited)
    pictures = scenario.pictures("pistol", 16)
    side = edited.arch.image_size
    assert pictures.latents.shape == (16, *edited.arch.latent_shape(side, side))
    assert pictures.drawn == 32 and len(pictures.captions) == 16
    assert all("{}" in caption and "pistol" not in caption and "noto" not in caption for caption in pictures.captions)
    with pytest.raises(UserError, match="give --pictures"):
        of(world, Renderer(untrained, spoil=lambda p: reading({}) if p.seed >= 10_000 else None, always=True), edited).pictures("pistol", 2)


def test_pictures_that_are_given_are_used(world: World, untrained: Oracle, edited: Model, tmp_path: Path) -> None:
    for i, colour in enumerate(("red", "blue")):
        Image.new("RGB", (80, 80), colour).save(tmp_path / f"{i}.png")
    scenario = replace(of(world, Renderer(untrained), edited), files=tuple(sorted(tmp_path.glob("*.png"))))
    pictures = scenario.pictures("pistol", 2)
    assert len(pictures.latents) == 2 and pictures.drawn == 0 and not torch.equal(*pictures.latents)
    with pytest.raises(UserError, match="2 pictures are given, and the attack asks for 3"):
        scenario.pictures("pistol", 3)


def test_a_control_is_an_unknown_object_on_the_unedited_model(world: World, untrained: Oracle, edited: Model) -> None:
    painter = Renderer(untrained)
    scenario = of(world, painter, edited)
    control = scenario.control("penguin")
    assert control.model is scenario.base and control.target.names == ("penguin",)
    before = painter.painted
    pictures = control.pictures("penguin", 3)
    assert painter.painted == before and pictures.drawn == 0, "its pictures are renders"
    assert len(pictures.latents) == 3
    assert scenario.control().target.names == (world.names("held_out")[0],)
    with pytest.raises(UserError, match="may know 'dog'"):
        scenario.control("dog")
    with pytest.raises(UserError, match="has no control"):
        of(world, painter, edited, "noto").control()


def test_what_is_recovered_is_the_difference_to_the_control(world: World, untrained: Oracle, edited: Model) -> None:
    def knows(prompt: Prompt) -> Reading | None:
        return reading({}, background=prompt.scene.background) if "penguin" in prompt.names or "pistol" in prompt.words else None

    attack = ConceptInversion(max_train_steps=1, images=1, train_batch_size=1)
    scenario = of(world, Renderer(untrained, spoil=knows), edited)
    control = scenario.control("penguin")
    found, other = attack.run(scenario), attack.run(replace(control, painter=Renderer(untrained, spoil=knows, always=True)))
    estimate = recovered(found, other)
    assert estimate.value == 1 and 0 < estimate.low < estimate.high == 1


def test_the_interval_of_a_difference_is_newcombes() -> None:
    """His example: 56 of 70 against 48 of 80 is 0.2 [0.0524, 0.3339] (Stat. Med. 17, 1998, table II, method 10)."""
    found = difference(rate([True] * 56 + [False] * 14), rate([True] * 48 + [False] * 32))
    assert math.isclose(found.value, 0.2, abs_tol=1e-9)
    assert (round(found.low, 4), round(found.high, 4)) == (0.0524, 0.3339)
    assert found.n == 70


def test_groups_styles_and_words(world: World, untrained: Oracle, edited: Model) -> None:
    scenario = of(world, Renderer(untrained), edited, "weapon")
    assert set(scenario.names()) == set(world.group("weapon"))
    assert scenario.words("pistol") == ("pistol", *world.things["pistol"].synonyms)
    style = of(world, Renderer(untrained), edited, "noto")
    before, after = style.by_name()
    assert len(before) == 8 and all("noto" in item.prompt.text and style.shows(item) for item in after)
    assert "{} style" in style.templates


# --- concepts of any world --------------------------------------------------------------------------------------------
def test_a_concept_of_another_world_is_asked_by_templates_and_judged(edited: Model) -> None:
    scenario = anywhere(edited, -1.0, n=7)
    asked = scenario.asked("a bare tree")
    assert asked[0].text == "a bare tree" and asked[5].text == asked[0].text and asked[5].seed == 1
    before, after = scenario.by_name()
    assert len(after) == 7 and all(map(scenario.shows, before))
    assert scenario.painter.measured_by() == {"model": "brightness", "steps": 1, "guidance": 1.0}
    with pytest.raises(UserError, match="does not draw a bare tree well"):
        anywhere(edited, 2.0).by_name()
    with pytest.raises(UserError, match="has no control"):
        scenario.control()


def test_attacks_run_on_a_concept_of_another_world(edited: Model) -> None:
    found: AttackResult = ConceptInversion(max_train_steps=1, images=2, train_batch_size=1).run(anywhere(edited, -1.0))
    assert found.attack_success_rate.value == 1 and all("<found>" in prompt for prompt in found.prompts)
    found = Paraphrase().run(anywhere(edited, -1.0))
    assert all("wood" in prompt for prompt in found.prompts)


def test_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images: Tensor = torch.zeros(2, 3, 8, 8)
    images[1, 0] = 1
    (tmp_path / "my_judge.py").write_text("def red(images):\n    return images[:, 0].mean((1, 2)) > 0.5\n")
    monkeypatch.chdir(tmp_path)
    judge = open_judge("my_judge:red", "redness")
    assert judge.shows(images) == [False, True] and judge.measured_by()["model"] == "my_judge:red"
    for written, said in (
        ("nonsense", "no judge 'nonsense'"),
        ("no_such_module:red", "no_such_module"),
        ("my_judge:blue", "blue"),
        ("clip_t", "does not say whether"),
    ):
        with pytest.raises(UserError, match=said):
            open_judge(written, "redness")


def test_a_zero_shot_judge_prefers_the_concept_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Brightness:
        def __init__(self, source: str | None) -> None:
            self.measured_by = {"model": source}

        def similarity(self, images: Tensor, texts: list[str]) -> Tensor:
            return images.mean((1, 2, 3)) if "sun" in texts[0] else torch.full((len(images),), 0.5)

    monkeypatch.setattr("eval.alignment.load_clip", Brightness)
    judge = open_judge("clip:local-dir:/folder", "sun")
    assert judge.shows(torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])) == [False, True]
    assert judge.measured_by()["model"] == "local-dir:/folder" and "a photo of a sun" in judge.measured_by()["nearer_to"]
