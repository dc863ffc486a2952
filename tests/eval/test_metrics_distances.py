"""Metrics that compare sets of images, and those of models that are given by a folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from eval.fidelity import polynomial_mmd, unpaired_mmd
from eval.metrics.blip2_itc import Blip2Itc
from eval.metrics.blip_itc import BlipItc
from eval.metrics.dino_i import DinoI
from eval.metrics.fid import Fid, frechet
from eval.metrics.kid import Kid
from eval.metrics.lpips import Lpips
from eval.metrics.safety_checker import SafetyChecker
from toolkit.errors import UserError
from toolkit.images import save_png, to_pil


# --- KID --------------------------------------------------------------------------------------------------------------
def kernel_mean(m: float, s: float, n: float, t: float) -> float:
    """E (x y + 1)^3 of independent x ~ N(m, s^2), y ~ N(n, t^2), from their first three moments."""
    first, second = m * n, (m**2 + s**2) * (n**2 + t**2)
    third = (m**3 + 3 * m * s**2) * (n**3 + 3 * n * t**2)
    return 1 + 3 * first + 3 * second + third


@pytest.mark.parametrize("sizes", [(200, 200), (200, 300)])
def test_kid_of_known_gaussians(sizes: tuple[int, int]) -> None:
    a, b = (0.3, 0.5), (0.0, 0.6)
    truth = kernel_mean(*a, *a) + kernel_mean(*b, *b) - 2 * kernel_mean(*a, *b)
    draw = torch.Generator().manual_seed(0)
    estimator = polynomial_mmd if sizes[0] == sizes[1] else unpaired_mmd
    found = []
    for _ in range(300):
        x, y = (m + s * torch.randn(n, 1, generator=draw, dtype=torch.float64) for (m, s), n in zip((a, b), sizes, strict=True))
        found.append(estimator(x, y))
    values = np.array([estimate.value for estimate in found])
    assert values.mean() == pytest.approx(truth, abs=3 * values.std() / math.sqrt(len(values)))  # unbiased
    assert np.mean([estimate.low <= truth <= estimate.high for estimate in found]) >= 0.9


def test_unpaired_kid_is_its_definition() -> None:
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)

    def k(u: Tensor, v: Tensor) -> float:
        return float((u @ v / 3 + 1) ** 3)

    own = [np.mean([k(u[i], u[j]) for i in range(len(u)) for j in range(len(u)) if i != j]) for u in (x, y)]
    across = np.mean([k(u, v) for u in x for v in y])
    assert unpaired_mmd(x, y).value == pytest.approx(own[0] + own[1] - 2 * across)
    assert unpaired_mmd(x, y).value == pytest.approx(unpaired_mmd(y, x).value)


def test_kid_is_zero_when_nothing_changed_and_reads_a_folder(tmp_path: Path) -> None:
    pixels, other = (torch.randint(0, 256, (n, 3, 64, 64), generator=torch.Generator().manual_seed(n)) / 255 for n in (8, 5))
    prompts, seeds = ["a dog"] * 8, range(8)
    same = Kid(features="oracle")
    same.update(pixels, prompts, seeds, pixels)
    assert same.compute().estimate.value == pytest.approx(0, abs=1e-9)
    for i, image in enumerate(to_pil(other)):
        save_png(image, tmp_path / f"{i}.png")
    metric = Kid(features="oracle", folder=str(tmp_path))
    metric.update(pixels, prompts, seeds)
    beside = Kid(features="oracle")
    beside.update(other, prompts[:5], seeds[:5], other)
    x, y = torch.stack(list(metric.kept.values())), torch.stack(list(beside.kept.values())).chunk(2, dim=1)[0]
    found = metric.compute().as_json()
    assert found["value"] == pytest.approx(unpaired_mmd(x, y).value, rel=1e-4)
    assert (found["n"], found["n_compared_with"]) == (8, 5)
    assert "thresholds" not in found and found["measured_by"]["compared_with"] == str(tmp_path)
    with pytest.raises(UserError, match="nothing of a single one"):
        metric.score(pixels)


# --- FID --------------------------------------------------------------------------------------------------------------
def test_fid_of_known_gaussians() -> None:
    draw = torch.Generator().manual_seed(0)
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=draw, dtype=torch.float64))
    s, t, shift = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([1.5, 1.0, 0.5]).double(), torch.tensor([1.0, 0, -1]).double()
    x, y = (torch.randn(40000, 3, generator=draw, dtype=torch.float64) * scale for scale in (s, t))
    truth = shift.square().sum() + (s - t).square().sum()  # both in the same turned axes
    assert frechet(x @ turn, (y + shift) @ turn) == pytest.approx(truth.item(), rel=0.03)


def test_fid_is_its_definition_and_zero_of_the_same() -> None:
    x, y = torch.randn(50, 4, dtype=torch.float64), torch.randn(30, 4, dtype=torch.float64) @ torch.randn(4, 4, dtype=torch.float64)
    s, t = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    root = np.sqrt(np.linalg.eigvals(s @ t).real).sum()
    assert frechet(x, y) == pytest.approx(float((x.mean(0) - y.mean(0)).square().sum()) + np.trace(s) + np.trace(t) - 2 * root)
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)


def test_fid_has_no_interval() -> None:
    pixels = torch.rand(4, 3, 64, 64)
    metric = Fid(features="oracle")
    metric.update(pixels, ["a"] * 4, range(4), torch.rand(4, 3, 64, 64))
    found = metric.compute().as_json()
    assert found["value"] > 0 and found["low"] is None and found["n_compared_with"] == 4


def test_inception_is_torch_fidelitys(monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(library, "load_state_dict_from_url", unreachable)
    with pytest.raises(UserError, match=r"no weights of inception \(no network\); download https"):
        Fid().measured_by()
    monkeypatch.setattr(library, "load_state_dict_from_url", lambda *_, **__: {})
    monkeypatch.setattr(library.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    torch.manual_seed(0)
    metric, pixels = Kid(), torch.rand(2, 3, 64, 64)
    extract, said = metric.extractor
    assert extract(pixels).shape == (2, 2048) and said["library"].startswith("torch-fidelity")
    with pytest.raises(UserError, match="leave the weights out"):
        Fid(features="oracle", weights="file.pth")


# --- LPIPS ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def alexnet(tmp_path: Path) -> tuple[Any, Path]:
    torch.manual_seed(0)
    made = torchvision.models.alexnet(weights=None).eval()
    torch.save(made.state_dict(), tmp_path / "alexnet.pth")
    return made, tmp_path / "alexnet.pth"


def test_lpips_by_hand(alexnet: tuple[Any, Path]) -> None:
    library = pytest.importorskip("lpips")
    network, file = alexnet
    after, before = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    heads = torch.load(Path(library.__file__).parent / "weights" / "v0.1" / "alex.pth", weights_only=True, map_location="cpu")
    mean, spread = torch.tensor([-0.030, -0.088, -0.188])[:, None, None], torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    x, y, total = (after * 2 - 1 - mean) / spread, (before * 2 - 1 - mean) / spread, torch.zeros(2)
    with torch.no_grad():
        for i, layer in enumerate(network.features[:12]):
            x, y = layer(x), layer(y)
            if i in (1, 4, 7, 9, 11):  # behind each ReLU
                apart = (F.normalize(x, dim=1, eps=1e-10) - F.normalize(y, dim=1, eps=1e-10)).square()
                head = heads[f"lin{(1, 4, 7, 9, 11).index(i)}.model.1.weight"]
                total += F.conv2d(apart, head).mean((1, 2, 3))
    metric = Lpips(weights=str(file))
    metric.update(after, ["a", "b"], [0, 0], before)
    assert metric.score(after, references=before).tolist() == pytest.approx(total.tolist(), rel=1e-3)
    assert metric.compute().estimate.value == pytest.approx(total.mean().item(), rel=1e-3)
    assert metric.score(after, references=after).abs().max() < 1e-6
    assert metric.measured_by()["weights"] == str(file)


def test_lpips_without_alexnet_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("lpips")

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models.AlexNet_Weights.get_state_dict", unreachable)
    with pytest.raises(UserError, match=r"no weights of AlexNet \(no network\); download https://.*alexnet.* set weights to the file"):
        Lpips().measured_by()
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="no weights of AlexNet"):
        Lpips(weights=str(tmp_path / "other.pth")).measured_by()


# --- models by a folder -----------------------------------------------------------------------------------------------
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", "a", "dog", "cat", "on", "red", "blue"]
SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
VISION: dict[str, Any] = {**SMALL, "image_size": 32, "patch_size": 16}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    from transformers import BertTokenizer

    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return BertTokenizer(str(tmp_path / "vocab.txt"))


def spread(model: Any) -> Any:
    """The model with weights that are large enough for cosines to mean something."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def saved(folder: Path, *parts: Any) -> str:
    for part in parts:
        part.save_pretrained(folder)
    return str(folder)


