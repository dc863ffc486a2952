from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import eval.alignment
import eval.attributes
from eval.alignment import Clip
from eval.attributes import AttributeCounter
from tests.toolkit.test_cli import call
from tests.toolkit.test_merge_commands import fails
from toolkit.arch.sd import SD
from toolkit.concepts import Concept
from toolkit.io.files import load_edit
from toolkit.model import Model

# Tells images by their colour: red is a woman, blue a man. Any other word is nothing.
COLOURS = {"woman": torch.tensor([1.0, 0.0, 0.0]), "man": torch.tensor([0.0, 0.0, 1.0])}
CLIP = Clip(
    lambda images: images.mean((2, 3)) - images.mean(),
    lambda texts: torch.stack([COLOURS.get(text.split()[-1], torch.zeros(3)) for text in texts]),
    {"model": "colours"},
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(eval.alignment, "load_metric_clip", lambda: CLIP)
    monkeypatch.setattr("eval.commands.evaluate.embedded_vocabulary", lambda folder: {})
    return str(Model(SD.tiny()).save(tmp_path / "tiny"))


def test_images_are_counted_by_the_attribute_they_are_nearest_to(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def paint(model: Model, prompts: list[str], seeds: range, **_: Any) -> Tensor:
        """The first template is drawn in red; the second one in red too when the seed is odd, else in blue."""
        asked.extend(zip(prompts, seeds, strict=True))
        red = torch.tensor([prompt.startswith("a ") or seed % 2 for prompt, seed in zip(prompts, seeds, strict=True)]).bool()
        colours = torch.where(red[:, None], COLOURS["woman"], COLOURS["man"])
        return colours[:, :, None, None].expand(-1, -1, 2, 2)

    monkeypatch.setattr(eval.attributes, "sample", paint)
    counter = AttributeCounter(lambda: CLIP, ("man", "woman"), ("a {}", "one {}"), n=8, seed=4)
    assert counter(tiny, Concept("doctor", ("medic",))) == [0.25, 0.75]
    prompts = ["a doctor", "a medic", "one doctor", "one medic"]
    assert asked == list(zip(itertools.islice(itertools.cycle(prompts), 8), range(4, 12), strict=True))
    estimate = counter.rates(tiny, Concept("doctor", ("medic",)))["woman"]
    assert estimate.n == 8 and estimate.low < 0.75 < estimate.high


def test_debias_writes_a_complete_result(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    described = ("--concept", "doctor", "--synonyms", "medic", "--attributes", "woman", "man", "--ratios", 0.4, 0.6)
    drawn = ("--template", "a {}", "--n", 3, "--seed", 5, "--steps", 1, "--guidance", 1)
    options = ("--set", "max_iterations=2", "--export", "delta", "--out", tmp_path / "out")
    result = call(capsys, "debias", "--model", folder, "--method", "uce_debias", *described, *drawn, *options)
    assert result["method"] == "uce_debias" and result["config"]["max_iterations"] == 2
    assert result["notes"]["iterations"] <= 2 and len(result["export"]) == 1
    parts = result["ratios"]["doctor"]
    assert sum(part["value"] for part in parts.values()) == pytest.approx(1) and {part["n"] for part in parts.values()} == {3}
    task = json.loads((tmp_path / "out" / "config.json").read_text())["task"]
    assert (task["attributes"], task["ratios"], task["counted"]["clip"]) == (["woman", "man"], [0.4, 0.6], {"model": "colours"})
    assert task["concepts"][0]["synonyms"] == ["medic"]
    model = Model(SD.tiny())
    with model.attached(load_edit(tmp_path / "out")):
        fresh = AttributeCounter(lambda: CLIP, ("woman", "man"), ("a {}",), n=3, seed=8, steps=1, guidance=1.0)
        rates = fresh.rates(model, Concept("doctor", ("medic",)))
    assert {name: estimate.as_json() for name, estimate in rates.items()} == parts


def test_mistakes_get_one_line(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    debias = ("debias", "--model", folder, "--concept", "doctor", "--out", tmp_path / "out")
    solved, attributes = ("--method", "uce_debias"), ("--attributes", "woman", "man")
    assert "uce is a method to erase, not to debias; give one of: uce_debias" in fails(capsys, *debias, *attributes, "--method", "uce")
    assert "required: --concept" in fails(capsys, "debias", *solved, *attributes, "--out", tmp_path)
    assert "needs two or more different ones" in fails(capsys, *debias, *solved, "--attributes", "woman")
    assert "need parts that add up to 1" in fails(capsys, *debias, *solved, *attributes, "--ratios", 0.5, 0.6)
    assert "--n is 0" in fails(capsys, *debias, *solved, *attributes, "--n", 0)
    monkeypatch.setattr("eval.commands.evaluate.embedded_vocabulary", lambda folder: {"emoji</w>": 7})
    assert "give --clip SOURCE too" in fails(capsys, *debias, *solved, *attributes)
