"""`compose --method`: one edit that a method solves for, as `fit` with a merge task gives it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.toolkit.test_cli import call
from toolkit import registry
from toolkit.arch.sd import SD
from toolkit.cli import main
from toolkit.concepts import Concept, MergeTask
from toolkit.edits.chain import Chain
from toolkit.edits.low_rank import LowRank
from toolkit.io.files import load_edit, save_edit
from toolkit.model import Model, load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model on disk."""
    return str(Model(SD.tiny()).save(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def erased(folder: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two low-rank edits on disk, without words of their own."""
    task = registry.load("method", "mace_fuse").example_task(load_model(folder))
    out = tmp_path_factory.mktemp("erased")
    return [str(save_edit(edit, out / f"{i}.safetensors")) for i, edit in enumerate(task.edits)]


@pytest.fixture(scope="module")
def learnt(folder: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two edits on disk that bring a word each and change layers."""
    task = registry.load("method", "custom_diffusion_merge").example_task(load_model(folder))
    out = tmp_path_factory.mktemp("learnt")
    return [str(save_edit(edit, out / f"{i}.safetensors")) for i, edit in enumerate(task.edits)]


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """A command that must be the user's mistake; its line on stderr, after the bars of what it had to load."""
    capsys.readouterr()
    assert main(list(map(str, argv))) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("palimpsest: ") == 1
    return told.err.splitlines()[-1]


def test_erasing_edits_are_fused_for_their_concepts(
    folder: str, erased: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merging = ("compose", erased[0] + "@0.5", erased[1], "--model", folder, "--method", "mace_fuse", "--set", "lamb=2")
    about = ("--concept", "cat", "dog", "--synonyms", "cat=kitten,kitty")
    result = call(capsys, *merging, *about, "--export", "delta", "--out", tmp_path)
    assert (result["kind"], result["method"], result["config"]["lamb"]) == ("low_rank", "mace_fuse", 2.0)
    assert {"seconds", "peak_memory_mb", "edit_bytes"} <= set(result)
    found, (cat, dog) = load_edit(tmp_path), map(load_edit, erased)
    task = MergeTask((Chain.of([cat], [0.5]), dog), (Concept("cat", ("kitten", "kitty")), Concept("dog")))
    wanted = registry.load("method", "mace_fuse")(lamb=2.0).fit(load_model(folder), task)
    (exported,) = map(load_file, result["export"])
    assert set(found.sites()) == set(wanted.sites()) and len(exported) == len(wanted.sites())
    for site in wanted.sites():
        torch.testing.assert_close(found.delta(site), wanted.delta(site))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["task"]["edits"] == [erased[0] + "@0.5", erased[1]] and config["model"] == folder
    assert [concept["name"] for concept in config["task"]["concepts"]] == ["cat", "dog"]


def test_learnt_words_say_what_their_edits_are_about(
    folder: str, learnt: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = call(capsys, "compose", *learnt, "--model", folder, "--method", "custom_diffusion_merge", "--out", tmp_path)
    merged, given = load_edit(Path(result["edit"])), [load_edit(file) for file in learnt]
    assert result["kind"] == "chain" and [part.kind() for part, _ in merged.parts()] == ["token", "token", "low_rank"]
    assert merged.info.triggers == tuple(word for edit in given for word in edit.info.triggers)
    model = load_model(folder)
    site, layer = next(iter(model.arch.text_linears().items()))
    for edit in given:
        with model.attached(edit):
            prompt = f"photo of a {edit.info.triggers[0]}"
            text = model.arch.encode([prompt])
            last = int(text.length)
            rows = text.hidden[0, last - 2 : last]  # the word and EOT
            alone = layer(rows)
        with model.attached(merged):
            torch.testing.assert_close(model.arch.encode([prompt]).hidden[0, last - 2 : last], rows)
            change = layer(rows) - rows @ load_model(folder).arch.text_linears()[site].weight.T
            assert (layer(rows) - alone).norm() < 1e-3 * change.norm()


def test_mistakes_of_merging_get_one_line(
    folder: str, erased: list[str], learnt: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--out", tmp_path / "out")
    fusing = ("--model", folder, "--method", "mace_fuse", *out)
    about = ("--concept", "cat", "dog")
    assert "two or more" in fails(capsys, "compose", erased[0], *fusing)
    assert "unknown method 'mace_fuze'; did you mean mace_fuse" in fails(capsys, "compose", *erased, "--method", "mace_fuze", *out)
    assert "uce is a method to erase, not to merge; give one of: " in fails(capsys, "compose", *erased, "--method", "uce", *out)
    assert "needs low_rank; chain it: compose without --method" in fails(capsys, "compose", erased[0], learnt[0], *fusing, *about)
    assert "brings no new words that say what it is about; give the concepts (--concept)" in fails(capsys, "compose", *erased, *fusing)
    assert "number of concepts is 1, of edits 2" in fails(capsys, "compose", *erased, *fusing, "--concept", "cat")
    assert "--synonyms is about a concept, and none is given" in fails(capsys, "compose", *learnt, *fusing, "--synonyms", "kitten")
    assert "unknown option of mace_fuse 'lam'" in fails(capsys, "compose", *erased, *fusing, *about, "--set", "lam=1")
    assert "unknown export format 'deltas'" in fails(capsys, "compose", *erased, *fusing, *about, "--export", "deltas")
    for option in (("--set", "lamb=1"), ("--concept", "cat"), ("--style",), ("--export", "delta")):
        assert f"{option[0]} is for a method that merges" in fails(capsys, "compose", *erased, *option, *out)
    assert not (tmp_path / "out" / "edit.safetensors").exists()


def test_an_edit_of_another_base_is_told(folder: str, erased: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method = registry.load("method", "mace_fuse")()
    other = Model(SD.tiny(seed=1))
    deltas = {site: 0.1 * layer.weight for site, layer in other.arch.text_linears().items()}
    theirs = save_edit(LowRank.from_deltas(deltas, other.info(method)), tmp_path / "theirs.safetensors")
    about = ["--concept", "cat", "dog", "--out", str(tmp_path / "out")]
    argv = ["compose", erased[0], str(theirs), "--model", folder, "--method", "mace_fuse", *about]
    capsys.readouterr()
    assert main(argv) == 0
    assert "palimpsest: warning:" in capsys.readouterr().err
    assert "was fitted on another base" in fails(capsys, *argv, "--strict")
