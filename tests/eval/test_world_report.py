from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from eval import world_report
from eval.alignment import world_clip
from eval.intervals import Estimate
from eval.prompts import single
from eval.world_report import Line, called_objects, held_out_ratio, measure, page, unseen_scenes
from tests.eval.images import Renderer, reading, shown
from toolkit.arch.sd import SD
from toolkit.model import Model
from toolkit.world.oracle import Oracle
from toolkit.world.scenes import World, allowed
from trainers.world.clip import build_clip, clip_config


def test_unseen_scenes_are_unseen(world: World) -> None:
    scenes = unseen_scenes(world, 40)
    assert not any(allowed(scene) for scene in scenes)
    assert {len(scene.items) for scene in scenes} == {1, 2, 3, 4}
    assert scenes == unseen_scenes(world, 40)


def test_a_line_says_whether_its_bar_is_met() -> None:
    good = Line("a", Estimate(0.95, 0.9, 0.97, 64), 0.9)
    assert good.met and "≥ 90.0 %" in str(good) and "95.0 % [90.0 %, 97.0 %]" in str(good) and "missed" not in str(good)
    bad = Line("b", Estimate(0.02, 0.01, 0.03, 64), 0.01, below=True)
    assert not bad.met and "≤ 1.0 % (missed)" in str(bad)
    assert "25.00 dB" in str(Line("c", Estimate(25.0, 24.0, 26.0, 8), 28.0, unit="dB"))


def test_held_out_combinations_are_compared_with_seen_ones(world: World) -> None:
    prompts = [prompt for name in world.names("scored")[:20] for prompt in single(world, name, 50)]
    perfect = [shown(prompt) for prompt in prompts]
    assert held_out_ratio(perfect).value == 1
    blind = [shown(prompt, reading({}) if prompt.held_out and prompt.scene.style else None) for prompt in prompts]
    assert held_out_ratio(blind).high < 0.6


def test_an_oracle_that_always_says_dog_is_caught(world: World) -> None:
    torch.manual_seed(0)
    fixed = Oracle().eval()
    torch.nn.init.zeros_(fixed.object_head.weight)
    fixed.object_head.bias.data.fill_(-20)
    fixed.object_head.bias.data[fixed.names.index("dog")] = 20
    worst, most, anything = called_objects(world, fixed, 16)
    assert (worst, most.value, anything.value) == ("dog", 1.0, 1.0)


def test_the_page_holds_every_measurement(world: World, untrained: Oracle, tiny: Model) -> None:
    tokenizer: Any = SD.tiny().tokenizers()["text_encoder"]
    clip = world_clip(build_clip(clip_config(len(tokenizer))), tokenizer)
    painter = Renderer(untrained)
    lines, groups = measure(world, painter, tiny, clip, 1)
    text = page(world, tiny, painter, clip, lines, groups)
    assert all(str(line) in text for line in lines)
    assert all(f"| {name} |" in text for name in world.names("scored"))
    generated = {line.what: line for line in lines}
    assert generated["one object: object right"].estimate.value == 1
    assert generated["two objects: all drawn, each at its place"].met
    assert not generated["oracle, unseen compositions: object"].met  # it is untrained
    assert "{" not in text


def test_main_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("toolkit.model.load_model", lambda: None)
    monkeypatch.setattr(world_report, "load_oracle", lambda: None)
    monkeypatch.setattr(world_report, "load_metric_clip", lambda: None)
    monkeypatch.setattr(world_report, "measure", lambda *_: ([Line("a", Estimate(0.5, 0.4, 0.6, 8), 0.9)], {}))
    monkeypatch.setattr(world_report, "page", lambda *_: "page")
    assert world_report.main(["--out", str(tmp_path / "docs" / "emoji-sd.md")]) == 0
    assert (tmp_path / "docs" / "emoji-sd.md").read_text() == "page"
    assert "bars missed: a" in capsys.readouterr().err
