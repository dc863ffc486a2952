"""A model whose denoiser is left in its file gives the edits that it gives when it is loaded, and reads what they need."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.closed_form.uce import UCE
from tests.toolkit.ldm import FAMILIES, Writer, parameters, peak_of, shrink, stored, write_all_configs, write_sparse
from toolkit.arch.ldm import Layout
from toolkit.arch.sd import SD
from toolkit.arch.single_file import recognise
from toolkit.cli import main
from toolkit.concepts import Concept, EraseTask
from toolkit.edits.base import Edit
from toolkit.edits.chain import Chain
from toolkit.edits.delta import Delta
from toolkit.edits.low_rank import LowRank
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError
from toolkit.io.files import load_edit, save_edit
from toolkit.io.places import Place
from toolkit.model import Model, load_model

TASK = EraseTask((Concept("cat", anchor="dog"),), templates=("a {}",))
ERASE = ("--method", "uce", "--concept", "cat", "--anchor", "dog", "--template", "a {}")


def is_left(model: Model) -> bool:
    """Whether nothing of the denoiser and of the image decoder is in memory."""
    parts = model.arch.components()
    return all(value.is_meta for part in ("denoiser", "vae") for value in parts[part].parameters())


def same(one: Edit, other: Edit) -> bool:
    mine, theirs = one.tensors(), other.tensors()
    return one.info == other.info and mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each tensor is asked for from now on, by its key."""
    counts: Counter[str] = Counter()
    read = Place.read
    monkeypatch.setattr(Place, "read", lambda place: counts.update([place.slot.key]) or read(place))
    return counts


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize(
    ("version", "kept", "dtype"), [("sd1", "float32", "float32"), ("sd2", "float16", "float32"), ("sdxl", "float32", "float16")]
)
def test_it_is_the_loaded_model(write: Writer, seen: Counter[str], tmp_path: Path, kind: str, version: str, kept: str, dtype: str) -> None:
    model, path = write(version, kept)
    source = str(path if kind == "file" else model.save(tmp_path / "model"))
    loaded = load_model(source, dtype=dtype)
    assert not seen, "what is loaded as a whole is not read tensor by tensor"
    lazy = load_model(source, dtype=dtype, lazily=True)
    assert lazy.fingerprint == loaded.fingerprint and lazy.arch.dtype == loaded.arch.dtype and lazy.arch.device == loaded.arch.device
    assert sum(seen.values()) == len(dict(lazy.arch.components()["denoiser"].named_parameters())), "the fingerprint looks at each once"
    seen.clear()
    edits = [UCE().fit(each, TASK) for each in (loaded, lazy)]
    reading = {key for key in seen if key.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    assert len(reading) == len(lazy.arch.text_linears()) and set(seen) == reading and set(seen.values()) == {1}
    assert same(*edits) and is_left(lazy)
    for site, linear in loaded.arch.text_linears().items():
        assert torch.equal(lazy.arch.text_linears()[site].weight, linear.weight) and not linear.weight.requires_grad


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets a process's peak when asked to")
def test_memory_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file of 100 MB the model and a look at each layer that reads text take a tenth of it."""
    configs = write_all_configs(tmp_path / "configs")
    shrink(monkeypatch, configs)
    config = configs / "sd1" / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "block_out_channels": [64, 640]}))
    layout = Layout(SD.single_files["sd1"], configs / "sd1")
    tensors = stored(parameters(SD.hollow(layout.configs).components()), layout)
    path = write_sparse({key: tuple(value.shape) for key, value in tensors.items()}, tmp_path / "model.safetensors")

    def look() -> None:
        model = load_model(str(path), lazily=True)
        assert sum(float(linear.weight.abs().sum()) for linear in model.arch.text_linears().values()) == 0 and is_left(model)

    look()  # what is imported once is imported now
    before = peak_of(lambda: None)
    lazily, loaded = peak_of(look) - before, peak_of(lambda: load_model(str(path))) - before
    size = path.stat().st_size / 1024
    assert lazily < size / 3 < 1.5 * size < loaded, "in float32 it is twice the file"


def test_edits_are_attached_to_it_and_come_off(write: Writer) -> None:
    model, path = write("sd1", "float16")
    lazy, (site, linear) = load_model(str(path), dtype="float16", lazily=True), next(iter(model.arch.text_linears().items()))
    rows = {"<toy>": {"text_encoder": torch.ones(1, 32)}}
    edit = Chain.of(
        [
            TokenEdit.from_rows(rows),
            LowRank.from_deltas({site: torch.full(linear.weight.shape, 0.1)}),
            Delta.from_deltas({"denoiser.conv_in.bias": torch.ones(8), "vae.decoder.conv_in.bias": torch.ones(16)}),
        ]
    )
    task = EraseTask((Concept("<toy>", anchor="dog"),), templates=("a {}",))
    before = lazy.arch.text_linears()[site].weight
    for each in (model, lazy):
        each.attach(edit)
    mine, theirs = parameters(model.arch.components()), parameters(lazy.arch.components())
    touched = edit.parameter_names()
    assert len(touched) == 3 and all(torch.equal(mine[name], theirs[name]) for name in touched)
    assert {name for name, value in theirs.items() if not value.is_meta and not name.startswith("text_encoder.")} == set(touched)
    assert same(UCE().fit(model, task), UCE().fit(lazy, task))
    lazy.detach_all()
    assert torch.equal(lazy.arch.text_linears()[site].weight, before)
    model.detach_all()
    assert same(UCE().fit(model, TASK), UCE().fit(lazy, TASK))


def test_of_several_variants_it_reads_the_one_that_is_loaded(tiny: Model, tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "model")
    weights = source / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({key: value.half() + 1 for key, value in load_file(weights).items()}, weights.with_suffix(".fp16.safetensors"))
    loaded, lazy = (load_model(str(source), lazily=lazily) for lazily in (False, True))
    assert lazy.fingerprint == loaded.fingerprint and same(UCE().fit(loaded, TASK), UCE().fit(lazy, TASK))


@pytest.mark.parametrize("lost", ["denoiser.mid_block.resnets.0.conv1.weight", "text_encoder.final_layer_norm.bias"])
def test_an_incomplete_file_is_told(write: Writer, lost: str) -> None:
    _, path = write()
    key = recognise(path).layout.slots([lost])[lost].key
    tensors = load_file(path)
    value = tensors.pop(key)
    for changed in (tensors, {**tensors, key: value[:-1].clone()}):
        save_file(changed, path)
        with pytest.raises(UserError, match="give a complete checkpoint") as error:
            load_model(str(path), lazily=True)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("version", FAMILIES)
def test_the_command_line_leaves_the_rest_in_its_file(write: Writer, seen: Counter[str], tmp_path: Path, version: str) -> None:
    model, path = write(version)
    for source, name in ((path, "checkpoint.safetensors"), (model.save(tmp_path / "model"), "checkpoint")):
        out = tmp_path / f"out-{source.stem}-{source.is_dir()}"
        expected = UCE().fit(load_model(str(source)), EraseTask(TASK.concepts, (), TASK.templates))
        seen.clear()
        assert main(["erase", "--model", str(source), *ERASE, "--export", "checkpoint", "--strict", "--out", str(out)]) == 0
        assert same(load_edit(out), expected)
        times = {seen[key] for key in seen if key.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
        assert times == {3}, "for the fingerprint, for fitting, and to check what the edit was fitted on"
        model.attach(expected)
        mine, theirs = parameters(model.arch.components()), parameters(load_model(str(out / name)).arch.components())
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
        model.detach_all()


def test_a_checkpoint_that_cannot_be_copied_is_saved_from_memory(tiny: Model, tmp_path: Path) -> None:
    """New words go into a folder's tokenizer, which takes the whole model."""
    source, token = tiny.save(tmp_path / "model"), TokenEdit.from_rows({"<toy>": {"text_encoder": torch.ones(1, 32)}})
    file = save_edit(token, tmp_path / "toy.safetensors")
    argv = ["erase", "--model", str(source), "--edit", str(file), *ERASE, "--export", "checkpoint", "--out", str(tmp_path / "out")]
    assert main(argv) == 0
    for edit in (token, load_edit(tmp_path / "out")):
        tiny.attach(edit)
    saved = load_model(str(tmp_path / "out" / "checkpoint"))
    mine, theirs = parameters(tiny.arch.components()), parameters(saved.arch.components())
    assert all(torch.equal(mine[name], theirs[name]) for name in mine if name.startswith(("denoiser.", "vae.")))
    assert torch.equal(tiny.arch.encode(["a <toy>"]).hidden, saved.arch.encode(["a <toy>"]).hidden)
