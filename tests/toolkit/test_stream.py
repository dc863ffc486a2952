"""An edit streamed into a checkpoint gives what attaching it and saving gives, and touches nothing else."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.toolkit.ldm import FAMILIES, Writer, peak_of, stored, write_sparse
from toolkit import registry
from toolkit.arch.ldm import Layout
from toolkit.edits.base import Edit, EditInfo
from toolkit.edits.chain import Chain
from toolkit.edits.delta import Delta
from toolkit.edits.low_rank import LowRank
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError
from toolkit.io import stream
from toolkit.io.header import read_header
from toolkit.io.stream import write_checkpoint
from toolkit.model import DTYPES, Model, load_model

TYPES = ("float32", "float16")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / 4


def edit_of(model: Model) -> Edit:
    """Factors for every layer that reads text, and deltas of what single files store in another form, one upon the other."""
    factors = {
        site: (random(linear.out_features, 3, seed=i), random(3, linear.in_features, seed=-i))
        for i, (site, linear) in enumerate(model.arch.text_linears().items())
    }
    written = ("q_proj.weight", "v_proj.bias", "text_projection.weight", "fc1.bias", "token_embedding.weight", "to_k.weight", ".k.weight")
    parts = {part: module for part, module in model.arch.components().items()}
    deltas = {
        f"{part}.{name}": random(*value.shape, seed=len(name))
        for part, module in parts.items()
        for name, value in module.named_parameters()
        if name.endswith(written) and (part != "denoiser" or ".0.attn" in name)
    }
    assert any(name.startswith("vae.") for name in deltas)
    return Chain.of([Delta.from_deltas(deltas), LowRank.from_factors(factors, EditInfo(base=model.fingerprint))], [-1.0, 0.5])


def raw(path: Path) -> dict[str, bytes]:
    """The bytes of each tensor, and of the header."""
    data, header = path.read_bytes(), read_header(path)
    begin = min(place.begin for place in header.tensors.values())
    return {"": data[:begin], **{key: data[place.begin : place.end] for key, place in header.tensors.items()}}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("version", FAMILIES)
def test_a_file_becomes_what_the_edited_model_is(write: Writer, configs: Path, tmp_path: Path, version: str, dtype: str) -> None:
    model, path = write(version, dtype)
    edit, before = edit_of(model), raw(path)
    out = write_checkpoint(path, edit, tmp_path / "new" / "edited.safetensors", strict=True)
    layout = Layout(model.arch.single_files[version], configs / version)
    touched = {slot.key for slot in layout.slots(edit.parameter_names()).values()}
    model.attach(edit)
    state = {f"{part}.{name}": value for part, module in model.arch.components().items() for name, value in module.named_parameters()}
    expected, tensors = stored(state, layout), load_file(out)
    assert all(torch.equal(tensors[key], value) and tensors[key].dtype == value.dtype for key, value in expected.items())
    after = raw(out)
    assert before.keys() == after.keys() and {key for key in before if before[key] != after[key]} == touched
    assert raw(path) == before and sorted(os.listdir(tmp_path)) == ["model.safetensors", "new"] and len(os.listdir(out.parent)) == 1
    with safe_open(out, framework="pt") as file:
        assert file.metadata()["author"] == "somebody"


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("family", registry.names("arch"))
def test_a_folder_becomes_what_the_edited_model_is(tmp_path: Path, family: str, dtype: str) -> None:
    arch = registry.load("arch", family).tiny(seed=3)
    arch.pipe.to(DTYPES[dtype])
    model = Model(arch)
    source = model.save(tmp_path / "model")
    (source / "README.md").write_text("mine")
    edit = edit_of(model)
    out = write_checkpoint(source, edit, tmp_path / "edited", strict=True)
    model.attach(edit)
    expected = model.save(tmp_path / "expected")
    files = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    assert files == {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
    for file in files:
        if file.suffix != ".safetensors":
            assert (out / file).read_bytes() == (source / file).read_bytes()
            continue
        theirs, mine, old = raw(expected / file), raw(out / file), raw(source / file)
        assert {key: mine[key] for key in theirs if key} == {key: theirs[key] for key in theirs if key}
        assert mine[""] == old[""] and mine != old
    assert sorted(os.listdir(tmp_path)) == ["edited", "expected", "model"]


def test_shards_variants_and_other_spellings(tiny: Model, tmp_path: Path) -> None:
    source, edit = tiny.save(tmp_path / "model"), edit_of(tiny)
    tiny.attach(edit)
    expected = load_file(tiny.save(tmp_path / "expected") / "unet" / "diffusion_pytorch_model.safetensors")
    whole = source / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    for number in (0, 1):
        part = dict(list(tensors.items())[number::2])
        save_file(part, whole.with_name(f"diffusion_pytorch_model-0000{number + 1}-of-00002.safetensors"))
    whole.rename(whole.with_name("diffusion_pytorch_model.fp16.safetensors"))
    encoder = source / "text_encoder" / "model.safetensors"
    save_file({key.removeprefix("text_model."): value for key, value in load_file(encoder).items()}, encoder)
    out = write_checkpoint(source, edit, source)  # into its own place
    variant = load_file(out / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    shards = [load_file(out / "unet" / f"diffusion_pytorch_model-0000{number}-of-00002.safetensors") for number in (1, 2)]
    assert all(torch.equal(variant[key], expected[key]) and torch.equal((shards[0] | shards[1])[key], expected[key]) for key in expected)
    theirs = load_file(tmp_path / "expected" / "text_encoder" / "model.safetensors")
    assert all(torch.equal(value, theirs[f"text_model.{key}"]) for key, value in load_file(encoder).items())
    (source / "unet" / "diffusion_pytorch_model.bin").touch()
    with pytest.raises(UserError, match="may hold the same weights again"):
        write_checkpoint(source, edit, source)


def test_a_file_is_replaced_by_itself(write: Writer, tmp_path: Path) -> None:
    model, path = write()
    edit = edit_of(model)
    expected = raw(write_checkpoint(path, edit, tmp_path / "other.safetensors"))
    write_checkpoint(path, edit, path)
    assert raw(path) == expected
    loaded = load_model(str(path))
    assert not torch.equal(*(arch.pipe.text_encoder.get_input_embeddings().weight for arch in (loaded.arch, model.arch)))


@pytest.mark.parametrize("when", ["copy", "patch", "rename"])
@pytest.mark.parametrize("same", [False, True])
def test_an_interruption_changes_nothing(write: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, same: bool) -> None:
    model, path = write()
    folder, edit = model.save(tmp_path / "model"), edit_of(model)
    targets = (path, folder) if same else (tmp_path / "out.safetensors", tmp_path / "out")
    if not same:
        (tmp_path / "out.safetensors").write_bytes(b"old")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    done = 0

    def interrupted(*args: object, **kwargs: object) -> None:
        nonlocal done
        done += 1
        if when != "patch" or done > 3:
            raise KeyboardInterrupt
        real(*args, **kwargs)  # type: ignore[arg-type]

    target, name = {"copy": (stream.shutil, "copyfile"), "patch": (stream.Change, "apply"), "rename": (stream.os, "fsync")}[when]
    real = getattr(target, name)
    monkeypatch.setattr(target, name, interrupted)
    for source, out in zip((path, folder), targets, strict=True):
        with pytest.raises(KeyboardInterrupt):
            write_checkpoint(source, edit, out)
    monkeypatch.undo()
    assert done and {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert same or not (tmp_path / "out").exists()


def test_what_does_not_fit_is_told_before_anything_is_written(write: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = write()
    folder, file, out = model.save(tmp_path / "model"), tmp_path / "out.safetensors", tmp_path / "out"
    monkeypatch.setattr(stream, "replacing", None)
    monkeypatch.setattr(stream, "replacing_folder", None)
    site, linear = next(iter(model.arch.text_linears().items()))
    fits = LowRank.from_deltas({site: torch.ones(linear.weight.shape)})
    wide = LowRank.from_deltas({site: torch.ones(linear.out_features, 5)})
    token = TokenEdit.from_rows({"<toy>": {"text_encoder": torch.ones(1, 32)}})
    for edit, message in [
        (wide, rf"edit of {site}.weight is \[{linear.out_features}, 5\]"),
        (Delta.from_deltas({"denoiser.nothing.weight": torch.ones(1)}), "edit changes denoiser.nothing.weight"),
        (Delta.from_deltas({"text_encoder_2.final_layer_norm.bias": torch.ones(1)}), "edit changes text_encoder_2"),
        (token, "a token edit cannot be written into a checkpoint"),
        (Chain.of([fits, token]), "a token edit cannot be written into a checkpoint"),
    ]:
        for source, target in ((path, file), (folder, out)):
            with pytest.raises(UserError, match=message) as error:
                write_checkpoint(source, edit, target)
            assert "\n" not in str(error.value)
    for source, target, message in [
        (path, out, "is not one .safetensors file"),
        (folder, file, "is a file or inside it"),
        (folder, folder / "inside", "is a file or inside it"),
        (tmp_path / "nothing.safetensors", file, "no file"),
        (tmp_path / "nothing.ckpt", file, "is a pickle"),
    ]:
        with pytest.raises(UserError, match=message):
            write_checkpoint(source, fits, target)
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("attn2.to_k.weight"))
    ema = "model_ema." + key.removeprefix("model.").replace(".", "")
    save_file({**tensors, ema: tensors[key].clone()}, path)
    with pytest.raises(UserError, match="averaged"):
        write_checkpoint(path, edit_of(model), file)
    save_file({**tensors, key: tensors[key].to(torch.float8_e4m3fn)}, path)
    with pytest.raises(UserError, match="is stored as F8_E4M3, need F64, F32, F16, BF16"):
        write_checkpoint(path, edit_of(model), file)
    assert not file.exists() and not out.exists()


@pytest.mark.parametrize("version", FAMILIES)
def test_an_edit_of_another_base_is_told(write: Writer, tmp_path: Path, version: str) -> None:
    model, path = write(version, "float16")
    model.to(dtype=torch.float32)
    linears = model.arch.text_linears()
    folder, out = model.save(tmp_path / "model"), tmp_path / "out.safetensors"

    def fitted_on(base: Model) -> LowRank:
        factors = {site: (torch.ones(linear.out_features, 1), torch.ones(1, linear.in_features)) for site, linear in linears.items()}
        return LowRank.from_factors(factors, EditInfo("uce", base=base.fingerprint))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for base in (load_model(str(path)), load_model(str(path), dtype="float16")):
            write_checkpoint(path, fitted_on(base), out, strict=True)
            write_checkpoint(folder, fitted_on(base), tmp_path / "out", strict=True)
    out.unlink()
    other = Chain.of([fitted_on(Model(FAMILIES[version].tiny()))])
    for source, target in ((path, out), (folder, tmp_path / "out")):
        with pytest.raises(UserError, match="uce edit was fitted on another base than"):
            write_checkpoint(source, other, target, strict=True)
        assert not out.exists()
        with pytest.warns(UserWarning, match="uce edit was fitted on another base than"):
            write_checkpoint(source, other, target)
        out.unlink(missing_ok=True)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets a process's peak when asked to")
def test_memory_stays_small(write: Writer, tmp_path: Path) -> None:
    """Editing a file of 64 MB needs no more memory than editing one of a few hundred kB, but for what one tensor needs."""
    model, path = write()
    large, out = tmp_path / "large.safetensors", tmp_path / "out.safetensors"
    shapes = {key: tuple(value.shape) for key, value in load_file(path).items()}
    write_sparse({**shapes, "first_stage_model.rest": (32, 1024, 1024)}, large)
    site, linear = next(iter(model.arch.text_linears().items()))
    edit = LowRank.from_factors({site: (torch.ones(linear.out_features, 1), torch.ones(1, linear.in_features))})
    write_checkpoint(path, edit, out)  # what is loaded once is loaded now

    small, more = (peak_of(lambda file=file: write_checkpoint(file, edit, out)) for file in (path, large))
    assert more - small < 16 * 1024 and out.stat().st_size > 64 * 2**20
