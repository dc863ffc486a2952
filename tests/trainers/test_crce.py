"""CRCE against its equation, and what its coreferents and words to keep do."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from toolkit.arch.sd import SD
from toolkit.concepts import Concept, EraseTask
from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.runs import seeded
from toolkit.sample import partly_denoised
from trainers.erase.coreferents import BUILT_IN, LIST, LLM, with_coreferents
from trainers.erase.crce import CRCE, ErasingTogether
from trainers.loop import Batch, train

QUICK: dict[str, Any] = {"trajectories": 2, "sampling_steps": 4, "max_train_steps": 2}
CAT = Concept("cat", ("kitty", "feline", "tom"), anchor="dog")
TASK = EraseTask((CAT, Concept("bird", ("fowl",))), preserve=("cow", "a horse", "sheep"), templates=("a {}",))
CERTAINTY = {"kitty": 0.8, "fowl": 0.2, "cow": 0.6}


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(SD.tiny(prediction_type="v_prediction"))


def moved(objective: ErasingTogether) -> None:
    with torch.no_grad():
        for parameter in objective.weights.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=seeded("moved"))


def some(words: tuple[str, ...], count: int, *key: str | int) -> list[str]:
    return [words[i] for i in torch.randperm(len(words), generator=seeded(*key))[:count].tolist()]


def test_the_loss_is_that_of_the_concept_its_coreferents_and_what_stays(model: Model) -> None:
    """Against the equation written out, one prediction at a time: the latents are the concept's, for every word."""
    weights: dict[str, Any] = {"coreferent_weight": 0.7, "preserve_weight": 1.3}
    method = CRCE(**QUICK, **weights, eta=1.5, seed=7, train_batch_size=4, coreferents_per_sample=2, preserve_per_sample=2)
    objective = ErasingTogether(model, method, TASK, CERTAINTY)
    with objective.weights:
        moved(objective)
        value = objective.loss(Batch(5, 1, 2))[0].item()
        wanted, seen = 0.0, set[int]()
        for place in (4, 5, 6, 7):
            draw = seeded("erase", 7, 5, place)
            row, step = (int(torch.randint(size, (), generator=draw)) for size in (2, 4))
            concept, base = TASK.concepts[row], ["a dog", ""][row]
            coreferents = some(concept.synonyms, 2, "coreferents", 7, 5, place)
            kept = some(TASK.preserve, 2, "keep", 7, 5, place)
            seen.add(len(coreferents))
            asked = ["", base, *(f"a {word}" for word in (concept.name, *coreferents)), *kept]
            texts = [model.arch.encode([prompt]) for prompt in asked]
            with objective.weights.off(), torch.no_grad():
                x, t = partly_denoised(model, [f"a {concept.name}"], [7 + row], [step], steps=4, guidance=3.0)
                nothing, start, *before = (model.arch.predict(x, t, text) for text in texts)
            with torch.no_grad():
                now = [model.arch.predict(x, t, text) for text in texts[2:]]
            steered = [(a - (start - 1.5 * (b - nothing))).square().mean().item() for a, b in zip(now, before, strict=True)]
            stayed = [(a - b).square().mean().item() for a, b in zip(now, before, strict=True)]
            wanted += steered[0] / 4
            for error, word in zip(steered[1 : 1 + len(coreferents)], coreferents, strict=True):
                wanted += 0.7 * CERTAINTY.get(word, 1.0) * error / len(coreferents) / 4
            for error, word in zip(stayed[1 + len(coreferents) :], kept, strict=True):
                wanted += 1.3 * CERTAINTY.get(word, 1.0) * error / len(kept) / 4
    assert seen == {1, 2}  # both concepts were drawn, one of which has fewer words than are asked for
    assert value == pytest.approx(wanted, rel=1e-4)


def test_two_parts_of_a_step_are_one_of_twice_the_size(model: Model) -> None:
    def mean(size: int, parts: int) -> float:
        objective = ErasingTogether(model, CRCE(**QUICK, train_batch_size=size), TASK, CERTAINTY)
        with objective.weights:
            moved(objective)
            return sum(objective.loss(Batch(3, part, parts))[0].item() for part in range(parts)) / parts

    assert mean(2, 2) == pytest.approx(mean(4, 1), rel=1e-5)


def errors(model: Model, **weights: Any) -> dict[str, float]:
    """How far the predictions are from the loss's goals after training with these weights, by term."""
    few: dict[str, Any] = {**QUICK, "max_train_steps": 12, "learning_rate": 3e-3, "parameters": "x"}
    method = CRCE(**few, **weights)
    objective = ErasingTogether(model, method, TASK, {})
    with objective.weights:
        train(objective, method.loop(), in_place=True, quiet=True)
        objective.method = CRCE(**few, train_batch_size=4)
        return objective.loss(Batch(0))[1]


def test_coreferents_are_steered_and_neighbours_stay_when_they_weigh(model: Model) -> None:
    steered, kept = errors(model, preserve_weight=0.0), errors(model, coreferent_weight=0.0)
    assert steered["coreferents"] < 0.9 * kept["coreferents"]
    assert kept["keep"] < 0.9 * steered["keep"]


@pytest.mark.parametrize("weights", [{"preserve_weight": 0.0}, {"coreferent_weight": 0.0, "preserve_weight": 0.0}])
@pytest.mark.filterwarnings("ignore")
def test_concepts_without_coreferents_are_erased_by_name(model: Model, weights: dict[str, Any]) -> None:
    edit = CRCE(**QUICK, **weights).fit(model, EraseTask((Concept("cow"), CAT)))
    assert set(edit.sites()) == {f"{site}.weight" for site in model.arch.text_linears()}
    assert any(edit.delta(site).any() for site in edit.sites())


