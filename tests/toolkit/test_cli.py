from __future__ import annotations

import json
import pickle
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.toolkit.ldm import Writer, parameters
from toolkit import registry
from toolkit.arch.sd import SD
from toolkit.cli import main, render
from toolkit.commands.customize import subjects
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError
from toolkit.io.files import load_edit, save_edit
from toolkit.model import Model, load_model
from toolkit.sample import sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model on disk."""
    return str(Model(SD.tiny()).save(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def edits(folder: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two erasing edits made by the command line."""
    outs = [str(tmp_path_factory.mktemp(name)) for name in ("cat", "dog")]
    for name, out in zip(("cat", "dog"), outs, strict=True):
        assert main(["erase", "--model", folder, "--method", "uce", "--concept", name, "--out", out]) == 0
    return outs


def call(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    """A command that must succeed; its JSON object."""
    capsys.readouterr()
    code = main([*map(str, argv), "--json"])
    told = capsys.readouterr()
    assert code == 0, told.err
    return json.loads(told.out.splitlines()[-1])


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """A command that must be the user's mistake; its line on stderr."""
    capsys.readouterr()
    assert main(list(map(str, argv))) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1 and told.err.startswith("palimpsest: ")
    return told.err


def test_methods_lists_every_method_with_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    rows = call(capsys, "methods")["methods"]
    assert [row["name"] for row in rows] == registry.names("method")
    uce = next(row for row in rows if row["name"] == "uce")
    families = ["sd", "sdxl", "sd3", "flux"]
    assert uce == {"name": "uce", "kind": "erase", "architectures": families, "paper": uce["paper"], "training_free": True}
    assert main(["methods"]) == 0
    assert "uce" in capsys.readouterr().out


def test_generate_writes_the_images_that_sample_gives(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--seed", 5, "--steps", 2, "--n", 2, "--out", tmp_path)
    result = call(capsys, "generate", "--model", folder, "--prompt", "a cat", "a dog", *options)
    names = [f"{i:04d}.png" for i in range(4)]
    assert [Path(name).name for name in result["images"]] == names
    rows = json.loads(Path(result["prompts"]).read_text())
    pairs = [("a cat", 5), ("a cat", 6), ("a dog", 5), ("a dog", 6)]
    assert rows == [{"file": file, "prompt": prompt, "seed": seed} for file, (prompt, seed) in zip(names, pairs, strict=True)]
    expected = sample(load_model(folder), ["a cat", "a dog"], [6, 5], steps=2)
    for file, pixels in zip(result["images"][1:3], expected, strict=True):
        with Image.open(file) as image:
            drawn = torch.tensor(list(image.tobytes())).view(image.height, image.width, 3).permute(2, 0, 1) / 255
        torch.testing.assert_close(drawn, pixels, atol=0.51 / 255 + 1e-4, rtol=0)
    with Image.open(result["grid"]) as sheet:
        assert sheet.size == (2 * image.width + 2, 2 * image.height + 2)
    assert result["seconds"] > 0 and result["peak_memory_mb"] > 0


def test_erase_writes_a_complete_result(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--concept", "cat", "--synonyms", "kitty", "tabby", "--anchor", "dog", "--preserve", "a car")
    described = (*words, "--set", "lamb=0.1", "rows=last_subject")
    result = call(capsys, "erase", "--model", folder, "--method", "uce", *described, "--out", tmp_path)
    assert set(result) == {"edit", "method", "config", "seconds", "peak_memory_mb", "edit_bytes"}
    assert (result["method"], result["config"]["lamb"], result["config"]["rows"]) == ("uce", 0.1, "last_subject")
    assert Path(result["edit"]) == tmp_path / "edit.safetensors" and Path(result["edit"]).stat().st_size == result["edit_bytes"]
    assert json.loads((tmp_path / "result.json").read_text()) == result
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["config"] == result["config"]
    assert config["task"]["concepts"] == [{"name": "cat", "synonyms": ["kitty", "tabby"], "anchor": "dog", "kind": "object"}]
    assert config["task"]["preserve"] == ["a car"]
    edit, model = load_edit(tmp_path / "edit.safetensors"), load_model(folder)
    assert edit.info.method == "uce" and edit.info.base == model.fingerprint
    assert sorted(edit.sites()) == sorted(f"{site}.weight" for site in model.arch.text_linears())


def test_synonyms_and_anchors_of_several_concepts(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    described = ("--concept", "cat", "dog", "--synonyms", "cat=kitty,tabby", "--anchor", "dog=car", "--style")
    call(capsys, "erase", "--model", folder, "--method", "uce", *described, "--out", tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["task"]["concepts"] == [
        {"name": "cat", "synonyms": ["kitty", "tabby"], "anchor": None, "kind": "style"},
        {"name": "dog", "synonyms": [], "anchor": "car", "kind": "style"},
    ]
    base = ("erase", "--model", folder, "--method", "uce", "--concept", "cat", "dog", "--out", tmp_path)
    assert "which is not said; write --synonyms cat=kitty" in fails(capsys, *base, "--synonyms", "kitty")
    assert "unknown concept in --anchor 'cta'; did you mean cat?" in fails(capsys, *base, "--anchor", "cta=dog")


def test_templates_may_stand_in_a_file(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "contexts.txt"
    base = ("erase", "--model", folder, "--method", "uce", "--concept", "cat", "--out", tmp_path, "--template", "a {}", file)
    assert "no file" in fails(capsys, *base)
    file.write_text("\n \n")
    assert "nothing in" in fails(capsys, *base)
    file.write_text("a photo of a {}\n\n{} on a table \n")
    call(capsys, *base)
    assert json.loads((tmp_path / "config.json").read_text())["task"]["templates"] == ["a {}", "a photo of a {}", "{} on a table"]


def test_what_is_preserved_may_stand_in_a_file_or_be_the_embedded_world(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kept.txt").write_text("car\nhouse\n")
    base = ("erase", "--model", folder, "--method", "uce", "--concept", "cat", "--synonyms", "gun", "--out", tmp_path)
    assert main(list(map(str, base))) == 0
    assert "warning: nothing was preserved" in capsys.readouterr().err
    call(capsys, *base, "--preserve", tmp_path / "kept.txt", "--preserve-world")
    kept = json.loads((tmp_path / "config.json").read_text())["task"]["preserve"]
    call(capsys, "erase", "--model", folder, "--method", "uce", "--concept", "weapon", "--preserve-world", "--out", tmp_path)
    assert not {"pistol", "knife"} & set(json.loads((tmp_path / "config.json").read_text())["task"]["preserve"])
    assert kept[:2] == ["car", "house"] and "dog" in kept and not {"cat", "pistol"} & set(kept) and len(set(kept)) == len(kept)


def test_edit_option_attaches_with_its_scale(folder: str, edits: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = f"{edits[0]}/edit.safetensors"
    drawing = ("generate", "--model", folder, "--prompt", "a cat", "--out", tmp_path)

    def image(*options: str) -> bytes:
        result = call(capsys, *drawing, "--steps", 2, *options)
        return Path(result["images"][0]).read_bytes()

    plain = image()
    assert image("--edit", file + "@0") == plain
    assert image("--edit", file) == image("--edit", edits[0] + "@1.0") != plain
    assert "has the scale 'half', needs a number" in fails(capsys, *drawing, "--edit", file + "@half")


def test_compose_merges_low_rank_edits_into_their_sum(edits: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = call(capsys, "compose", edits[0] + "@0.5", edits[1], "--out", tmp_path)
    assert result["kind"] == "low_rank" and result["edit_bytes"] > 0
    composed, (cat, dog) = load_edit(Path(result["edit"])), (load_edit(Path(out) / "edit.safetensors") for out in edits)
    for site in cat.sites():
        torch.testing.assert_close(composed.delta(site), 0.5 * cat.delta(site) + dog.delta(site), atol=1e-6, rtol=1e-5)
    assert composed.info.base == cat.info.base


def test_compose_chains_what_cannot_be_merged(folder: str, edits: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_model(folder)
    width = next(iter(model.arch.token_embeddings().values())).embedding_dim
    component = next(iter(model.arch.token_embeddings()))
    token = tmp_path / "toy.safetensors"
    save_edit(TokenEdit.from_rows({"<toy>": {component: torch.randn(1, width)}}), token)
    result = call(capsys, "compose", token, edits[0], edits[1], "--out", tmp_path / "both")
    assert result["kind"] == "chain"
    chain = load_edit(Path(result["edit"]))
    assert [type(part).kind() for part, _ in chain.parts()] == ["token", "low_rank"]
    model.attach(chain)
    assert model.arch.encode(["a <toy>"]).hidden.isfinite().all()
    assert "composing needs two or more" in fails(capsys, "compose", token, "--out", tmp_path / "one")


def test_compose_tells_an_edit_of_another_base(edits: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = str(Model(SD.tiny(seed=1)).save(tmp_path / "other"))
    assert main(["erase", "--model", other, "--method", "uce", "--concept", "cat", "--out", str(tmp_path / "theirs")]) == 0
    argv = ["compose", edits[0], str(tmp_path / "theirs"), "--out", str(tmp_path / "out")]
    capsys.readouterr()
    assert main(argv) == 0
    assert "palimpsest: warning:" in capsys.readouterr().err
    assert "was fitted on another base" in fails(capsys, *argv, "--strict")


def test_export_writes_what_erase_exports(folder: str, edits: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    erase = ("erase", "--model", folder, "--method", "uce", "--concept", "cat", "--out", tmp_path / "erased")
    (at_once,) = call(capsys, *erase, "--export", "diffusers-lora")["export"]
    assert Path(at_once).parent == tmp_path / "erased" / "diffusers-lora"
    exporting = ("export", edits[0], "--model", folder, "--format")
    (later,) = call(capsys, *exporting, "diffusers-lora", "--out", tmp_path / "lora")["files"]
    once, again = load_file(at_once), load_file(later)
    assert once.keys() == again.keys() and all(torch.equal(once[key], again[key]) for key in once)
    scaled = ("export", edits[0] + "@0.5", "--model", folder, "--format", "delta")
    (half,) = call(capsys, *scaled, "--out", tmp_path / "half.safetensors")["files"]
    (whole,) = call(capsys, *exporting, "delta", "--out", tmp_path / "whole.safetensors")["files"]
    for key, delta in load_file(whole).items():
        torch.testing.assert_close(load_file(half)[key], delta / 2)
    assert "unknown export format 'deltas'; did you mean delta?" in fails(capsys, *exporting, "deltas", "--out", tmp_path)
    assert "cannot be written as embedding" in fails(capsys, *exporting, "embedding", "--out", tmp_path)


def test_checkpoints_keep_their_form(
    folder: str, write: Writer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder becomes a folder and a file a file, copied with the edit merged in; no model is loaded to export an edit."""
    _, file = write("sd1")
    for source, name in ((folder, "checkpoint"), (str(file), "checkpoint.safetensors")):
        erase = ("erase", "--model", source, "--method", "uce", "--concept", "cat", "--export", "checkpoint", "--out", tmp_path / "out")
        (at_once,) = call(capsys, *erase)["export"]
        assert at_once == str(tmp_path / "out" / name)
        exporting = ("export", tmp_path / "out", "--model", source, "--format", "checkpoint", "--strict", "--out")
        with monkeypatch.context() as patched:
            patched.setattr("toolkit.commands.export.open_model", None)
            (later,) = call(capsys, *exporting, tmp_path / f"later-{name}")["files"]
        model = load_model(source)
        model.attach(load_edit(tmp_path / "out"))
        edited, once, again = (parameters(m.arch.components()) for m in (model, load_model(at_once), load_model(later)))
        assert all(torch.equal(once[key], edited[key]) and torch.equal(again[key], edited[key]) for key in edited)
        then = ("erase", "--model", source, "--method", "uce", "--concept", "dog", "--edit", tmp_path / "out", "--export", "checkpoint")
        (both,) = call(capsys, *then, "--out", tmp_path / f"then-{name}")["export"]
        model.attach(load_edit(tmp_path / f"then-{name}"))
        whole = parameters(model.arch.components())
        assert all(torch.equal(value, whole[key]) for key, value in parameters(load_model(both).arch.components()).items())
    (loaded,) = call(capsys, *exporting, tmp_path / "as-folder")["files"]
    assert (Path(loaded) / "model_index.json").is_file()
    (half,) = call(capsys, *exporting, tmp_path / "half", "--dtype", "float16")["files"]
    assert load_file(Path(half) / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.bias"].dtype == torch.float16
    from_folder = ("export", tmp_path / "out", "--model", folder, "--format", "checkpoint", "--out", tmp_path / "x.safetensors")
    assert "is a folder, and" in fails(capsys, *from_folder)


def test_mistakes_get_one_line(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", tmp_path)
    erase = ("erase", "--model", folder, "--method", "uce", "--concept", "cat", *out)
    assert "unknown command 'eraze'; did you mean erase" in fails(capsys, "eraze")
    assert "unknown method 'ucee'; did you mean uce" in fails(capsys, "erase", "--method", "ucee", "--concept", "cat", *out)
    assert "unknown option of uce 'lam'; did you mean lamb?" in fails(capsys, *erase, "--set", "lam=1")
    assert "option lamb of uce is 'much', needs float" in fails(capsys, *erase, "--set", "lamb=much")
    assert "is not of the form K=V" in fails(capsys, *erase, "--set", "lamb")
    assert "unknown option of palimpsest erase '--anchr'; did you mean --anchor" in fails(capsys, *erase, "--anchr", "dog")
    assert "the following arguments are required: --concept" in fails(capsys, "erase", "--method", "uce", *out)
    assert "empty concept ' '" in fails(capsys, "erase", "--method", "uce", "--concept", " ", *out)
    assert "is a method to erase, not to customize" in fails(
        capsys, "customize", "--method", "uce", "--images", tmp_path, "--class-name", "dog", "--token", "<toy>", *out
    )
    assert "--n is 0, needs at least 1" in fails(capsys, "generate", "--model", folder, "--prompt", "a", "--n", 0, *out)
    assert "device 'nowhere' cannot be used" in fails(capsys, *erase, "--device", "nowhere")
    assert "leave it out" in fails(capsys, *erase, "--offload", "--device", "cpu")
    assert "--sample-steps is for methods that train, and uce does not" in fails(capsys, *erase, "--sample-steps", 5)
    assert "give both, or none" in fails(capsys, *erase[:3], "--method", "esd", *erase[5:], "--sample-steps", 5)
    assert "tiny-missing" in fails(capsys, "generate", "--model", tmp_path / "tiny-missing", "--prompt", "a", *out)
    assert not list(tmp_path.iterdir()), "a mistake writes nothing"


def test_an_output_folder_that_cannot_be_written_is_told_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    missing = ("--model", "/no/such/model", "--out", tmp_path / "file")
    assert "is a file, need a folder" in fails(capsys, "generate", "--prompt", "a", *missing)
    assert "is a file, need a folder" in fails(capsys, "erase", "--method", "uce", "--concept", "cat", *missing)


def test_pickles_are_refused(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("edit.pt", "edit.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps({"weights": [1, 2, 3]}))
        told = fails(capsys, "generate", "--model", folder, "--prompt", "a", "--edit", tmp_path / name, "--out", tmp_path / "out")
        assert name in told


def test_customize_pairs_folders_tokens_and_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("toy/b.png", "toy/a.JPG", "toy/notes.txt", "masks/a.png", "masks/b.png", "few/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def made(**changed: list[str]) -> Any:
        given = {"images": [str(tmp_path / "toy")], "masks": [], "class_name": ["dog"], "token": ["<toy>"]}
        return subjects(Namespace(**(given | changed)))

    (subject,) = made(masks=[str(tmp_path / "masks")])
    assert [path.name for path in subject.images] == ["a.JPG", "b.png"] and [path.name for path in subject.masks] == ["a.png", "b.png"]
    assert made()[0].masks == ()
    for changed, message in (
        ({"masks": [str(tmp_path / "few")]}, "no mask for b.png"),
        ({"class_name": ["dog", "cat"]}, "2 --class-name for 1 --token"),
        ({"images": [str(tmp_path / "none")]}, "is not a folder"),
        ({"token": ["two words"]}, "is not one word"),
    ):
        with pytest.raises(UserError, match=message):
            made(**changed)


def test_failures_are_one_line_unless_debugging(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def breaks(_: object) -> None:
        raise RuntimeError("a\nb")

    monkeypatch.setattr(registry.load("command", "methods"), "run", breaks)
    assert main(["methods"]) == 1
    assert capsys.readouterr() == ("", "palimpsest: RuntimeError: a b\n")
    with pytest.raises(RuntimeError):
        main(["methods", "--debug"])


def test_process_exit_codes_and_last_line() -> None:
    def process(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "toolkit", *argv], cwd=registry.ROOT, capture_output=True, text=True)

    done = process("--json", "methods")
    assert done.returncode == 0 and "methods" in json.loads(done.stdout.splitlines()[-1])
    mistake = process("erase", "--method", "nothing-like-it", "--concept", "x", "--out", "y")
    assert mistake.returncode == 2 and mistake.stderr.startswith("palimpsest: unknown method") and mistake.stderr.count("\n") == 1
    shown = process("--help")
    assert shown.returncode == 0 and all(registry.help_line(name) in shown.stdout for name in ("erase", "generate"))


@pytest.mark.parametrize("argv", [["--help"], ["erase", "--help"], ["generate", "--help"]])
def test_help_loads_no_torch(argv: list[str]) -> None:
    code = f"import sys, toolkit.cli\ntry: toolkit.cli.main({argv!r})\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=registry.ROOT, capture_output=True).returncode == 0


def test_render_makes_tables_of_records() -> None:
    rows = [{"name": "uce", "n": 1}, {"name": "longer"}]
    text = render({"edit": "a", "n": 0.123456, "config": {"x": 1}, "rows": rows, "of": {"cat": {"n": 2}}})
    assert text.splitlines() == ["edit: a", "n: 0.1235", "config: x=1", "name    n", "uce     1", "longer", "of   n", "cat  2"]
