"""Vocabulary: what is found can be typed, the concept's names cannot be found, and searches find what is known."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.words import wordy
from toolkit.arch.sd import SD
from toolkit.arch.sdxl import SDXL
from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.vocabulary import Slots, StraightThrough, Vocabulary, genetic, onto_simplex, swaps

NAMES = ("pistol", "squirt gun", "ox")


@pytest.fixture(params=[SD, SDXL])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Model:
    return wordy(monkeypatch, request.param)


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_words_in_a_row_are_read_as_the_tokens_they_were_chosen_as(model: Model) -> None:
    vocabulary = Vocabulary.of(model, NAMES)
    choices = torch.cat([torch.arange(len(vocabulary) // 12 * 12).view(-1, 12), vocabulary.random((50, 12), draw())])
    for part, tokenizer in model.arch.tokenizers().items():
        ids = torch.tensor(tokenizer(vocabulary.texts(choices), add_special_tokens=False).input_ids)
        assert ids.shape == choices.shape
        assert torch.equal(model.arch.token_embeddings()[part].weight[ids], vocabulary.rows[part][choices])


def test_the_concepts_names_are_left_out(model: Model) -> None:
    every, without = Vocabulary.of(model).words, Vocabulary.of(model, NAMES).words
    assert len(without) > 1000 and "revolver" in without and "box" in without
    missing = set(every) - set(without)
    assert {"pistol", "gun"} <= missing
    assert all("pistol" in word or "gun" in word or "squirt" in word or word == "ox" for word in missing)
    assert all(word.isascii() and word.isalpha() for word in every)


def test_a_vocabulary_without_words_is_refused(tiny: Model) -> None:
    assert Vocabulary.of(tiny).words == ("photo", "picture")
    with pytest.raises(UserError, match="no words of sd are left to search without photo, picture"):
        Vocabulary.of(tiny, ("photo", "picture"))


def test_slots_say_what_typed_words_say(model: Model) -> None:
    vocabulary = Vocabulary.of(model)
    choices = vocabulary.random((2, 4), draw())
    tokenizers = model.arch.tokenizers()
    with Slots(model, 4, 2) as slots:
        rows = {part: table[choices].requires_grad_() for part, table in vocabulary.rows.items()}
        text = slots.encode([f"a photo of {slots.words[0]} on red", f"{slots.words[1]}"], rows)
        (text.hidden.square().sum() + (0 if text.pooled is None else text.pooled.square().sum())).backward()
        for part in rows.values():
            assert part.grad is not None and (part.grad.abs().sum(-1) > 0).all()
        assert all(p.grad is None for module in model.arch.components().values() for p in module.parameters())
    typed = vocabulary.texts(choices)
    expected = model.arch.encode([f"a photo of {typed[0]} on red", typed[1]])
    torch.testing.assert_close(text.hidden, expected.hidden)
    assert model.edits == () and all(tokenizer is tokenizers[part] for part, tokenizer in model.arch.tokenizers().items())


def test_the_gradient_of_a_choice_is_that_of_its_weights_cut_off() -> None:
    weights = torch.full((2, 3), 1 / 3, requires_grad=True)
    outer = torch.tensor([[0.5, -4.0, 0.0], [3.0, -0.1, 1.0]])
    one_hot = StraightThrough.apply(weights, torch.tensor([2, 0]))
    assert torch.equal(one_hot, torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))
    (one_hot * outer).sum().backward()
    assert weights.grad is not None and torch.equal(weights.grad, torch.tensor([[0.5, -1.0, 0.0], [1.0, -0.1, 1.0]]))


def test_the_projection_is_the_nearest_row_of_the_simplex() -> None:
    weights = torch.randn(6, 40, generator=draw(), dtype=torch.float64)
    low, high = weights.amin(1) - 1, weights.amax(1)
    for _ in range(100):  # what is left after a shift mu adds up to 1: mu by halving the interval
        middle = (low + high) / 2
        too_much = (weights - middle[:, None]).clamp(min=0).sum(1) > 1
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    torch.testing.assert_close(onto_simplex(weights), (weights - high[:, None]).clamp(min=0), rtol=0, atol=1e-12)
    inside = torch.rand(4, 9, generator=draw()).softmax(-1)
    torch.testing.assert_close(onto_simplex(inside), inside)


def test_the_nearest_words_are_by_angle_and_of_all_encoders(model: Model) -> None:
    vocabulary = Vocabulary.of(model)
    choices = vocabulary.random((3, 5), draw())
    moved = {part: 7 * table[choices] + 0.1 * table.std() for part, table in vocabulary.rows.items()}
    assert torch.equal(vocabulary.nearest(moved), choices)


def test_swaps_replace_one_word_by_one_of_the_lowest_gradient() -> None:
    gradient, choice = torch.randn(4, 30, generator=draw()), torch.tensor([3, 1, 4, 1])
    tried = swaps(gradient, choice, 40, 5, draw())
    assert tried.shape == (40, 4)
    lowest = gradient.argsort()[:, :5]
    for row, place in zip(tried, torch.arange(4).repeat_interleave(10), strict=True):
        assert (row != choice).sum() <= 1 and row[place] in lowest[place]
    assert torch.equal(tried, swaps(gradient, choice, 40, 5, draw())) and not torch.equal(tried, swaps(gradient, choice, 40, 5, draw(1)))
    assert torch.equal(swaps(gradient, choice, 4, 1, draw()).diagonal(), gradient.argmin(1))


def test_the_genetic_search_finds_a_known_choice_and_keeps_the_best() -> None:
    goal, asked = torch.tensor([5, 0, 11, 7, 2, 9]), []

    def loss(choices: Tensor) -> Tensor:
        asked.append(len(choices))
        return (choices != goal).sum(1).float()

    def run(seed: int) -> tuple[Tensor, list[float]]:
        draws = draw(seed)
        first = torch.randint(12, (60, 6), generator=draws)
        return genetic(loss, first, 12, generations=120, crossover=0.5, mutation=0.25, draw=draws)

    found, lowest = run(0)
    assert torch.equal(found, goal) and lowest[-1] == 0
    assert all(a >= b for a, b in pairwise(lowest))
    assert asked[0] == 60 and 0 < sum(asked[1:]) / 120 < 60, "what is kept as it is is not asked about again"
    assert torch.equal(run(0)[0], found) and run(1)[1] != lowest


def test_one_hot_rows_in_float64_agree_with_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = Vocabulary.of(wordy(monkeypatch))
    choice = vocabulary.random((7,), draw())
    one_hot = F.one_hot(choice, len(vocabulary)).double()
    torch.testing.assert_close((one_hot @ vocabulary.rows["text_encoder"].double()).float(), vocabulary.rows["text_encoder"][choice])


def test_a_genetic_search_tells_of_every_generation() -> None:
    """Whoever is told may end it by raising."""
    told: list[tuple[int, int]] = []
    population, draw = torch.zeros(4, 3, dtype=torch.long), torch.Generator().manual_seed(0)
    chances = {"crossover": 0.5, "mutation": 0.5}
    genetic(
        lambda choices: choices.sum(1).float(), population, 5, generations=3, **chances, draw=draw, progress=lambda *at: told.append(at)
    )
    assert told == [(1, 3), (2, 3), (3, 3)]
