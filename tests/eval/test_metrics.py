"""What all metrics have in common, and those that compare images with prompts and with images."""

from __future__ import annotations

import json
import pickle
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.intervals import mean
from eval.metrics.base import BATCH, Metric
from eval.metrics.clip_drift import ClipDrift
from eval.metrics.clip_i import ClipI
from eval.metrics.clip_t import ClipT
from eval.metrics.names import named
from toolkit import clip as clips
from toolkit import registry
from toolkit.errors import UserError
from toolkit.images import save_png, to_pil

PROMPTS = ["a noto dog on a red background", "a twemoji cat on a blue background", "a noto cat on a red background"]
OFFLINE: dict[str, dict[str, Any]] = {
    "clip_t": {"prefix": "a picture of "},
    "clip_i": {},
    "clip_drift": {},
    "classifier": {"function": "judging:brightness", "threshold": (0.5, 0.4)},
    "kid": {"features": "oracle"},
    "fid": {"features": "judging:moments"},
    "unlearn_canvas": {"target": "dog"},
    "harmonic": {"target": "noto"},
}
JUDGING = """
import torch

def brightness(images):
    return images.mean((1, 2, 3))

def moments(images):
    return torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)

def labels(images):
    return [(("noto", "twemoji")[int(image[0, 0, 0] > 0.5)], ("dog", "cat")[int(image[1, 0, 0] > 0.5)]) for image in images]

def wrong(images):
    return [0.0]
"""


@pytest.fixture(autouse=True)
def judging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions of a user's in the folder that the command runs in."""
    (tmp_path / "judging.py").write_text(JUDGING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "judging", raising=False)


def make(name: str, **options: Any) -> Metric:
    return registry.load("metric", name).from_config(options)


