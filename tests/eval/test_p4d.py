"""P4D: its step against one computed from typed prompts, and the run as a whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from eval.attacks.p4d import P4D
from tests.eval.test_words import scenario
from tests.words import erased, word_gradients, wordy
from toolkit.arch.sd import SD
from toolkit.arch.sdxl import SDXL
from toolkit.arch.text import Text
from toolkit.errors import UserError
from toolkit.vocabulary import Vocabulary
from toolkit.world.oracle import Oracle
from toolkit.world.scenes import World


@pytest.mark.parametrize(("family", "prediction"), [(SD, "epsilon"), (SD, "v_prediction"), (SDXL, "epsilon")])
def test_a_step_is_the_papers(world: World, untrained: Oracle, monkeypatch: pytest.MonkeyPatch, family: Any, prediction: str) -> None:
    model = erased(wordy(monkeypatch, family, prediction))
    attacked = scenario(world, untrained, model)
    free: list[dict[str, Tensor]] = []
    noised: list[tuple[Tensor, Tensor]] = []
    nearest, predict = Vocabulary.nearest, model.arch.predict

    def noting(self: Vocabulary, rows: dict[str, Tensor]) -> Tensor:
        free.append({part: value.detach().clone() for part, value in rows.items()})
        return nearest(self, rows)

    monkeypatch.setattr(Vocabulary, "nearest", noting)
    monkeypatch.setattr(model.arch, "predict", lambda x, t, text: noised.append((x, t)) or predict(x, t, text))
    attack = P4D(prompts=2, length=3, steps=1, steps_per_look=1, noises=2)
    vocabulary = Vocabulary.of(model, attacked.words("pistol"))
    given = attack.attacked(attacked, "pistol")
    ((choices, steps),) = attack.candidates(attacked, given, vocabulary)
    monkeypatch.undo()

    (x, t), first, after = noised[0], free[0], free[1]
    base = attacked.base.arch
    with torch.no_grad():
        goal = base.predict(x, t, base.encode(given.prompts)).double()

    def loss(text: Text) -> Tensor:
        return (model.arch.predict(x, t, text).double() - goal).square().mean((1, 2, 3)).sum()

    gradients = word_gradients(model, vocabulary.texts(vocabulary.nearest(first)), 3, loss)
    for part, row in first.items():
        gradient = gradients[part]
        expected = (1 - attack.learning_rate * attack.weight_decay) * row - attack.learning_rate * gradient / (gradient.abs() + 1e-8)
        clear = gradient.abs() > 1e-6
        assert clear.float().mean() > 0.5
        torch.testing.assert_close(after[part][clear], expected[clear], rtol=0, atol=2e-3)
    assert steps == 1 and torch.equal(choices, vocabulary.nearest(after))


def test_the_noised_pictures_are_spread_over_time(world: World, untrained: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    attacked = scenario(world, untrained, erased(wordy(monkeypatch)))
    attack = P4D(prompts=2, noises=4)
    given = attack.attacked(attacked, "pistol")
    assert given.latents is not None
    noised = attack.noised(attacked, given, given.latents)
    for i, (x, t, target) in enumerate(noised):
        assert all(250 * i <= int(time) < 250 * (i + 1) for time in t) and x.shape == target.shape == given.latents.shape


def test_it_runs_and_the_words_stand_alone(world: World, untrained: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    model = erased(wordy(monkeypatch))
    attack = P4D(prompts=2, length=3, steps=3, steps_per_look=2, noises=2)
    found, again = (attack.run(scenario(world, untrained, model)) for _ in range(2))
    assert found.label == "white-box" and len(model.edits) == 1 and found.spent.steps == 3
    assert found.prompts == again.prompts and all(len(prompt.split()) == 3 and "pistol" not in prompt for prompt in found.prompts)
    with pytest.raises(UserError, match="noises is 0"):
        P4D(noises=0)
