"""Edit files survive a round trip and damage is noticed; exports give the same images in other people's loaders."""

import json
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from toolkit.arch.sd import SD
from toolkit.edits.base import Edit, EditInfo
from toolkit.edits.chain import Chain
from toolkit.edits.delta import Delta
from toolkit.edits.low_rank import LowRank
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError
from toolkit.io.export import export
from toolkit.io.files import load_edit, replacing_folder, save_edit
from toolkit.model import Model

PROMPT = "a photo of a cat"
LAYER = "text_encoder.encoder.layers.1.self_attn.q_proj"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(model: Model, seed: int = 0, *, text: bool = False) -> LowRank:
    """Layers of different ranks, one of them dense; with text=True also one of the text encoder."""
    factors = {}
    down = random(2, 32, seed=seed) / 4
    for i, (site, linear) in enumerate(model.arch.text_linears().items()):
        own = random(1 + i % 3, 32, seed=i) / 4
        shared = down if i % 2 else own
        factors[site] = (random(linear.out_features, len(shared), seed=i + seed), shared)
    site, linear = next(iter(model.arch.lora_targets().items()))
    dense = {site: random(*linear.weight.shape, seed=seed) / 4}
    edit = LowRank.from_factors({**factors, LAYER: (random(32, 3), random(3, 32))} if text else factors)
    return LowRank(EditInfo("uce", {"lamb": 0.5}, model.fingerprint, ("esd",)), edit.up, edit.down, {**edit.dense, **dense})


def token(word: str = "<toy>", vectors: int = 1) -> TokenEdit:
    return TokenEdit.from_rows({word: {"text_encoder": random(vectors, 32)}})


def delta() -> Delta:
    sparse = torch.zeros(32, 32)
    sparse[3, 4] = 2.0
    return Delta.from_deltas({"denoiser.conv_in.bias": random(8), f"{LAYER}.weight": sparse})


def picture(pipe: Any, prompt: str = PROMPT) -> Tensor:
    """What the pipeline draws, [1, 3, h, w]."""
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, num_inference_steps=3, guidance_scale=5.0, generator=generator, output_type="pt").images


def assert_draws(pipe: Any, expected: Tensor, prompt: str = PROMPT) -> None:
    """The picture is the expected one, and not the one of the model without an edit."""
    torch.testing.assert_close(picture(pipe, prompt), expected, atol=1e-5, rtol=0)
    assert (picture(SD.tiny().pipe) - expected).abs().max() > 1e-3


# --- files ----------------------------------------------------------------------------------------------------------
def edits(model: Model) -> list[Edit]:
    inner = Chain.of([token("<pet>", 2), low_rank(model)], [1.0, 0.5])
    return [low_rank(model), token("<toy>", 3), delta(), Chain.of([inner, delta()], [1.0, -1.0])]


@pytest.mark.parametrize("number", range(4), ids=["low_rank", "token", "delta", "chain"])
def test_round_trip(tiny: Model, tmp_path: Path, number: int) -> None:
    edit = edits(tiny)[number]
    path = save_edit(edit, tmp_path / "edit.safetensors")
    for loaded in (load_edit(path), load_edit(str(tmp_path))):
        assert type(loaded) is type(edit) and json.dumps(asdict(loaded.info)) == json.dumps(asdict(edit.info))
        assert loaded.sites() == edit.sites() or sorted(loaded.sites()) == sorted(edit.sites())
        assert all(torch.equal(loaded.delta(site), edit.delta(site)) for site in edit.sites())
        assert [scale for _, scale in loaded.parts()] == [scale for _, scale in edit.parts()]
        tiny.attach(loaded)
        tiny.detach(loaded)
    first = path.read_bytes()
    assert save_edit(load_edit(path), path).read_bytes() == first, "saving is reproducible"
    assert [file.name for file in tmp_path.iterdir()] == ["edit.safetensors"]


def test_shared_factors_are_stored_once(tiny: Model, tmp_path: Path) -> None:
    down = random(2, 32)
    edit = LowRank.from_factors({site: (random(linear.out_features, 2), down) for site, linear in tiny.arch.text_linears().items()})
    tensors = load_file(save_edit(edit, tmp_path / "edit.safetensors"))
    assert [name for name in tensors if name.startswith("down")] == ["down.0"]
    assert len({id(down) for down in load_edit(tmp_path).down.values()}) == 1  # type: ignore[attr-defined]


def test_pickles_are_refused(tmp_path: Path) -> None:
    class Exploit:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    for name in ("edit.pt", "edit.bin", "edit.ckpt", "edit.pkl", "edit.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Exploit()))
        with pytest.raises(UserError, match=r"pickle|no safetensors file") as error:
            load_edit(tmp_path / name)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def header(path: Path) -> tuple[dict, dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["palimpsest"]), load_file(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2, this version reads 1"),
        ({"kind": "low_rankk"}, "did you mean low_rank"),
        ({"info": []}, "need an object with keys"),
        ({"digest": "0"}, "its tensors are not the ones that were saved"),
        ({"format": None}, "has format None"),
    ],
)
def test_unsupported_headers(tiny: Model, tmp_path: Path, change: dict, message: str) -> None:
    path = save_edit(low_rank(tiny), tmp_path / "edit.safetensors")
    old, tensors = header(path)
    save_file(tensors, path, {"palimpsest": json.dumps({**old, **change})})
    with pytest.raises(UserError, match=message) as error:
        load_edit(path)
    assert "\n" not in str(error.value)


