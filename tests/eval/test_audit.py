"""The audit of an edit: what it says of what is known, and that it does not say what is not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.report_audit import ALWAYS_UNTESTED, OUTCOMES
from eval.report_edit import changes, facts
from tests.eval.images import Renderer, reading
from toolkit import cli
from toolkit.arch.sd import SD
from toolkit.edits.base import EditInfo
from toolkit.edits.chain import Chain
from toolkit.edits.delta import Delta
from toolkit.edits.token import TokenEdit
from toolkit.io.files import save_edit
from toolkit.model import Model
from toolkit.world.oracle import Oracle


@pytest.fixture
def folder(tiny: Model, tmp_path: Path, untrained: Oracle, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as erase writes it, with an edit that erases the pistol by its name; the command finds the tiny model."""
    torch.manual_seed(0)
    deltas = {f"{site}.weight": 0.1 * torch.randn_like(layer.weight) for site, layer in tiny.arch.text_linears().items()}
    info = EditInfo("uce", {"lamb": 0.1}, tiny.fingerprint)
    save_edit(Delta.from_deltas(deltas, info), tmp_path / "erased" / "edit.safetensors")
    task = {"concepts": [{"name": "pistol", "synonyms": ["gun"], "anchor": "knife", "kind": "object"}], "preserve": ["dog", "cat"]}
    (tmp_path / "erased" / "config.json").write_text(json.dumps({"method": "uce", "task": task}))

    class Erasing(Renderer):
        def __init__(self, *given: Any, **options: Any) -> None:
            super().__init__(*given, **options, spoil=lambda p: reading({}, background=p.scene.background) if "pistol" in p.words else None)

    monkeypatch.setattr("eval.commands.audit.open_model", lambda args: tiny)
    monkeypatch.setattr("eval.commands.evaluate.knows_world", lambda model: True)
    monkeypatch.setattr("eval.auditor.load_oracle", lambda: untrained)
    monkeypatch.setattr("eval.auditor.Painter", Erasing)
    return tmp_path