def images(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def asked(n: int) -> tuple[list[str], list[int]]:
    return [PROMPTS[i % len(PROMPTS)] for i in range(n)], [i // len(PROMPTS) for i in range(n)]


# --- all of them ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", registry.names("metric"))
def test_a_metric_says_what_it_is(name: str) -> None:
    kind = registry.load("metric", name)
    assert issubclass(kind, Metric) and kind.name() == name
    assert kind.compares in ("nothing", "prompt", "images")
    assert kind.__doc__ and kind.paper.removeprefix("arXiv:") in kind.__doc__


@pytest.mark.parametrize("name", OFFLINE)
def test_merged_parts_in_any_order_are_one_pass(name: str) -> None:
    n = 12
    drawn, beside, (prompts, seeds) = images(n), images(n, seed=1), asked(n)
    whole, order = make(name, **OFFLINE[name]), random.Random(0).sample(range(n), n)
    whole.update(drawn, prompts, seeds, beside)
    parts = [whole.fresh(), make(name, **OFFLINE[name])]
    for part, chosen in zip(parts, (order[:5], order[5:]), strict=True):
        for i in chosen:
            part.update(drawn[[i]], [prompts[i]], [seeds[i]], beside[[i]])
    parts[0].merge(pickle.loads(pickle.dumps(parts[1])))
    one, other = whole.compute(), parts[0].compute()
    assert one.measured_by == other.measured_by
    for end in ("value", "low", "high", "n"):
        assert getattr(other.estimate, end) == pytest.approx(getattr(one.estimate, end), rel=1e-4, abs=1e-5, nan_ok=True)
    assert {"model"} <= one.measured_by.keys() and one.estimate.n in (n, n - n // 3, n // 3)


@pytest.mark.parametrize("name", OFFLINE)
def test_nothing_measured_is_said(name: str) -> None:
    assert make(name, **OFFLINE[name]).compute().as_json()["n"] == 0


def test_an_image_counts_once() -> None:
    metric = make("classifier", function="judging:brightness")
    for _ in range(2):
        metric.update(images(2), ["a", "b"], [0, 0])
    assert metric.compute().estimate.n == 2


def test_a_metric_travels_without_its_model() -> None:
    metric = make("clip_t")
    metric.update(images(2), ["a dog", "a cat"], [0, 1])
    sent = pickle.dumps(metric)
    assert len(sent) < 5000
    assert pickle.loads(sent).compute() == metric.compute()


def test_more_images_than_a_batch_are_measured_as_few_are() -> None:
    metric, n = make("classifier", function="judging:brightness"), BATCH + 3
    assert torch.equal(metric.score(images(n)), images(n).mean((1, 2, 3)))


def test_what_measures_something_else_cannot_be_merged() -> None:
    with pytest.raises(ValueError, match="different things"):
        make("clip_t").merge(make("clip_t", prefix="a photo of "))
    with pytest.raises(ValueError, match="different things"):
        make("clip_t").merge(make("clip_i"))


def test_what_is_missing_is_said() -> None:
    with pytest.raises(ValueError, match="compares with prompt"):
        make("clip_t").score(images(1))
    with pytest.raises(ValueError, match="compares with images"):
        make("clip_i").update(images(1), ["a"], [0])
    with pytest.raises(ValueError, match="2 images, 1 prompts"):
        make("clip_t").score(images(2), ["a"])
    with pytest.raises(ValueError, match="needs \\[n, 3, h, w\\]"):
        make("clip_t").score(images(2)[0], ["a"])


# --- CLIP -------------------------------------------------------------------------------------------------------------
def by_hand(pixels: Tensor, texts: list[str]) -> list[float]:
    """Cosines of the shipped CLIP's own two halves, one pair after the other."""
    clip = clips.load_metric_clip()
    found = []
    for image, text in zip(pixels, texts, strict=True):
        a, b = clip.module.encode_image(image[None] * 2 - 1)[0].double(), clip.encode_text([text])[0].double()
        found.append(float((a * b).sum() / (a.norm() * b.norm())))
    return found


def test_clip_t_is_the_mean_cosine_by_hand() -> None:
    (prompts, seeds), drawn = asked(6), images(6)
    metric = ClipT(prefix="a picture of ", scale=100)
    metric.update(drawn, prompts, seeds)
    cosines = [100 * value for value in by_hand(drawn, [f"a picture of {text}" for text in prompts])]
    result = metric.compute()
    assert result.estimate.value == pytest.approx(sum(cosines) / 6, rel=1e-5)
    pairs = sorted(zip(prompts, seeds, cosines, strict=True))
    assert result.estimate.low == pytest.approx(mean([value for *_, value in pairs], [text for text, *_ in pairs]).low, rel=1e-5)
    assert metric.score(drawn, prompts).tolist() == pytest.approx(cosines, rel=1e-4)
    said = result.as_json()["measured_by"]
    assert {"model", "version", "preprocessing", "prefix", "scale"} <= said.keys() and said["scale"] == 100


def test_clip_drift_is_after_less_before_and_pairs_them() -> None:
    (prompts, seeds), after, before = asked(6), images(6), images(6, seed=1)
    metric = ClipDrift()
    metric.update(after, prompts, seeds, before)
    differences = [a - b for a, b in zip(by_hand(after, prompts), by_hand(before, prompts), strict=True)]
    assert metric.compute().estimate.value == pytest.approx(sum(differences) / 6, abs=1e-6)
    same = ClipDrift()
    same.update(before, prompts, seeds, before)
    assert (same.compute().estimate.low, same.compute().estimate.high) == (0, 0)


def test_clip_i_of_a_counterpart_and_of_a_folder(tmp_path: Path) -> None:
    drawn, beside = ((images(3, seed=seed) * 255).round() / 255 for seed in (0, 1))
    encode = clips.load_metric_clip().encode_images
    a, b = (torch.nn.functional.normalize(encode(side), dim=-1) for side in (drawn, beside))
    paired = ClipI()
    paired.update(drawn, ["x", "y", "z"], [0, 0, 0], beside)
    assert paired.compute().estimate.value == pytest.approx((a * b).sum(1).mean().item(), abs=1e-5)
    (tmp_path / "subject").mkdir()
    for i, image in enumerate(to_pil(beside)):
        save_png(image, tmp_path / "subject" / f"{i}.png")
    metric = ClipI(folder=str(tmp_path / "subject"))
    assert not metric.needs_references
    assert metric.score(drawn).tolist() == pytest.approx((a @ b.T).mean(1).tolist(), abs=1e-4)


def test_mistakes_with_a_clip_are_one_line() -> None:
    with pytest.raises(UserError, match="has its own weights"):
        ClipT(weights="openai").measured_by()
    with pytest.raises(UserError, match="has its own weights"):
        ClipT(clip="local-dir:/nowhere", weights="openai").measured_by()
    with pytest.raises(UserError, match=r"cannot load the CLIP 'ViT-B-32' with weights '/nowhere\.pt'"):
        ClipT(clip="ViT-B-32", weights="/nowhere.pt").measured_by()


SMALL_CLIP = """{"embed_dim": 8, "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}}"""


def test_an_open_clip_is_given_by_its_folder(tmp_path: Path) -> None:
    import open_clip

    config = json.loads(SMALL_CLIP)
    torch.manual_seed(0)
    made = open_clip.CLIP(8, open_clip.CLIPVisionCfg(**config["vision_cfg"]), open_clip.CLIPTextCfg(**config["text_cfg"]))
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    torch.save(made.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    metric = ClipT(clip=f"local-dir:{tmp_path}")
    said, drawn = metric.measured_by(), images(2)
    assert "mean [0.5, 0.5, 0.5]" in said["preprocessing"] and said["library"].startswith("open_clip")
    small = torch.nn.functional.interpolate(drawn, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        a, b = made.encode_image((small - 0.5) / 0.25), made.encode_text(open_clip.get_tokenizer("ViT-B-32")(["a dog"]))
    assert metric.score(drawn, ["a dog"] * 2).tolist() == pytest.approx(torch.cosine_similarity(a, b).tolist(), abs=0.01)


# --- names ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a photo of a garbage truck", "garbage truck"),
        ("An English  springer, running", "English springer"),
        ("a chainsaw", "chain saw"),
        ("a chain-saw and a chain", "chain saw"),
        ("an elephant", None),
        ("", None),
    ],
)
def test_the_longest_name_in_a_prompt(prompt: str, name: str | None) -> None:
    assert named(prompt, ("chain", "chain saw", "truck", "garbage truck", "English springer", "ant")) == name
