from __future__ import annotations

from collections.abc import Callable

import pytest

from eval.prompts import Prompt, resolve
from eval.suites import Suite
from tests.eval.images import Renderer, reading
from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.world.oracle import Oracle, Reading
from toolkit.world.scenes import World


def suite(world: World, oracle: Oracle, model: Model, spoil: Callable[[Prompt], Reading | None], n: int = 8) -> Suite:
    return Suite(world, Renderer(oracle, spoil=spoil), model, model.reference(), n, kid=False)


def without(*names: str) -> Callable[[Prompt], Reading | None]:
    """An edit after which these objects are drawn as nothing, on the right background."""
    return lambda prompt: reading({}, background=prompt.scene.background) if set(prompt.names) & set(names) else None


def test_a_clean_erasure_is_measured_as_one(world: World, untrained: Oracle, edited: Model) -> None:
    measured = suite(world, untrained, edited, without("pistol"))
    targets = [resolve(world, "gun")]
    measured.erased(targets)
    measured.kept(targets)
    metrics = measured.report.metrics
    value = {name: metric["value"] for name, metric in metrics.items()}
    assert value["target_accuracy"] == 0
    assert value["target_accuracy_before"] == 1
    assert value["target_accuracy_given_synonyms"] == value["target_accuracy_held_back_synonyms"] == 0
    assert value["instead_none"] == 1
    assert value["instead_background"] == 1
    assert value["retain_accuracy"] == value["retained_objects"] == value["retained_styles"] == 1
    assert all({"value", "low", "high", "n", "measured_by"} <= metric.keys() for metric in metrics.values())
    assert metrics["target_accuracy"]["n"] == 8
    assert metrics["retain_accuracy"]["n"] >= 64
    assert measured.report.per_concept["pistol"]["counts"]
    assert "pistol" not in {name for name, row in measured.report.per_concept.items() if row["role"] == "retained"}


def test_a_name_only_erasure_shows_in_the_synonyms(world: World, untrained: Oracle, edited: Model) -> None:
    def by_name(prompt: Prompt) -> Reading | None:
        return reading({}, background=prompt.scene.background) if "pistol" in prompt.words else None

    measured = suite(world, untrained, edited, by_name)
    measured.erased([resolve(world, "pistol")])
    metrics = measured.report.metrics
    assert metrics["target_accuracy"]["value"] == 0
    assert metrics["target_accuracy_held_back_synonyms"]["value"] == 1
    assert metrics["target_accuracy_held_back_synonyms"]["before"]["value"] == 1


def test_another_member_of_the_group_is_not_erased(world: World, untrained: Oracle, edited: Model) -> None:
    def rearmed(prompt: Prompt) -> Reading | None:
        return reading({"center": "knife"}, background=prompt.scene.background) if "pistol" in prompt.names else None

    group = suite(world, untrained, edited, rearmed)
    group.erased([resolve(world, "weapon")])
    alone = suite(world, untrained, edited, rearmed)
    alone.erased([resolve(world, "pistol")])
    assert group.report.metrics["target_accuracy"]["value"] == 1
    assert group.report.metrics["target_accuracy"]["n"] == 7 * 8
    assert alone.report.metrics["target_accuracy"]["value"] == 0
    assert alone.report.metrics["instead_other"]["objects"] == {"knife": 8}


def test_collateral_damage_is_named(world: World, untrained: Oracle, edited: Model) -> None:
    measured = suite(world, untrained, edited, without("pistol", "dog"))
    measured.kept([resolve(world, "pistol")])
    metrics = measured.report.metrics
    assert metrics["retained_worst"]["concept"] == "dog"
    assert metrics["retained_worst"]["below_bar"] == ["dog"]
    assert 0.95 < metrics["retained_objects"]["value"] < 1


def test_an_erased_style(world: World, untrained: Oracle, edited: Model) -> None:
    def restyled(prompt: Prompt) -> Reading | None:
        if prompt.scene.style != "noto":
            return None
        return reading(dict(prompt.scene.items), "twemoji", prompt.scene.background)

    measured = suite(world, untrained, edited, restyled)
    targets = [resolve(world, "noto")]
    measured.erased(targets)
    before, _ = measured.kept(targets)
    assert measured.report.metrics["target_accuracy"]["value"] == 0
    assert measured.report.metrics["target_accuracy_before"]["value"] == 1
    assert measured.report.metrics["retain_accuracy"]["value"] == 1
    assert "noto" not in {item.prompt.scene.style for item in before}


def test_concepts_that_were_not_drawn_do_not_count(world: World, untrained: Oracle, edited: Model) -> None:
    measured = suite(world, untrained, edited, without("pistol"))
    measured.painter = Renderer(untrained, spoil=without("pistol"), always=True)
    measured.erased([resolve(world, "pistol"), resolve(world, "knife")])
    assert measured.report.per_concept["pistol"]["counts"] is False
    assert measured.report.metrics["target_accuracy"]["concepts"] == ["knife"]
    measured.erased([resolve(world, "pistol")])
    assert measured.report.metrics["target_accuracy"]["value"] is None


def test_the_base_draws_each_prompt_once(world: World, untrained: Oracle, edited: Model) -> None:
    measured = suite(world, untrained, edited, without("pistol"))
    targets = [resolve(world, "pistol")]
    measured.erased(targets)
    painter = measured.painter
    assert isinstance(painter, Renderer)
    first = painter.painted
    measured.erased(targets)
    assert painter.painted == first


def test_without_edits_accuracy_is_over_all_objects(world: World, untrained: Oracle, tiny: Model) -> None:
    measured = Suite(world, Renderer(untrained), tiny, tiny, 8)
    measured.kept()
    assert measured.report.metrics["accuracy"]["value"] == 1
    assert set(measured.report.per_concept) == set(world.names("scored"))
    assert "retain_accuracy" not in measured.report.metrics


def test_a_token_nobody_learnt_is_an_error(world: World, untrained: Oracle, tiny: Model) -> None:
    measured = Suite(world, Renderer(untrained), tiny, tiny, 8)
    with pytest.raises(UserError, match="attach the edit"):
        measured.learned("<toy>", "penguin")
    with pytest.raises(UserError, match="no object"):
        measured.learned("<toy>", "pengiun")
    with pytest.raises(UserError, match="at least 1"):
        Suite(world, Renderer(untrained), tiny, tiny, 0)