def audit(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[dict[str, Any], str]:
    """The JSON and the page."""
    code = cli.main(["audit", str(folder / "erased"), "--n", "4", "--out", str(folder / "audit"), *words, "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    said = json.loads(captured.out.splitlines()[-1])
    held = json.loads(Path(said["data"]).read_text())
    assert all(said[key] == held[key] for key in ("erased", "attacks", "survived", "not_tested"))
    return held, Path(said["page"]).read_text()


def test_the_page_says_what_was_erased_attacked_and_survived(folder: Path, tiny: Model, capsys: pytest.CaptureFixture[str]) -> None:
    held, html = audit(folder, capsys, "--attacks", "paraphrase", "closed_form_preimage")
    assert held["erased"] == ["pistol"] and held["metrics"]["target_accuracy"]["value"] == 0 and tiny.edits == ()
    assert held["metrics"]["retained_objects"]["value"] == 1 and held["edit"]["same_base"] is True
    first, second = held["attacks"]
    assert first["attack"] == "paraphrase" and first["attack_success_rate"]["value"] == 1 and first["outcome"] == OUTCOMES[0]
    assert second["label"] == "white-box" and held["survived"] == ["paraphrase on pistol", "closed_form_preimage on pistol"]
    assert any("concept_inversion" in line and "not tried" in line for line in held["not_tested"])
    assert held["not_tested"][-len(ALWAYS_UNTESTED) :] == list(ALWAYS_UNTESTED)
    for title in ("What was erased", "How it was attacked", "What survived", "What else changed", "Evidence", "Not tested"):
        assert f"<h2>{title}</h2>" in html
    assert "gun" in html and "knife" in html and "2 prompts" in html and html.count("data:image/webp") == 4 and "delta" in html
    assert "palimpsest audit" in html and "--attacks paraphrase closed_form_preimage" in html


def test_what_holds_is_said_with_what_cannot_be_excluded(
    folder: Path, untrained: Oracle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = lambda prompt: reading({}, background=prompt.scene.background) if "pistol" in prompt.names else None  # noqa: E731
    monkeypatch.setattr(
        "eval.auditor.Painter", type("Gone", (Renderer,), {"__init__": lambda self, *a: Renderer.__init__(self, *a, spoil=gone)})
    )
    held, html = audit(folder, capsys, "--attacks", "paraphrase")
    assert held["survived"] == [] and held["attacks"][0]["outcome"] == OUTCOMES[2]
    assert "Nothing of what was tried brings it back" in html and "% of the images cannot be excluded" in html


def test_attacks_have_their_options_and_an_impossible_one_its_reason(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held, _ = audit(folder, capsys, "--attacks", "paraphrase", "prompt_set", "--set", "paraphrase.words=given", "--concept", "gun")
    assert held["erased"] == ["gun"] and held["attacks"][0]["config"]["words"] == "given"
    assert held["attacks"][1]["outcome"] == OUTCOMES[3] and held["attacks"][1]["impossible"]
    assert any(line.startswith("prompt_set on pistol, which could not be tried") for line in held["not_tested"])
    for words, message in ((["--set", "uce.lamb=1"], "for none of the attacks paraphrase"), (["--attacks", "nothing"], "unknown attack")):
        assert cli.main(["audit", str(folder / "erased"), *words, "--out", str(folder / "audit")]) == 2
        assert message in capsys.readouterr().err


def test_a_model_of_another_world_is_not_judged_by_the_oracle(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.commands.evaluate.knows_world", lambda model: False)
    held, html = audit(folder, capsys)
    assert held["metrics"] == {} and held["attacks"] == [] and held["measured_by"] == {} and held["edit"]["changes"]
    assert "no --judge that knows this one" in held["not_tested"][0] and "It was not attacked." in html and "none were drawn" in html


class Bright:
    """A judge: whatever it is shown, it sees the concept in half of the images."""

    def shows(self, images: Tensor, /) -> Sequence[bool]:
        return [i % 2 == 0 for i in range(len(images))]

    def measured_by(self) -> dict[str, Any]:
        return {"model": "bright"}


def test_a_judge_takes_the_oracles_place(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.commands.evaluate.knows_world", lambda model: False)
    monkeypatch.setattr("eval.judges.open_judge", lambda *given: Bright())
    held, html = audit(folder, capsys, "--judge", "bright", "--steps", "1", "--attacks", "closed_form_preimage")
    assert held["measured_by"]["model"] == "bright" and held["metrics"]["target_accuracy"]["value"] == 0.5
    assert "does not draw pistol well enough" in held["attacks"][0]["impossible"] and "retained_objects" not in held["metrics"]
    assert "evaluate --prompts" in html and "--judge bright" in html


def test_nothing_says_what_was_erased(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "erased" / "config.json").unlink()
    assert cli.main(["audit", str(folder / "erased"), "--out", str(folder / "audit")]) == 2
    error = capsys.readouterr().err
    assert "give --concept" in error and len(error.splitlines()) == 1


# --- what an edit is --------------------------------------------------------------------------------------------------
def test_changes_are_those_of_the_weights(tiny: Model, tmp_path: Path) -> None:
    names = [f"{site}.weight" for site in tiny.arch.text_linears()][:2]
    small, large = (scale * tiny.arch.parameter(name).detach() for scale, name in zip((0.1, 0.5), names, strict=True))
    first = Delta.from_deltas(dict(zip(names, (small, large), strict=True)), EditInfo("esd", {}, {"weights": "others", "dtype": "x"}))
    width = tiny.arch.token_embeddings()["text_encoder"].embedding_dim
    both = Chain.of([first, TokenEdit.from_rows({"<toy>": {"text_encoder": torch.randn(2, width)}})], [1.0, 1.0])
    (change,) = changes(first, 2.0, tiny).values()
    norms = [float(tiny.arch.parameter(name).detach().square().sum()) for name in names]
    assert change.moved == pytest.approx(((0.04 * norms[0] + norms[1]) / sum(norms)) ** 0.5, rel=1e-5)
    assert change.parameters == 2 < change.of and change.numbers == small.numel() + large.numel()
    assert change.most == (names[1], pytest.approx(1.0))
    about = facts(str(save_edit(both, tmp_path / "both.safetensors")), both, 1.0, tiny)
    assert about.brings == {"token": (1, 2 * width)} and about.kinds == ("delta", "token") and about.task == {} and about.mergeable
    assert about.same_base is False and any("another base" in text for text in about.warnings) and tiny.edits == ()
    assert "checkpoint" in about.exports and "diffusers-lora" not in about.exports


def test_an_edit_that_does_not_fit_is_told(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    other = Model(SD.tiny())
    save_edit(Delta.from_deltas({"denoiser.nothing.weight": torch.ones(2, 2)}), folder / "erased" / "edit.safetensors")
    monkeypatch.setattr("eval.commands.audit.open_model", lambda args: other)
    assert cli.main(["audit", str(folder / "erased"), "--out", str(folder / "audit")]) == 2
    assert "does not have" in capsys.readouterr().err
