"""A subject learnt at once, and a run that was stopped and goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eval.learning import Trying, can_go_on, learn, stopped
from eval.subjects import Portrait, alone
from toolkit.concepts import Subject
from toolkit.errors import UserError
from toolkit.io.files import load_edit
from toolkit.jobs import Stopped
from toolkit.model import Model, load_model
from toolkit.registry import load
from toolkit.runs import watched
from toolkit.world.scenes import load_world

METHOD = load("method", "textual_inversion").from_config({"max_train_steps": 3, "train_batch_size": 1})
TRYING = Trying(("a {}",), images=1, steps=2, every=1)


@pytest.fixture(scope="module")
def embedded() -> Model:
    return load_model()


def subject(folder: Path) -> Subject:
    return alone(Portrait("penguin", "bird", "<pal>"), "twemoji").task(load_world(), folder / "images").subjects[0]


def test_a_stopped_run_goes_on_to_the_same_edit(embedded: Model, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def stop(what: str, done: int, total: int, values: dict[str, float]) -> bool:
        if "loss" in values and done == 2:
            raise Stopped
        return True

    with watched(stop), pytest.raises(Stopped):
        learn(embedded, METHOD, subject(out), out, TRYING, {"model": "emoji-sd"})
    assert can_go_on(out) and not embedded.edits
    method, same, trying, asked = stopped(out)
    assert (method, same, trying, asked["model"]) == (METHOD, subject(out), TRYING, "emoji-sd")
    learnt = learn(embedded, method, same, out, trying)
    assert not can_go_on(out) and not list(out.glob("checkpoint-*")) and [prompt for _, prompt in learnt.shown] == ["a <pal>"]
    assert json.loads((out / "config.json").read_text())["trying"]["every"] == 1
    whole = learn(embedded, METHOD, subject(out), tmp_path / "whole", Trying((), every=0)).edit.tensors()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in load_edit(out).tensors().items())
    with pytest.raises(UserError, match="no run of learning that was stopped"):
        stopped(out)


def test_keeping_what_is_learnt_so_far_at_a_checkpoint(embedded: Model, tmp_path: Path) -> None:
    with watched(lambda what, done, total, values: "loss" not in values or done < 2):
        learn(embedded, METHOD, subject(tmp_path), tmp_path, TRYING)
    assert len(list((tmp_path / "samples").glob("*.png"))) == 2 and (tmp_path / "learned.png").is_file()


def test_a_prompt_has_a_place_for_the_word() -> None:
    with pytest.raises(UserError, match="no place for the word"):
        Trying(("a cat",))
