"""An erasing edit tried at once, and what is said of a method before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval import stored
from eval.known import known
from eval.trial import HEADINGS, erase
from toolkit.concepts import Concept, EraseTask
from toolkit.errors import UserError
from toolkit.io.files import load_edit
from toolkit.model import Model, load_model
from toolkit.registry import load

PISTOL = EraseTask((Concept("pistol", synonyms=("gun",)),), ("dog",))


@pytest.fixture(scope="module")
def embedded() -> Model:
    return load_model()


def test_what_is_known_to_the_oracle_is_measured(embedded: Model, tmp_path: Path) -> None:
    trial = erase(
        embedded, load("method", "uce")(), PISTOL, tmp_path, everything_else=True, images=1, steps=2, origin={"model": "emoji-sd"}
    )
    what = [row[0] for row in trial.rows]
    assert what[:3] == [f"pistol is drawn, asked by {words}" for words in ("name", "given synonyms", "other synonyms")]
    assert all(len(row) == len(HEADINGS) for row in trial.rows) and "%" in trial.rows[0][2]
    assert len(trial.erased) == 1 and len(trial.retained) == 4 and not embedded.edits and not trial.unmeasured
    config = json.loads((tmp_path / "config.json").read_text())
    preserved = config["task"]["preserve"]
    assert preserved[0] == "dog" and "cat" in preserved and "gun" not in preserved and "pistol" not in preserved
    assert (config["method"], config["model"]) == ("uce", "emoji-sd")
    assert load_edit(tmp_path).info.method == "uce" and (tmp_path / "erased.png").is_file()
    assert json.loads((tmp_path / "report.json").read_text())["rows"] == trial.rows


def test_what_it_does_not_know_is_drawn_and_said_so(embedded: Model, tiny: Model, tmp_path: Path) -> None:
    task = EraseTask((Concept("quux"),), ("dog",))
    trial = erase(embedded, load("method", "uce")(), task, tmp_path, images=2, steps=1)
    assert not trial.rows and "the oracle cannot measure this: unknown concept" in trial.unmeasured
    assert [pair.prompt for pair in trial.erased] == ["a quux", "a photo of a quux"] and len(trial.retained) == 1
    assert "no oracle" in erase(tiny, load("method", "uce")(), PISTOL, tmp_path, steps=1).unmeasured
    with pytest.raises(UserError, match="does not draw the embedded world"):
        erase(tiny, load("method", "uce")(), PISTOL, tmp_path, everything_else=True)


def test_what_the_project_has_measured_is_told() -> None:
    assert known("uce_debias") is None
    measured = [name for name in {path.name.split("-")[0] for path in stored.RESULTS.glob("*-*.json")} if known(name)]
    assert measured
    for name in measured[:2]:
        found = known(name)
        assert found and found.seconds > 0 and 0 <= found.left.low <= found.left.high <= 1 and found.tasks > 0
        assert load("method", name).from_config(found.options).config() | found.options == load("method", name)(**found.options).config()


def test_what_is_told_is_of_one_choice_of_options() -> None:
    """The folder also has the same methods with other options, and attacks on what they made."""
    spm = known("spm")
    assert spm and "gate" not in spm.options and spm.tasks == 6 and spm.kept.value > 0.95
    esd = known("esd")
    assert esd and esd.tasks == 6 and esd.options["max_train_steps"] == 100