def test_damaged_files(tiny: Model, tmp_path: Path) -> None:
    path = save_edit(low_rank(tiny), tmp_path / "edit.safetensors")
    data, (old, tensors) = path.read_bytes(), header(path)
    for damaged, message in [
        (data[:-1], "damaged or no safetensors"),
        (data[: len(data) // 2], "damaged or no safetensors"),
        (b"", "damaged or no safetensors"),
        (data[:-2] + bytes([data[-2] ^ 1]) + data[-1:], "its tensors are not the ones that were saved"),
    ]:
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            load_edit(path)
    fewer = {name: tensor for name, tensor in tensors.items() if name != "down.0"}
    for kept, metadata, message in [
        (fewer, {"palimpsest": json.dumps(old)}, "its tensors are not the ones"),
        (tensors, {"palimpsest": "{"}, "damaged header"),
        (tensors, {"palimpsest": "[]"}, "damaged header"),
        (tensors, {"palimpsest": "{}"}, "damaged header"),
        (tensors, {"format": "pt"}, "but no edit"),
    ]:
        save_file(kept, path, metadata)
        with pytest.raises(UserError, match=message):
            load_edit(path)
    with pytest.raises(UserError, match="no edit file"):
        load_edit(tmp_path / "nothing.safetensors")
    with pytest.raises(UserError, match="does not end in"):
        save_edit(low_rank(tiny), tmp_path / "edit.pt")


def test_a_failed_write_keeps_the_old_file(tiny: Model, tmp_path: Path, monkeypatch) -> None:
    path = save_edit(delta(), tmp_path / "edit.safetensors")
    before = path.read_bytes()

    def half(tensors, file, metadata) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("toolkit.io.files.save_file", half)
    with pytest.raises(OSError, match="disk full"):
        save_edit(low_rank(tiny), path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_folders_are_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "model"
    for text in ("one", "two"):
        with replacing_folder(folder, marker="index") as temporary:
            (temporary / "index").write_text(text)
            (temporary / text).touch()
        assert sorted(file.name for file in folder.iterdir()) == sorted(["index", text])
    with pytest.raises(ZeroDivisionError), replacing_folder(folder, marker="index"):
        raise ZeroDivisionError
    assert (folder / "index").read_text() == "two" and len(list(folder.parent.iterdir())) == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").touch()
    for other in (tmp_path / "mine", tmp_path / "mine" / "thesis"):
        with pytest.raises(UserError, match="holds something else"), replacing_folder(other, marker="index"):
            pass
    assert (tmp_path / "mine" / "thesis").exists()


# --- exports --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", [False, True])
def test_lora_gives_the_same_image_in_diffusers(tiny: Model, tmp_path: Path, text: bool) -> None:
    edit = Chain.of([low_rank(tiny, text=text), low_rank(tiny, 5)], [1.0, -0.5])
    with tiny.attached(edit):
        expected = picture(tiny.arch.pipe)
    [path] = export(edit, "diffusers-lora", tmp_path, tiny)
    assert path.name == "pytorch_lora_weights.safetensors"
    for without_metadata in (False, True):
        if without_metadata:
            save_file(load_file(path), path)
        pipe = SD.tiny().pipe
        pipe.load_lora_weights(tmp_path)
        assert_draws(pipe, expected)
        pipe.unload_lora_weights()
        assert torch.equal(picture(pipe), picture(SD.tiny().pipe))


def test_lora_keys(tiny: Model, tmp_path: Path) -> None:
    [path] = export(low_rank(tiny, text=True), "diffusers-lora", tmp_path / "lora.safetensors", tiny)
    keys = load_file(path).keys()
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    assert {f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"} <= keys
    assert "text_encoder.text_model.encoder.layers.1.self_attn.q_proj.lora_A.weight" in keys
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["unet.r"] == metadata["unet.lora_alpha"] and metadata["unet.rank_pattern"] == metadata["unet.alpha_pattern"]


@pytest.mark.parametrize("vectors", [1, 3])
def test_embedding_gives_the_same_image_in_diffusers(tiny: Model, tmp_path: Path, vectors: int) -> None:
    edit, prompt = token("<toy>", vectors), "a photo of a <toy>"
    with tiny.attached(edit):
        expected, text = picture(tiny.arch.pipe, prompt), tiny.arch.encode([prompt])
    [path] = export(edit, "embedding", tmp_path)
    assert path == tmp_path / "toy.safetensors"
    pipe = SD.tiny().pipe
    pipe.load_textual_inversion(path)
    assert_draws(pipe, expected, prompt)
    torch.testing.assert_close(SD(pipe).encode([prompt]).hidden, text.hidden)


def test_embedding_files(tmp_path: Path) -> None:
    both = Chain.of([token("<toy>", 2), token("<my/pet>")])
    paths = export(both, "embedding", tmp_path / "words")
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == ["words/toy.safetensors", "words/my_pet.safetensors"]
    tensors = load_file(paths[0])  # A1111 takes a file with one tensor [vectors, d] of any name
    assert list(tensors) == ["<toy>"] and tensors["<toy>"].shape == (2, 32)
    with pytest.raises(UserError, match="one file for 2 tokens"):
        export(both, "embedding", tmp_path / "words.safetensors")
    with pytest.raises(UserError, match="same file names"):
        export(Chain.of([token("<toy>"), token("toy")]), "embedding", tmp_path)


@pytest.mark.parametrize("format", ["diffusers-lora", "kohya-lora"])
def test_new_words_are_written_beside_a_lora(tiny: Model, tmp_path: Path, format: str) -> None:
    """Not in its file, where diffusers would refuse them; and a folder has one LoRA still, which needs no name."""
    edit, prompt = Chain.of([token("<toy>", 2), low_rank(tiny), token("<pal>")]), "a photo of a <toy> and a <pal>"
    with tiny.attached(edit):
        expected = picture(tiny.arch.pipe, prompt)
    lora, *words = export(edit, format, tmp_path, tiny)
    assert [path.relative_to(tmp_path).as_posix() for path in words] == ["embeddings/toy.safetensors", "embeddings/pal.safetensors"]
    assert all(".lora_" in key or key.endswith(".alpha") for key in load_file(lora))
    pipe: Any = SD.tiny().pipe
    pipe.load_lora_weights(tmp_path)
    pipe.load_textual_inversion(words)
    assert_draws(pipe, expected, prompt)
    same_names = Chain.of([token("<toy>"), token("toy"), low_rank(tiny)])
    with pytest.raises(UserError, match="same file names"):
        export(same_names, format, tmp_path / "other", tiny)
    assert not (tmp_path / "other").exists()


def test_delta_has_the_names_of_the_checkpoint(tiny: Model, tmp_path: Path) -> None:
    edit = Chain.of([low_rank(tiny), delta()], [0.5, 1.0])
    [path] = export(edit, "delta", tmp_path / "delta.safetensors", tiny)
    folder = tiny.save(tmp_path / "model")
    change, state = load_file(path), {}
    for component, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        state |= {f"{component}.{name}": value for name, value in load_file(folder / component / f"{file}.safetensors").items()}
    assert change.keys() <= state.keys() and len(change) == len(edit.parameter_names())
    pipe = SD.tiny().pipe
    for component in ("unet", "text_encoder"):
        module = getattr(pipe, component)
        prefix = f"{component}.text_model." if component == "text_encoder" else f"{component}."
        module.load_state_dict({name: value + change.get(prefix + name, 0) for name, value in module.state_dict().items()})
    with tiny.attached(edit):
        assert_draws(pipe, picture(tiny.arch.pipe))


def test_checkpoint_gives_the_same_image_in_diffusers(tiny: Model, tmp_path: Path) -> None:
    edit, prompt = Chain.of([delta(), low_rank(tiny), token("<toy>", 2)]), "a photo of a <toy>"
    with tiny.attached(edit):
        expected = picture(tiny.arch.pipe, prompt)
    plain = picture(tiny.arch.pipe)
    export(edit, "checkpoint", tmp_path / "model", tiny)
    [folder] = export(edit, "checkpoint", tmp_path / "model", tiny)  # replaces the first
    assert tiny.edits == () and torch.equal(picture(tiny.arch.pipe), plain)
    assert_draws(StableDiffusionPipeline.from_pretrained(folder, safety_checker=None), expected, prompt)
    names = load_file(folder / "text_encoder" / "model.safetensors").keys()
    assert "text_model.embeddings.token_embedding.weight" in names and all(name.startswith("text_model.") for name in names)


def test_exports_that_are_not_possible(tiny: Model, tmp_path: Path) -> None:
    for edit, format, model, message in [
        (token(), "diffusers-lora", tiny, "a token edit cannot be written as diffusers-lora; export it as embedding or checkpoint"),
        (Chain.of([low_rank(tiny), delta()]), "diffusers-lora", tiny, "a delta edit cannot be written"),
        (low_rank(tiny), "embedding", tiny, "a low_rank edit cannot be written as embedding"),
        (Chain.of([token(), low_rank(tiny)]), "embedding", tiny, "; export it as diffusers-lora or kohya-lora or checkpoint"),
        (Chain.of([token(), delta()]), "kohya-lora", tiny, "a delta edit cannot be written as kohya-lora; export it as checkpoint"),
        (low_rank(tiny), "diffuser-lora", tiny, "did you mean diffusers-lora"),
        (low_rank(tiny), "delta", None, "give --model"),
    ]:
        with pytest.raises(UserError, match=message):
            export(edit, format, tmp_path / "out", model)
    assert not (tmp_path / "out").exists()
