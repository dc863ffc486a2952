"""Learning from real photos at 512 pixels with a model of the real shape whose weights are random: what it takes, not what it learns."""

import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from benchmarks.training import sd1_shaped
from tests.shared_data import shared
from toolkit.arch.sd import SD
from toolkit.cli import main
from toolkit.io.files import load_edit

pytestmark = pytest.mark.slow

SIZE = 512
STEPS, HALF = 4, 2
PEAK = 8000  # MiB of the whole process; the weights are 4100 of them
SETTINGS = ("aspect_buckets=true", "cache=disk", "gradient_checkpointing=true", "mixed_precision=auto")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Stable Diffusion 1.4 with random weights as a diffusers folder."""
    folder = sd1_shaped(SIZE).save(tmp_path_factory.mktemp("sd14") / "model")
    gc.collect()
    yield folder
    shutil.rmtree(folder)  # 4 GB


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """The shapes of pictures, and the prompts, that were encoded."""
    calls: dict[str, list[Any]] = {"pictures": [], "prompts": []}
    pictures, prompts = SD.encode_images, SD.encode
    monkeypatch.setattr(SD, "encode_images", lambda arch, given: calls["pictures"].append(tuple(given.shape)) or pictures(arch, given))
    monkeypatch.setattr(SD, "encode", lambda arch, given, **how: calls["prompts"].extend(given) or prompts(arch, given, **how))
    return calls


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, with a cache of its own in it."""
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))
    return tmp_path


def folder_of(folder: Path, pictures: dict[str, Image.Image]) -> Path:
    folder.mkdir()
    for name, picture in pictures.items():
        picture.save(folder / name)
    return folder


def mask(photo: Path, left: float, right: float) -> Image.Image:
    """White in an ellipse that is as high as the photo, between two parts of its width."""
    drawn = Image.new("L", Image.open(photo).size)
    wide, high = drawn.size
    ImageDraw.Draw(drawn).ellipse((left * wide, 0, right * wide, high), fill=255)
    return drawn


def customize(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    code = main(["customize", *map(str, words), "--json"])
    told = capsys.readouterr()
    assert code == 0, told.err
    return json.loads(told.out.splitlines()[-1])


def test_a_subject_of_photos(model: Path, out: Path, encoded: dict[str, list[Any]], capsys: pytest.CaptureFixture[str]) -> None:
    """A square photo and a high one: resumed in the middle it ends where it would have, and encodes nothing again."""
    paths = [shared("dreambooth/dog3/00.jpg"), shared("pairs/cat_dog/subject2.jpg")]
    photos = folder_of(out / "photos", {path.name: Image.open(path) for path in paths})
    masks = folder_of(out / "masks", {f"{path.stem}.png": mask(path, 0.1, 0.9) for path in paths})
    words = [
        "--method",
        "dreambooth_lora",
        "--model",
        model,
        "--images",
        photos,
        "--masks",
        masks,
        "--class-name",
        "dog",
        "--token",
        "<pal>",
    ]
    words += ["--checkpointing-steps", HALF, "--checkpoints-total-limit", 2, "--set", *SETTINGS, f"max_train_steps={STEPS}"]
    whole = customize(capsys, *words, "--export", "diffusers-lora", "--out", out / "whole")
    assert sorted(encoded["pictures"]) == [(1, 3, 512, 512), (1, 3, 576, 448)] and encoded["prompts"] == ["a photo of <pal> dog"]
    shutil.copytree(out / "whole" / f"checkpoint-{HALF}", out / "resumed" / f"checkpoint-{HALF}")
    for calls in encoded.values():
        calls.clear()
    resumed = customize(capsys, *words, "--out", out / "resumed")
    assert not any(encoded.values()), "pictures and prompts come from the cache"
    edits = [load_edit(result["edit"]) for result in (whole, resumed)]
    first, second = (edit.tensors() for edit in edits)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert all(tensor.any() for name, tensor in first.items() if name.startswith("up."))
    print({key: [result[key] for result in (whole, resumed)] for key in ("seconds", "peak_memory_mb")})
    assert max(whole["peak_memory_mb"], resumed["peak_memory_mb"]) < PEAK
    pipe: Any = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipe.load_lora_weights(out / "whole" / "diffusers-lora")
    adapted = [name for name, module in pipe.unet.named_modules() if name.endswith("lora_B.default_0") and module.weight.any()]
    assert len(adapted) == len(edits[0].sites()) == 128


def test_two_subjects_of_one_photo(model: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Words, keys and values, and where the words are attended to, with a mask for each subject."""
    photo = shared("pairs/cat_dog/global.jpg")
    photos = folder_of(out / "photos", {photo.name: Image.open(photo)})
    halves = {"cat": (0.0, 0.5), "dog": (0.5, 1.0)}
    masks = [folder_of(out / name, {f"{photo.stem}.png": mask(photo, *part)}) for name, part in halves.items()]
    words = ["--method", "attencraft", "--model", model, "--images", photos, photos, "--masks", *masks, "--class-name", *halves]
    words += ["--token", "<one>", "<two>", "--set", *SETTINGS, "prior=none", f"max_train_steps={HALF}"]
    result = customize(capsys, *words, "--export", "kohya-lora", "--out", out / "learnt")
    print({key: result[key] for key in ("seconds", "peak_memory_mb")})
    assert result["peak_memory_mb"] < PEAK
    lora, *embeddings = map(Path, result["export"])
    assert {file.stem for file in embeddings} == {"one", "two"}
    assert all(load_file(file)[f"<{file.stem}>"].isfinite().all() for file in embeddings)
    assert len(load_file(lora)) == 3 * 32
