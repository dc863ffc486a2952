from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import eval.alignment
import toolkit.model
import toolkit.world.oracle
from eval.alignment import world_clip
from eval.commands.evaluate import read_prompts
from tests.eval.images import Renderer, reading
from toolkit.arch.sd import SD
from toolkit.cli import main
from toolkit.edits.low_rank import LowRank
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError
from toolkit.io.files import load_edit, save_edit
from toolkit.model import Model
from toolkit.world.oracle import Oracle
from trainers.world.clip import build_clip, clip_config

SMALL = ("--n", 1, "--steps", 1, "--metrics", "kid")


@pytest.fixture
def shipped(tmp_path: Path, untrained: Oracle, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tiny random models in place of the shipped ones, and an edit of the layers that read text."""
    model = Model(SD.tiny())
    model.save(tmp_path / "emoji-sd")
    torch.manual_seed(0)
    clip = world_clip(build_clip(clip_config(len(model.arch.tokenizers()["text_encoder"]))), model.arch.tokenizers()["text_encoder"])
    monkeypatch.setattr(toolkit.model, "EMBEDDED", tmp_path / "emoji-sd")
    monkeypatch.setattr(toolkit.world.oracle, "load_oracle", lambda: untrained)
    monkeypatch.setattr(eval.alignment, "load_metric_clip", lambda: clip)
    deltas = {site: 0.1 * torch.randn_like(layer.weight) for site, layer in model.arch.text_linears().items()}
    save_edit(LowRank.from_deltas(deltas), tmp_path / "erased.safetensors")
    width = model.arch.token_embeddings()["text_encoder"].embedding_dim
    save_edit(TokenEdit.from_rows({"<pal>": {"text_encoder": torch.randn(1, width)}}), tmp_path / "learned.safetensors")
    return tmp_path


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that show what was asked for, without pistols once a model is edited."""

    class Erasing(Renderer):
        def __init__(self, *given: Any, **options: Any) -> None:
            super().__init__(*given, **options, spoil=lambda p: reading({}, background=p.scene.background) if "pistol" in p.words else None)

    monkeypatch.setattr("eval.rates.Painter", Erasing)


def result(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    code = main(["--json", *map(str, argv)])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out.splitlines()[-1])


def test_evaluate_runs_on_the_model_it_is_given(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = result(capsys, "evaluate", "--n", 1, "--steps", 1, "--out", shipped / "out")
    assert set(found["metrics"]) == {"accuracy", "style_accuracy", "background_accuracy", "clip_t"}
    assert found["metrics"]["accuracy"]["measured_by"]["threshold"] == 0.5
    assert len(found["per_concept"]) == 72
    assert json.loads((shipped / "out" / "report.json").read_text()) == found
    assert [Path(file).name for file in found["files"]] == ["retained.png"]


@pytest.mark.usefixtures("rendered")
def test_evaluate_tells_what_is_erased(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit = shipped / "erased.safetensors"
    found = result(capsys, "evaluate", "--edit", edit, "--erased", "gun", "--n", 4, "--anchor", "knife", "--out", shipped / "out")
    metrics = found["metrics"]
    assert metrics["target_accuracy"]["value"] == 0
    assert metrics["target_accuracy_held_back_synonyms"]["value"] == 1
    assert metrics["instead_anchor"]["value"] == 0
    assert metrics["retain_accuracy"]["value"] == 1
    assert {"instead_kid", "clip_t"} <= metrics.keys()
    assert found["per_concept"]["pistol"]["role"] == "erased"
    assert (shipped / "out" / "erased.png").is_file()


@pytest.mark.usefixtures("rendered")
def test_evaluate_tells_what_is_learnt(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit = shipped / "learned.safetensors"
    found = result(capsys, "evaluate", "--edit", edit, "--learned", "<pal>=penguin", "--n", 4, "--metrics", "kid")
    assert found["metrics"]["learned_accuracy:<pal>"]["value"] == 1
    assert found["metrics"]["learned_accuracy:<pal>"]["n"] == 4
    assert "clip_t" not in found["metrics"]


def test_evaluate_compares_with_a_given_base(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Model(SD.tiny(seed=1))
    model.save(shipped / "other")
    found = result(capsys, "evaluate", "--model", shipped / "other", "--base", shipped / "emoji-sd", *SMALL)
    assert "retain_accuracy" in found["metrics"]


def test_evaluate_measures_alignment_on_prompts(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shipped / "prompts.csv").write_text('prompt,evaluation_seed\n"a dog, a cat",3\na frog,4\n')
    edit = shipped / "erased.safetensors"
    found = result(capsys, "evaluate", "--edit", edit, "--prompts", shipped / "prompts.csv", "--steps", 1)
    assert set(found["metrics"]) == {"clip_t", "clip_t_before"}
    assert found["metrics"]["clip_t"]["n"] == 2


def test_evaluate_measures_any_metric_on_prompts(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shipped / "prompts.csv").write_text("prompt,evaluation_seed\na dog,3\na noto cat,4\na cat,5\n")
    (shipped / "judging.py").write_text("def level(images):\n    return images.mean((1, 2, 3))\n")
    argv = ("evaluate", "--edit", shipped / "erased.safetensors", "--prompts", shipped / "prompts.csv", "--steps", 1, "--metrics")
    options = ("--set", "classifier.function=judging:level", "classifier.threshold=0.9,0.01", "kid.features=oracle", "clip_t.scale=100")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shipped)
        found = result(capsys, *argv, "clip_t", "clip_drift", "classifier", "kid", *options)["metrics"]
    assert set(found) == {"clip_t", "clip_t_before", "clip_drift", "classifier", "classifier_before", "kid"}
    assert found["clip_drift"]["value"] == pytest.approx((found["clip_t"]["value"] - found["clip_t_before"]["value"]) / 100, abs=1e-5)
    assert list(found["classifier"]["thresholds"]) == ["0.9", "0.01"] and found["classifier"]["value"] == 0
    assert {row["n"] for row in found.values()} == {3} and found["kid"]["measured_by"]["model"] == "oracle"


@pytest.mark.usefixtures("rendered")
def test_evaluate_measures_metrics_of_the_world(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit, options = shipped / "erased.safetensors", ("--set", "unlearn_canvas.target=pistol")
    argv = ("evaluate", "--edit", edit, "--erased", "pistol", "--n", 2, "--metrics", "clip_drift", "unlearn_canvas", *options)
    metrics = result(capsys, *argv)["metrics"]
    assert "before" not in metrics["clip_drift"] and metrics["clip_drift"]["n"] >= 12
    assert metrics["unlearn_canvas"]["unlearning_accuracy"]["n"] == 2
    terms = [1 - metrics[name]["value"] for name in ("target_accuracy", "target_accuracy_held_back_synonyms")]
    assert metrics["harmonic"]["of"] == ["efficacy", "generality", "specificity"]
    assert terms == [1, 0] and metrics["harmonic"]["value"] == 0


def test_metrics_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["name"]: row for row in result(capsys, "metrics")["metrics"]}
    assert {"clip_t", "kid", "nudenet", "lpips"} <= rows.keys()
    assert rows["nudenet"]["options"]["threshold"] == [0.6, 0.45] and rows["clip_t"]["compares"] == "prompt"


def test_attack_gives_its_keys(shipped: Path, capsys: pytest.CaptureFixture[str], rendered: None) -> None:
    argv = ("attack", "--edit", shipped / "erased.safetensors", "--concept", "pistol", "--n", 4, "--out", shipped / "attack")
    for method in ("paraphrase", "closed_form_preimage"):
        found = result(capsys, *argv, "--method", method)
        assert (found["attack_success_rate"], found["clean_rate"], found["n"]) == (1.0, 0.0, 4)
        assert found["attack_success_rate_interval"][0] < 1
        assert found["seconds"] >= 0
        assert json.loads((shipped / "attack" / "result.json").read_text()) == found


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("evaluate", "--erased", "pistl"), "did you mean pistol"),
        (("evaluate", "--erased", "pistol", "--anchor", "knif"), "did you mean knife"),
        (("evaluate", "--n", "0"), "--n is 0"),
        (("evaluate", "--learned", "<pal>"), "not of the form K=V"),
        (("evaluate", "--learned", "<pal>=penguin"), "attach the edit"),
        (("evaluate", "--prompts", "nowhere.txt"), "no file"),
        (("evaluate", "--metrics", "clip_tt"), "did you mean clip_t"),
        (("evaluate", "--metrics", "clip_t", "--set", "clip_t.prefx=a"), "did you mean prefix"),
        (("evaluate", "--set", "nudenet.threshold=0.6"), "is for none of the metrics clip_t"),
        (("evaluate", "--metrics", "clip_drift"), "no edit is attached"),
        (("evaluate", "--metrics", "kid", "--clip", "local-dir:X"), "none of the metrics"),
        (("evaluate", "--metrics", "clip_i", "--set", "clip_i.folder=nowhere"), "nowhere is not a folder"),
        (("attack", "--method", "paraphase", "--concept", "pistol", "--out", "OUT"), "did you mean paraphrase"),
        (("attack", "--method", "paraphrase", "--concept", "pistol", "--set", "word=all", "--out", "OUT"), "did you mean words"),
        (("attack", "--method", "paraphrase", "--concept", "pistol", "--out", "OUT"), "no edit is attached"),
    ],
)
def test_mistakes_are_told_in_one_line(shipped: Path, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], said: str) -> None:
    code = main([word.replace("OUT", str(shipped / "attack")) for word in argv])
    error = capsys.readouterr().err
    assert code == 2
    assert said in error.splitlines()[-1]
    assert "Traceback" not in error


