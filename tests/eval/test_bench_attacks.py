"""Attacks in experiments: each has a file of its own, and what it achieved is pooled over concepts."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from eval.attacks.base import Attack, AttackResult, Scenario, Spent
from eval.attacks.closed_form_preimage import ClosedFormPreimage
from eval.attacks.p4d import P4D
from eval.attacks.paraphrase import Paraphrase
from eval.attacks.words import RANDOM
from eval.bench import Bench
from eval.bench_attacks import attempt, control_of, falls_to, pooled_rates, proof, recovered, strongest, together
from eval.cells import Cell, plan
from eval.experiment import read
from eval.intervals import NOTHING, Estimate, difference, rate
from eval.prompts import Prompt
from tests.eval.experiments import FILES
from tests.eval.images import Renderer, reading
from toolkit import cli, registry
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.world.oracle import Oracle, Reading
from toolkit.world.scenes import World

TEXT = """
n = 4
steps = 1
[methods.uce]
[methods.rece]
[attacks.paraphrase]
[attacks.by-given-words]
method = "paraphrase"
words = "given"
[[sections]]
title = "animals"
objects = ["dog", "cat"]
ask = ["name", "kept"]
attacks = ["paraphrase", "by-given-words"]
"""


@dataclass(frozen=True)
class Taught(Attack):
    """Shows whatever it is asked for, erased or never known; and finds a word."""

    label: ClassVar = "white-box"
    paper: ClassVar = ""
    controlled: ClassVar = True

    def run(self, scenario: Scenario) -> AttackResult:
        (name,) = scenario.names()
        shown = scenario.painter.draw(scenario.base, scenario.asked(name))
        width = scenario.model.arch.token_embeddings()["text_encoder"].embedding_dim
        edit = TokenEdit.from_rows({"<found>": {"text_encoder": torch.zeros(1, width)}})
        return self.result(scenario, shown, shown, edit=edit, spent=Spent(3, 5), beside={"other": rate([True])}, notes={"found": [1, 2]})


def nameless(prompt: Prompt) -> Reading | None:
    """An edit that erases the names only."""
    return reading({}, background=prompt.scene.background) if {"dog", "cat"} & set(prompt.words) else None


def cells_of(world: World, tmp_path: Path, text: str = TEXT) -> list[Cell]:
    (tmp_path / "e.toml").write_text(text)
    return plan(world, read(tmp_path / "e.toml"))


def one(world: World, tmp_path: Path, **attacks: Attack) -> Cell:
    """The first cell, under these attacks."""
    return replace(cells_of(world, tmp_path)[0], attacks=attacks)


# --- the file ---------------------------------------------------------------------------------------------------------
def test_sections_say_which_attacks_are_tried(world: World, tmp_path: Path) -> None:
    cells = cells_of(world, tmp_path)
    assert {cell.name for cell in cells} == {"uce-dog", "rece-dog", "uce-cat", "rece-cat"}
    assert all(cell.attacks == {"paraphrase": Paraphrase(), "by-given-words": Paraphrase("given")} and cell.n == 4 for cell in cells)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('attacks = ["paraphrase", ', 'attacks = ["paraphrse", ', "did you mean paraphrase"),
        ('attacks = ["paraphrase", ', "attacks = [", "no section has the attack paraphrase"),
        ('words = "given"', 'word = "given"', "did you mean words"),
        ("[attacks.paraphrase]", "[attacks]\nparaphrase = 3", "needs a table"),
        ('method = "paraphrase"', 'method = "p4"', "unknown attack"),
        ('objects = ["dog", "cat"]', 'subjects = ["penguin"]\nclass_names = ["bird"]', "attacks, which are on what was erased"),
    ],
)
def test_mistakes_are_told_in_one_line(old: str, new: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert old in TEXT
    (tmp_path / "e.toml").write_text(TEXT.replace(old, new))
    assert cli.main(["bench", str(tmp_path / "e.toml"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_the_arena_tries_every_attack_on_methods_of_both_kinds(world: World) -> None:
    experiment = read(FILES / "arena.toml")
    cells = plan(world, experiment)
    tried = {attack.name() for cell in cells for attack in cell.attacks.values()}
    assert tried == set(registry.names("attack")) - {"prompt_set"}, "whose prompts are a file of the user's"
    assert {method.training_free for method in experiment.methods.values()} == {True, False}
    assert {cell.task for cell in cells} == {"pistol", "dog"}
    assert all(cell.attacks.keys() == experiment.attacks.keys() for cell in cells) and len(cells) == 24


# --- measuring --------------------------------------------------------------------------------------------------------
def test_an_attack_has_a_file_of_its_own(world: World, untrained: Oracle, tiny: Model, tmp_path: Path) -> None:
    cell, painter = cells_of(world, tmp_path)[0], Renderer(untrained, spoil=nameless)
    bare = replace(cell, attacks={})
    bench = Bench(world, tiny, painter, tmp_path / "out")
    bench.measure(bare)
    assert not list((tmp_path / "out").rglob("*.safetensors")), "an edit is kept for what may still be asked of it"
    alone = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.json")}
    assert bench.file(bare) == bench.file(cell) and bench.missing(bare) == [] and bench.missing(cell) == ["paraphrase", "by-given-words"]
    bench.measure(cell)
    assert bench.missing(cell) == [] and bench.edit_file(cell).is_file() and tiny.edits == ()
    assert alone == {name: (tmp_path / "out" / name).read_bytes() for name in alone}, "attacks leave what was measured without them"
    held = json.loads(bench.attack_file(cell, "paraphrase").read_text())
    assert held["attack"] == "paraphrase" and held["method"] == "uce" and held["label"] == "text-only" and held["relative"]
    assert (held["attack_success_rate"]["value"], held["clean_rate"]["value"]) == (1, 0)
    assert held["seconds"] > 0 and held["n"] == 4 and held["spent"] == {"steps": 0, "images": 0} and len(held["images"]) == 4
    first, second = bench.attacked(cell)
    assert (first.label, second.label) == ("paraphrase", "by-given-words") and first.rate.value == 1 and first.clean.value == 0
    assert [item.prompt.text for item in first.shown] == list(first.prompts) and not first.impossible and not first.control.n


def test_adding_an_attack_measures_only_it(
    world: World, untrained: Oracle, tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    less, more = one(world, tmp_path, paraphrase=Paraphrase()), cells_of(world, tmp_path)[0]
    Bench(world, tiny, Renderer(untrained, spoil=nameless), tmp_path / "out").measure(less)
    files = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.json")}
    painter = Renderer(untrained, spoil=nameless)
    bench = Bench(world, tiny, painter, tmp_path / "out")
    assert bench.missing(more) == ["by-given-words"]
    monkeypatch.setattr(type(more.fitted), "fit", lambda *_: pytest.fail("the edit is kept"))
    bench.measure(more)
    assert bench.missing(more) == [] and all(path.read_bytes() == data for path, data in files.items())
    assert 0 < painter.painted <= 4 * more.n, "by name and by the new words, before and after"


def test_an_edit_is_fitted_again_only_when_it_is_not_there(world: World, untrained: Oracle, tiny: Model, tmp_path: Path) -> None:
    cell = one(world, tmp_path, paraphrase=Paraphrase())
    bench = Bench(world, tiny, Renderer(untrained, spoil=nameless), tmp_path / "out")
    bench.measure(cell)
    first, file = bench.edit_file(cell).read_bytes(), bench.attack_file(cell, "paraphrase")
    before = bench.file(cell).read_bytes()
    bench.edit_file(cell).unlink()
    file.unlink()
    bench.measure(cell)
    assert bench.edit_file(cell).read_bytes() == first and file.is_file() and bench.file(cell).read_bytes() == before


def test_a_control_is_tried_once_for_all_cells(world: World, untrained: Oracle, tiny: Model, tmp_path: Path) -> None:
    cells = [replace(cell, attacks={"taught": Taught()}) for cell in cells_of(world, tmp_path)[:2]]
    bench = Bench(world, tiny, Renderer(untrained, spoil=nameless), tmp_path / "out")
    for cell in cells:
        bench.measure(cell)
        assert bench.missing(cell) == []
    (control,) = (tmp_path / "out").glob("control.*")
    assert json.loads(control.read_text())["attack_success_rate"]["value"] == 1
    (found,) = bench.attacked(cells[0])
    assert found.control.value == 1 and found.spent == Spent(3, 5) and found.beside["other"].value == 1
    assert recovered([found]).value == 0 and recovered([found]).low < 0
    assert (tmp_path / "out" / "edits" / f"{found.stem}.safetensors").is_file()
    control.unlink()
    assert bench.missing(cells[0]) == ["taught"]


def test_an_attack_that_cannot_be_tried_says_why(world: World, untrained: Oracle, tiny: Model, tmp_path: Path) -> None:
    cell = one(world, tmp_path, preimage=ClosedFormPreimage())
    width = tiny.arch.token_embeddings()["text_encoder"].embedding_dim
    edit = TokenEdit.from_rows({"<toy>": {"text_encoder": torch.zeros(1, width)}})
    bench = Bench(world, tiny, Renderer(untrained), tmp_path)
    bench._attack(cell, "preimage", edit)
    (found,) = bench.attacked(cell)
    assert "nothing to invert" in found.impossible and math.isnan(found.rate.value) and found.needs == "white-box"
    assert pooled_rates([found]) == {} and strongest([found]) == ("", NOTHING) and bench._untried(cell) == []
    other = replace(found, cell=replace(cell, task="other"))
    (line,) = proof([found, other])
    assert line[-1] == f"{cell.name}, {other.cell.name}: {found.impossible}", "a reason is said once"


def test_the_control_of_words_is_random_ones_of_every_cell(world: World, untrained: Oracle, tiny: Model, tmp_path: Path) -> None:
    bench = Bench(world, tiny, Renderer(untrained, spoil=nameless), tmp_path)
    cell = one(world, tmp_path, words=P4D(length=2, prompts=2, steps=1, steps_per_look=1, noises=1))
    bench.measure(cell)
    (found,) = bench.attacked(cell)
    chance = found.beside[RANDOM]
    assert chance.n == cell.n and control_of([found]) == chance and control_of([found, found]).n == 2 * cell.n
    assert recovered([found]) == difference(found.rate, chance)


# --- rates ------------------------------------------------------------------------------------------------------------
def test_rates_of_concepts_are_pooled_by_their_images() -> None:
    few, many = rate([True] * 4 + [False] * 4), rate([False] * 20 + [True] * 4)
    both = together([few, NOTHING, many])
    assert both.value == pytest.approx(8 / 32) and both.n == 32
    low = 0.25 - math.hypot(8 / 32 * (few.value - few.low), 24 / 32 * (many.value - many.low))
    high = 0.25 + math.hypot(8 / 32 * (few.high - few.value), 24 / 32 * (many.high - many.value))
    assert (both.low, both.high) == pytest.approx((low, high)) and together([NOTHING]).n == 0


def test_the_pooled_interval_covers() -> None:
    draw = torch.Generator().manual_seed(0)
    shares, hits = (0.1, 0.7), 0
    for _ in range(400):
        drawn = [(torch.rand(24, generator=draw) < share).tolist() for share in shares]
        estimate = together([rate(outcomes) for outcomes in drawn])
        hits += estimate.low <= sum(shares) / 2 <= estimate.high
    assert 0.92 <= hits / 400 <= 0.99


def test_a_method_falls_to_attacks_that_bring_back_half(world: World, untrained: Oracle, tiny: Model, tmp_path: Path) -> None:
    bench = Bench(world, tiny, Renderer(untrained, spoil=nameless), tmp_path / "out")
    cell = cells_of(world, tmp_path)[0]
    bench.measure(cell)
    first, second = bench.attacked(cell)
    weak = replace(second, rate=Estimate(0.4, 0.3, 0.6, 4))
    assert falls_to([first, weak]) == ["paraphrase"] and strongest([first, weak])[0] == "paraphrase"


def test_what_an_attack_cannot_do_is_a_result_and_what_breaks_is_not() -> None:
    def refuse() -> AttackResult:
        raise UserError("no; do otherwise")

    def fail() -> AttackResult:
        raise ZeroDivisionError

    record, found = attempt(Paraphrase(), refuse, 4, {})
    assert found is None and record["impossible"] == "no; do otherwise"
    with pytest.raises(ZeroDivisionError):
        attempt(Paraphrase(), fail, 4, {})


# --- the report -------------------------------------------------------------------------------------------------------
def test_the_pages_tell_of_attacks(
    world: World,
    untrained: Oracle,
    tiny: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("eval.commands.bench.open_model", lambda args: tiny)
    monkeypatch.setattr("eval.commands.evaluate.knows_world", lambda model: True)
    monkeypatch.setattr("toolkit.world.oracle.load_oracle", lambda: untrained)
    painters: list[Renderer] = []
    monkeypatch.setattr("eval.rates.Painter", lambda *_: painters.append(Renderer(untrained, spoil=nameless)) or painters[-1])
    (tmp_path / "e.toml").write_text(TEXT)
    words = ["--out", str(tmp_path / "out"), "--html", str(tmp_path / "page.html"), "--images", "--json"]

    def run(*more: str) -> dict[str, Any]:
        assert cli.main(["bench", str(tmp_path / "e.toml"), *words, *more]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    found = run()
    text, html = (tmp_path / "out" / "e.md").read_text(), (tmp_path / "page.html").read_text()
    assert "| method | clean | paraphrase | by-given-words | the strongest | falls to |" in text and "**Attacked**" in text
    assert "| uce | 0 % " in text and found["html"] == str(tmp_path / "page.html") and len(found["results"]) == 4 + 8
    assert html.count("<svg") == 1 and html.count('class="heat"') == 3 and html.count("data:image/webp") == 4 * 4
    assert "palimpsest attack --edit" in html and "--set words=given" in html and f"palimpsest bench {tmp_path}/e.toml" in html
    assert "http" not in html.replace("https://", "http").split("<script>")[0].replace("charset", "") and 'src="data:' in html
    images = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "images").rglob("*.png")}
    assert len(images) > 50 and run()["measured"] == 0 and painters[-1].painted == 0
    next(iter(images)).unlink()
    assert run()["measured"] >= 1
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "images").rglob("*.png")}
    assert again.keys() == images.keys() and sum(again[path] != images[path] for path in images) == 1, "only what was lost is written"