def test_what_a_file_says_joins_the_task(model: Model, tmp_path: Path) -> None:
    told = {
        "Cat": {"coreferents": {"kitty": "High", "mouser": 0.5}, "retain": ["cow", "fox"]},
        "boat": {"coreferents": ["ship"]},
    }
    file = tmp_path / "words.json"
    file.write_text(json.dumps(told))
    task, certainty = with_coreferents(TASK, str(file))
    assert task.concepts[0].synonyms == ("kitty", "feline", "tom", "mouser") and task.concepts[1] == TASK.concepts[1]
    assert task.preserve == ("cow", "a horse", "sheep", "fox")
    assert certainty == {"kitty": 0.8, "mouser": 0.5, "cow": 1.0, "fox": 1.0}
    fitted = CRCE(**QUICK, coreferents=str(file)).fit(model, EraseTask((Concept("cat"),)))  # all its words are in the file
    assert fitted.info.notes["steps"] == 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "cannot read"),
        ("[]", "is not a JSON object of objects"),
        ('{"boat": {}}', "unknown concept"),
        ('{"cat": {"corefs": {}}}', "did you mean coreferents"),
        ('{"cat": {"coreferents": {"kitty": "sure"}}}', "unknown certainty of 'kitty'"),
        ('{"cat": {"coreferents": {"kitty": 0}}}', "needs a number above 0"),
        ('{"cat": {"coreferents": "kitty"}}', "needs words with their certainty"),
        ('{"cat": {"coreferents": {"cow": 1}}, "bird": {"coreferents": {"cow": 0.5}}}', "the certainties 1.0 and 0.5"),
        ('{"cat": {"retain": ["Fowl"]}}', "'Fowl' is both erased and preserved"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(model: Model, tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "words.json"
    file.write_text(text)
    with pytest.raises(UserError, match=told):
        CRCE(**QUICK, coreferents=str(file)).fit(model, TASK)


def test_the_built_in_list_names_words_that_can_be_erased_and_kept() -> None:
    concepts = json.loads(LIST.read_text())
    for name in concepts:
        task, certainty = with_coreferents(EraseTask((Concept(name),)), BUILT_IN)
        assert len(task.concepts[0].synonyms) >= 2 and len(task.preserve) >= 4 and certainty.keys() >= set(task.concepts[0].synonyms)
    with pytest.raises(UserError, match="unknown concept in built-in"):
        with_coreferents(EraseTask((Concept("zebra crossing"),)), BUILT_IN)


def test_an_llm_is_asked_once_and_its_words_are_in_the_edit(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "llm.py"
    script.write_text(
        "import pathlib, sys\n"
        "asked = pathlib.Path(__file__).with_name('asked.txt')\n"
        "asked.write_text((asked.read_text() if asked.exists() else '') + sys.stdin.read())\n"
        """print('Sure! ```json\\n{"cat": {"coreferents": {"kitty": "low"}, "retain": ["cow"]}}\\n``` Anything else?')\n"""
    )
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PALIMPSEST_LLM", f"{sys.executable} {script}")
    for _ in range(2):
        edit = CRCE(**QUICK, coreferents=LLM).fit(model, EraseTask((Concept("cat"),)))
    assert edit.info.notes["coreferents"] == {"cat": ("kitty",)} and edit.info.notes["retained"] == ("cow",)
    request = (tmp_path / "asked.txt").read_text()
    assert request.count('["cat"]') == 1 and "very high, high, normal, low, very low" in request


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (None, "needs the command of an LLM; set PALIMPSEST_LLM"),
        ("no-such-command-here", "cannot run PALIMPSEST_LLM"),
        (f"{sys.executable} -c 'import sys; sys.exit(\"no key\")'", "ended with 1 and said: no key"),
        ("echo I cannot help with that", "cannot read the answer of PALIMPSEST_LLM"),
    ],
)
def test_an_llm_that_does_not_answer_is_a_users_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str | None, told: str
) -> None:
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PALIMPSEST_LLM", raising=False)
    if command:
        monkeypatch.setenv("PALIMPSEST_LLM", command)
    for _ in range(2):  # nothing of it is kept
        with pytest.raises(UserError, match=told):
            with_coreferents(TASK, LLM)


def test_what_would_have_no_effect_is_said(model: Model) -> None:
    with pytest.warns(UserWarning, match="only the name is erased: cat"):
        CRCE(**QUICK).fit(model, EraseTask((Concept("cat"),), preserve=("cow",)))
    with pytest.warns(UserWarning, match="coreferent_weight is 0, so synonyms have no effect"):
        CRCE(**QUICK, coreferent_weight=0.0).fit(model, EraseTask((CAT,), preserve=("cow",)))
    with pytest.raises(UserError, match="nothing is preserved"):
        CRCE(**QUICK).fit(model, EraseTask((CAT,)))
    with pytest.raises(UserError, match="trajectories is 2, for 3 concepts"):
        CRCE(**QUICK).fit(model, EraseTask((CAT, Concept("bird"), Concept("boat")), preserve=("cow",)))
    for wrong in ({"guidance": 1.0}, {"coreferent_weight": -1.0}, {"coreferents_per_sample": 0}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))} (is )?{next(iter(wrong.values()))}"):
            CRCE.from_config(wrong)