def test_a_model_of_another_world_needs_prompts(shipped: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.commands.evaluate.embedded_vocabulary", lambda folder: {"emoji</w>": 7})
    assert main(["evaluate", "--model", str(shipped / "emoji-sd")]) == 2
    assert "only metrics of given prompts" in capsys.readouterr().err
    (shipped / "prompts.txt").write_text("a dog\n")
    assert main(["evaluate", "--prompts", str(shipped / "prompts.txt")]) == 2
    assert "give --clip SOURCE" in capsys.readouterr().err


def test_prompt_files(tmp_path: Path) -> None:
    def written(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    assert read_prompts(written("a.txt", "a dog\n\n a cat \n")) == [("a dog", None), ("a cat", None)]
    assert read_prompts(written("a.csv", "case,prompt\n1,a dog\n")) == [("a dog", None)]
    for name, text, said in (
        ("b.csv", "words\na dog\n", "must be called prompt"),
        ("c.csv", "prompt,seed\na dog,x\n", "no number"),
        ("d.txt", "\n", "no prompt"),
    ):
        with pytest.raises(UserError, match=said):
            read_prompts(written(name, text))


def test_the_demo_goes_from_end_to_end(
    shipped: Path, capsys: pytest.CaptureFixture[str], rendered: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.commands.demo.LEARNER_OPTIONS", {"max_train_steps": 2})
    out = shipped / "demo"
    found = result(capsys, "demo", "--out", out)
    rows = {row["what"]: row for row in found["results"]}
    assert rows["pistol drawn"]["before"] == 1
    assert rows["pistol drawn"]["after"] == 0
    assert rows["composed: pistol drawn"]["after"] == 0
    assert rows["other objects right"]["n"] == 71
    assert all({"what", "before", "after", "low", "high", "n"} <= row.keys() for row in found["results"])
    assert len(list((out / "images").glob("*.png"))) == 5
    assert [Path(edit).parent.name for edit in found["edits"]] == ["erased", "learned", "composed"]
    composed = load_edit(found["edits"][-1])
    assert {part.kind() for part, _ in composed.parts()} == {"low_rank"}
    assert all(Path(picture).is_file() for picture in found["pictures"])
    assert json.loads((out / "report.json").read_text()) == found
    page = Path(found["page"]).read_text()
    assert page.count("data:image/webp") == 6 and page.count("<tr>") == len(found["results"]) + 1 and "palimpsest audit" in page


def test_evaluate_warns_when_there_is_nothing_to_compare(shipped: Path, capsys: pytest.CaptureFixture[str], rendered: None) -> None:
    assert main(["evaluate", "--erased", "pistol", *map(str, SMALL)]) == 0
    captured = capsys.readouterr()
    assert "no edit is attached" in captured.err
    assert "target_accuracy" in captured.out
