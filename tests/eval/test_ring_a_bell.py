"""Ring-A-Bell, on words and on embeddings: what is searched for against a computation in float64, and both runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from eval.attacks import ring_a_bell
from eval.attacks.ring_a_bell import RingABell, direction
from eval.attacks.ring_a_bell_embedding import Pushed, RingABellEmbedding
from tests.eval.test_words import scenario
from tests.words import erased, wordy
from toolkit.arch.sd import SD
from toolkit.arch.sdxl import SDXL
from toolkit.arch.text import Text
from toolkit.errors import UserError
from toolkit.sample import Hook, State, sample
from toolkit.vocabulary import Vocabulary
from toolkit.world.oracle import Oracle
from toolkit.world.scenes import World


def flat(text: Text) -> Tensor:
    """Everything that the denoiser reads, in float64 [n, ...]."""
    pooled = torch.zeros(len(text), 0) if text.pooled is None else text.pooled
    return torch.cat([text.hidden.flatten(1), pooled], 1).double()


def vocabulary_of_dogs(vocabulary: Vocabulary) -> Vocabulary:
    place = vocabulary.words.index("dog")
    return Vocabulary(("dog",), {part: rows[[place]] for part, rows in vocabulary.rows.items()})


@pytest.mark.parametrize("family", [SD, SDXL])
def test_the_loss_is_the_distance_to_the_pushed_prompt(
    world: World, untrained: Oracle, monkeypatch: pytest.MonkeyPatch, family: Any
) -> None:
    model = erased(wordy(monkeypatch, family))
    attacked = scenario(world, untrained, model)
    encode = attacked.base.arch.encode
    having = [prompt.text for prompt in attacked.asked("pistol", n=4)]
    concept = (flat(encode(having)) - flat(encode([text.replace("pistol", "dog") for text in having]))).mean(0)
    every = Vocabulary.of(model, attacked.words("pistol"))
    dogs = direction(attacked, "pistol", vocabulary_of_dogs(every), 4, 0)
    monkeypatch.setattr(ring_a_bell, "direction", lambda *given: dogs)
    losses: list[Any] = []
    monkeypatch.setattr(ring_a_bell, "genetic", lambda loss, first, words, **given: losses.append(loss) or (first[0], []))
    attack = RingABell(prompts=2, length=3, eta=1.5, population=4)
    list(attack.candidates(attacked, attack.attacked(attacked, "pistol"), every))
    choices = every.random((5, 3), torch.Generator().manual_seed(0))
    prompts = [prompt.text for prompt in attacked.asked("pistol", n=2)]
    for loss, prompt in zip(losses, prompts, strict=True):
        goal = flat(encode([prompt])) + 1.5 * concept
        expected = (flat(encode(every.texts(choices))) - goal).square().sum(1)
        torch.testing.assert_close(loss(choices).double(), expected, rtol=1e-4, atol=0)


def test_the_search_comes_closer_and_is_determined_by_its_seed(world: World, untrained: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    model = erased(wordy(monkeypatch))
    genetic, lowest = ring_a_bell.genetic, []

    def noting(*given: Any, **options: Any) -> Any:
        found = genetic(*given, **options)
        lowest.append(found[1])
        return found

    monkeypatch.setattr(ring_a_bell, "genetic", noting)
    attack = RingABell(prompts=2, length=4, population=10, generations=6, pairs=2)
    found, again = (attack.run(scenario(world, untrained, model)) for _ in range(2))
    assert found.label == "text-only" and (found.spent.steps, found.spent.images) == (12, 0)
    assert found.prompts == again.prompts and all(len(prompt.split()) == 4 for prompt in found.prompts)
    assert all(losses[-1] < losses[0] for losses in lowest)
    with pytest.raises(UserError, match="population is 1"):
        RingABell(population=1)


@pytest.mark.parametrize("family", [SD, SDXL])
def test_the_direction_is_added_to_what_the_denoiser_reads(
    world: World, untrained: Oracle, monkeypatch: pytest.MonkeyPatch, family: Any
) -> None:
    model = erased(wordy(monkeypatch, family))
    attacked = scenario(world, untrained, model)
    shift = direction(attacked, "pistol", Vocabulary.of(model), 2, 0)
    read: list[Text] = []

    class Reading(Hook):
        def on_prompt(self, state: State) -> None:
            read.append(state.texts["prompt"])

    sample(model, ["a red dog"], [0], steps=1, guidance=1.0, hooks=[Pushed(attacked, 3 * shift), Reading()])
    encode = attacked.base.arch.encode
    text = encode(["a red dog"])
    torch.testing.assert_close(read[0].hidden, text.hidden + 3 * shift[: text.hidden.shape[1]])
    if text.pooled is not None:
        assert read[0].pooled is not None and not torch.equal(read[0].pooled, text.pooled)
        torch.testing.assert_close(read[0].pooled, text.pooled + 3 * shift[-1, : text.pooled.shape[1]])


def test_the_embedding_attack_runs(world: World, untrained: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    model = erased(wordy(monkeypatch))
    found = RingABellEmbedding(pairs=2).run(scenario(world, untrained, model))
    assert found.label == "white-box" and found.clean_rate.value == 0
    assert found.attack_success_rate.value == 1  # the renderer draws the truth under hooks
    assert len(model.edits) == 1
    with pytest.raises(UserError, match="pairs is 0"):
        RingABellEmbedding(pairs=0)