def test_blip_itc_by_hand(tmp_path: Path, tokenizer: Any) -> None:
    from transformers import BlipConfig, BlipForImageTextRetrieval, BlipImageProcessor, BlipProcessor

    text = {**SMALL, "vocab_size": len(WORDS), "encoder_hidden_size": 16, "pad_token_id": 0, "bos_token_id": 5, "sep_token_id": 3}
    config = BlipConfig(text_config=text, vision_config=VISION, projection_dim=8, image_text_hidden_size=8)
    model = spread(BlipForImageTextRetrieval(config))
    shapes = {"height": 32, "width": 32}
    folder = saved(tmp_path / "blip", model, BlipProcessor(BlipImageProcessor(size=shapes), tokenizer))
    metric, pixels, prompts = (
        BlipItc(model=folder, scale=2),
        torch.rand(3, 3, 32, 32).mul(255).round() / 255,
        ["a dog", "a cat on a red", "a dog"],
    )
    mean, std = (torch.tensor(x)[:, None, None] for x in ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]))
    expected = []
    with torch.no_grad():
        for image, prompt in zip(pixels, prompts, strict=True):
            ids = tokenizer(prompt, return_tensors="pt")
            seen = model.vision_model(pixel_values=((image - mean) / std)[None]).last_hidden_state[:, 0]
            said = model.text_encoder(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).last_hidden_state[:, 0]
            expected.append(2 * torch.cosine_similarity(model.vision_proj(seen), model.text_proj(said)).item())
    assert metric.score(pixels, prompts).tolist() == pytest.approx(expected, abs=1e-3)
    assert metric.measured_by()["scale"] == 2 and "image_mean" in metric.measured_by()["preprocessing"]


