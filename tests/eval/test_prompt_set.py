from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from eval.attacks.base import Scenario
from eval.attacks.prompt_set import NOWHERE, PromptSet, Row
from eval.prompts import Prompt, resolve
from eval.rates import Shown
from tests.eval.images import Renderer, reading, shown
from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.sample import Hook
from toolkit.world.oracle import Oracle
from toolkit.world.scenes import World

# The columns as the papers' own files have them.
I2P = "prompt,categories,hard,inappropriate_percentage,nudity_percentage,q16_percentage,sd_safety_percentage,prompt_toxicity,lexica_url,"
I2P += "sd_seed,sd_guidance_scale,sd_image_width,sd_image_height,sd_model"
FILES = {
    "i2p": (f'{I2P}\n"a gun, old",violence,0,10,60,0,0,0,u,7,7.5,512,512,1.4\n', Row("a gun, old", 7, 7.5)),
    "mma": ("target_prompt,adv_prompt\na gun,zx gn qq\n", Row("zx gn qq", None, None)),
    "ring_a_bell": ("sensitive prompt,normal prompt\na gun,a toy\n", Row("a gun", None, None)),
    "p4d": (",case_number,prompt,evaluation_seed,classes,evaluation_guidance\n0,90,a gun,1562,gun,7.5\n", Row("a gun", 1562, 7.5)),
    "unlearn_diff_atk": ("case_number,prompt,evaluation_seed,evaluation_guidance\n0,a gun,69922,7.5\n", Row("a gun", 69922, 7.5)),
    "coco": ("image_id,source,prompt,evaluation_seed\n000000203564,coco-30k,a gun,41337\n", Row("a gun", 41337, None)),
    "esd": (",case_number,prompt,evaluation_seed,class\n0,0,a gun,4068,gun\n", Row("a gun", 4068, None)),
    "prompts": ("prompt,seed\na gun,\n", Row("a gun", None, None)),
}


def written(tmp_path: Path, text: str) -> str:
    (tmp_path / "prompts.csv").write_text(text, encoding="utf-8-sig")
    return str(tmp_path / "prompts.csv")


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_recognised_by_its_columns(tmp_path: Path, name: str) -> None:
    text, row = FILES[name]
    kind, rows = PromptSet(file=written(tmp_path, text)).read()
    assert kind.name == name
    assert rows == [row]


def test_rows_can_be_chosen(tmp_path: Path) -> None:
    file = written(tmp_path, "prompt,kind,share\na,red things,60\nb,blue,10\nc,red,70\n")
    assert [row.text for row in PromptSet(file=file, where="kind=red").read()[1]] == ["a", "c"]
    assert [row.text for row in PromptSet(file=file, where="share>60").read()[1]] == ["c"]
    assert [row.text for row in PromptSet(file=file, rows=2).read()[1]] == ["a", "b"]
    assert [row.text for row in PromptSet(file=file, column="kind").read()[1]] == ["red things", "blue", "red"]


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("words\na\n", {}, "needs a column of prompts"),
        ("prompt\na\n", {"column": "text"}, "needs the column 'text'"),
        ("prompt\na\n", {"where": "kind=red"}, "where asks for the column 'kind'"),
        ("prompt,kind\na,x\n", {"where": "kind=red"}, "no prompt in"),
        ("prompt,kind\na,x\n", {"where": "kind>1"}, "text where a number is needed"),
        ("prompt,evaluation_seed\na,x\n", {}, "text where a number is needed"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path: Path, text: str, options: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        PromptSet.from_config({"file": written(tmp_path, text), **options}).read()
    with pytest.raises(UserError, match="no file ''"):
        PromptSet().read()
    with pytest.raises(UserError, match="needs COLUMN>NUMBER"):
        PromptSet(where="red")


class Reads(Renderer):
    """Shows a pistol where a prompt says gun. Notes how it is asked; kept images would be of another scale."""

    def _paint(self, model: Model, prompts: Sequence[Prompt], title: str, hooks: Sequence[Hook]) -> list[Shown]:
        if prompts and prompts[0].scene != NOWHERE:
            return super()._paint(model, prompts, title, hooks)
        assert not self._kept or self.guidance == 2.0
        images: list[Shown] = []
        for prompt in prompts:
            asked.append((prompt.text, prompt.seed, self.guidance, bool(model.edits)))
            there = "gun" in prompt.text and not (model.edits and self.guidance > 5)
            images.append(shown(prompt, reading({"center": "pistol"} if there else {})))
        return images


asked: list[tuple[str, int, float, bool]] = []


def test_prompts_are_drawn_with_their_seeds_and_scales(world: World, untrained: Oracle, edited: Model, tmp_path: Path) -> None:
    asked.clear()
    text = "prompt,sd_seed,sd_guidance_scale\na gun,7,7.5\nan old gun,8,\na cloud,9,7.5\n"
    scenario = Scenario(world, Reads(untrained), edited, edited.reference(), resolve(world, "pistol"), n=4, seed=3)
    found = PromptSet(file=written(tmp_path, text)).run(scenario)
    assert sorted(one[:3] for one in asked if one[3]) == [("a cloud", 9, 7.5), ("a gun", 7, 7.5), ("an old gun", 8, 2.0)]
    assert [item.prompt.text for item in found.shown] == ["a gun", "an old gun", "a cloud"]
    assert found.attack_success_rate.value == pytest.approx(1 / 3) and found.beside["unedited"].value == pytest.approx(2 / 3)
    assert found.notes == {"format": "i2p", "column": "prompt", "rows": 3}
    asked.clear()
    PromptSet(file=written(tmp_path, text), row_guidance=False).run(scenario)
    assert {one[2] for one in asked} == {2.0}
