"""palimpsest attack as a user runs it: any concept, any judge, beside a control, on the unedited model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import toolkit.model
from eval.judges import HOW
from tests.eval.images import Renderer, reading
from toolkit.arch.sd import SD
from toolkit.cli import main
from toolkit.edits.low_rank import LowRank
from toolkit.io.files import load_edit, save_edit
from toolkit.model import Model
from toolkit.world.oracle import Oracle

QUICK = ("--n", "4", "--steps", "1")
INVERSION = ("--method", "concept_inversion", "--set", "max_train_steps=1", "images=2", "train_batch_size=1")


@pytest.fixture
def folder(tmp_path: Path, untrained: Oracle, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny random model in place of the shipped one, an edit of it, a judge, and images that show what is asked for: of penguins
    nothing, and of pistols nothing once a model is edited."""
    model = Model(SD.tiny())
    model.save(tmp_path / "emoji-sd")
    torch.manual_seed(0)
    deltas = {site: 0.1 * torch.randn_like(layer.weight) for site, layer in model.arch.text_linears().items()}
    save_edit(LowRank.from_deltas(deltas), tmp_path / "erased.safetensors")
    (tmp_path / "judges.py").write_text("def always(images):\n    return [True] * len(images)\n")

    class Erasing(Renderer):
        def __init__(self, *given: Any, **options: Any) -> None:
            super().__init__(*given, **options, spoil=lambda p: reading({}, background=p.scene.background) if "pistol" in p.words else None)

    monkeypatch.setattr("eval.commands.evaluate.painter", lambda args: Erasing(untrained, args.steps))
    monkeypatch.setattr(toolkit.model, "EMBEDDED", tmp_path / "emoji-sd")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def attack(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    code = main(["--json", "attack", *QUICK, "--out", "out", *argv])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    found = json.loads(captured.out.splitlines()[-1])
    assert json.loads(Path("out/result.json").read_text()) == found
    assert {"attack_success_rate", "clean_rate", "n", "seconds"} <= found.keys()
    return found


def test_with_its_control(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = attack(capsys, *INVERSION, "--edit", "erased.safetensors", "--concept", "gun", "--control", "penguin")
    assert found["concept"] == "pistol" and found["control"]["concept"] == "penguin"
    assert found["attack_success_rate"] == 1 and found["clean_rate"] == 0
    assert found["control_rate"] == found["control"]["attack_success_rate"] == 1, "the renderer draws whatever is asked for"
    assert found["recovered"] == 0 and found["recovered_interval"][0] < 0 < found["recovered_interval"][1]
    assert found["spent"] == {"steps": 1, "images": 2} and found["control"]["spent"]["images"] == 0
    assert load_edit(found["edit"]).info.triggers == ("<found>",)
    assert Path(found["picture"]).is_file()


def test_on_the_unedited_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = attack(capsys, *INVERSION, "--unedited", "--concept", "dog")
    assert found["attack_success_rate"] == found["clean_rate"] == 1


def test_a_style_and_a_group(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for concept in ("noto", "weapon"):
        found = attack(capsys, *INVERSION, "--edit", "erased.safetensors", "--concept", concept)
        assert found["concept"] == concept and found["attack_success_rate"] == 1


@pytest.mark.parametrize(
    "method",
    [
        INVERSION,
        ("--method", "relearn", "--set", "steps=1", "images=1", "train_batch_size=1"),
        ("--method", "image_guided", "--set", "images=2"),
        ("--method", "closed_form_preimage"),
        ("--method", "paraphrase", "--synonyms", "bare bark"),
        ("--method", "paraphrase", "--set", "words=typos"),
        ("--method", "prompt_set", "--set", "file=prompts.csv"),
    ],
    ids=lambda argv: argv[1],
)
def test_any_concept_by_a_judge(folder: Path, capsys: pytest.CaptureFixture[str], method: tuple[str, ...]) -> None:
    Path("prompts.csv").write_text("prompt,evaluation_seed\na thing,4\n")
    edited = ("--edit", "erased.safetensors", "--concept", "a bare tree", "--judge", "judges:always")
    found = attack(capsys, *method, *edited)
    assert found["attack_success_rate"] == found["clean_rate"] == 1
    assert found["measured_by"]["model"] == "judges:always" and found["concept"] == "a bare tree"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((*INVERSION, "--concept", "dog"), "or --unedited"),
        ((*INVERSION, "--concept", "dog", "--edit", "erased.safetensors", "--unedited"), "leave one of the two out"),
        ((*INVERSION, "--concept", "dgo", "--unedited"), "did you mean dog"),
        ((*INVERSION, "--concept", "dog", "--kind", "style", "--unedited"), "--kind style is for a concept that --judge"),
        ((*INVERSION, "--concept", "x", "--judge", "nobody", "--unedited"), f"no judge 'nobody'; give one of {HOW}"),
        ((*INVERSION, "--concept", "x", "--judge", "judges:always", "--control", "--unedited"), "has no control"),
        (("--method", "paraphrase", "--concept", "dog", "--control", "--unedited"), "leave --control out"),
        ((*INVERSION, "--concept", "dog", "--pictures", "nowhere", "--unedited"), "not a folder"),
        (("--method", "prompt_set", "--concept", "dog", "--unedited"), "no file ''"),
    ],
)
def test_mistakes_are_told_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], said: str) -> None:
    assert main(["attack", *QUICK, "--out", "out", *argv]) == 2
    error = capsys.readouterr().err
    assert said in error.splitlines()[-1] and "Traceback" not in error