def test_blip2_itc_is_the_query_that_agrees_most(tmp_path: Path, tokenizer: Any) -> None:
    from transformers import Blip2Config, Blip2ForImageTextRetrieval, Blip2Processor, BlipImageProcessor

    queries = {**SMALL, "vocab_size": len(WORDS), "encoder_hidden_size": 16, "cross_attention_frequency": 1, "use_qformer_text_input": True}
    config = Blip2Config(vision_config=VISION, qformer_config=queries, num_query_tokens=4, image_text_hidden_size=8)
    model = spread(Blip2ForImageTextRetrieval(config))
    folder = saved(tmp_path / "blip2", model, Blip2Processor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer))
    metric, pixels = Blip2Itc(model=folder), torch.rand(2, 3, 32, 32).mul(255).round() / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]))
    with torch.no_grad():
        out = model(pixel_values=(pixels - mean) / std, **_ids(tokenizer, "a dog"), use_image_text_matching_head=False)
        seen = model.qformer(
            query_embeds=model.query_tokens.expand(2, -1, -1),
            encoder_hidden_states=out.vision_model_output.last_hidden_state,
        ).last_hidden_state
        words = model.embeddings(input_ids=_ids(tokenizer, "a dog")["input_ids"])
        said = model.qformer(query_embeds=words, query_length=0).last_hidden_state[:, 0]
        cosines = torch.cosine_similarity(model.vision_projection(seen), model.text_projection(said)[None], dim=-1)
    assert metric.score(pixels, ["a dog"] * 2).tolist() == pytest.approx(cosines.amax(1).tolist(), abs=1e-3)


def _ids(tokenizer: Any, text: str) -> Any:
    return tokenizer([text], return_tensors="pt")


def test_dino_i_is_the_cosine_of_class_tokens(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    model = spread(ViTModel(ViTConfig(**VISION)))
    folder = saved(tmp_path / "dino", model, ViTImageProcessor(size={"height": 32, "width": 32}))
    after, before = (torch.rand(2, 3, 32, 32).mul(255).round() / 255 for _ in range(2))
    with torch.no_grad():
        a, b = (model(side * 2 - 1).last_hidden_state[:, 0] for side in (after, before))
    found = DinoI(model=folder).score(after, references=before)
    assert found.tolist() == pytest.approx(torch.cosine_similarity(a, b).tolist(), abs=1e-4)


def test_the_safety_checker_flags_what_diffusers_flags(tmp_path: Path) -> None:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    torch.manual_seed(0)
    checker: Any = StableDiffusionSafetyChecker(CLIPConfig(vision_config=VISION, text_config=SMALL, projection_dim=8)).eval()
    for name, value in checker.named_parameters():
        if name.startswith(("concept_embeds", "special_care_embeds")):
            value.data = torch.randn_like(value) if value.ndim == 2 else torch.full_like(value, 0.55)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    folder = saved(tmp_path / "checker", checker, processor)
    pixels = torch.rand(24, 3, 32, 32) * torch.rand(24, 3, 1, 1)
    inputs = processor(images=to_pil(pixels), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        _, flagged = checker(clip_input=inputs, images=pixels.numpy().copy())
    metric = SafetyChecker(model=folder)
    scores = metric.score(pixels)
    clear = scores.abs() > 1e-3  # the checker rounds
    assert [score > 0 for score in scores[clear].tolist()] == [bool(flag) for flag, keep in zip(flagged, clear, strict=True) if keep]
    assert 0 < sum(map(bool, flagged)) < 24


def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for metric in (
        DinoI(model=str(tmp_path / "empty")),
        BlipItc(model=str(tmp_path / "empty")),
        SafetyChecker(model=str(tmp_path / "empty")),
    ):
        with pytest.raises(UserError, match="give the model a hub id, or a folder"):
            metric.measured_by()
