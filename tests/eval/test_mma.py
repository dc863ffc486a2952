"""MMA-Diffusion on text: its gradient is of the words and of nothing beside them, and the search comes closer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from eval.attacks import mma
from eval.attacks.mma import MMA, distance, pooled
from tests.eval.test_words import scenario
from tests.words import erased, word_gradients, wordy
from toolkit.arch.sd import SD
from toolkit.arch.sdxl import SDXL
from toolkit.arch.text import Text
from toolkit.errors import UserError
from toolkit.vocabulary import Vocabulary, swaps
from toolkit.world.oracle import Oracle
from toolkit.world.scenes import World


def by_hand(one: Text, other: Text) -> Tensor:
    """1 - the mean cosine of the pooled encodings, in float64."""
    pairs = [(one.hidden[0, one.length[0] - 1], other.hidden[0, other.length[0] - 1])]
    if one.pooled is not None and other.pooled is not None:
        pairs.append((one.pooled[0], other.pooled[0]))
    cosines = [(a.double() @ b.double()) / (a.double().norm() * b.double().norm()) for a, b in pairs]
    return 1 - torch.stack(cosines).mean()


@pytest.mark.parametrize("family", [SD, SDXL])
def test_the_gradient_is_that_of_the_words(world: World, untrained: Oracle, monkeypatch: pytest.MonkeyPatch, family: Any) -> None:
    model = erased(wordy(monkeypatch, family))
    attacked = scenario(world, untrained, model)
    seen: list[tuple[Tensor, Tensor]] = []
    monkeypatch.setattr(mma, "swaps", lambda gradient, choice, *rest: seen.append((gradient, choice)) or swaps(gradient, choice, *rest))
    attack = MMA(prompts=1, length=4, steps=2, candidates_per_step=4)
    vocabulary = Vocabulary.of(model, attacked.words("pistol"))
    given = attack.attacked(attacked, "pistol")
    list(attack.candidates(attacked, given, vocabulary))
    base = attacked.base
    target = base.arch.encode(given.prompts)
    for gradient, choice in seen:
        at_words = word_gradients(base, vocabulary.texts(choice[None]), 4, lambda text: by_hand(text, target))
        expected = sum(at_words[part][0] @ table.T for part, table in vocabulary.rows.items())
        assert isinstance(expected, Tensor) and gradient.shape == (4, len(vocabulary))
        torch.testing.assert_close(gradient, expected.float(), rtol=1e-3, atol=1e-6)


def test_the_best_of_all_steps_is_kept(world: World, untrained: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    model = erased(wordy(monkeypatch))
    attacked = scenario(world, untrained, model)
    tried: list[Tensor] = []
    losses = MMA.losses

    def noting(self: MMA, *given: Any) -> Tensor:
        tried.append(losses(self, *given))
        return tried[-1]

    monkeypatch.setattr(MMA, "losses", noting)
    attack = MMA(prompts=2, length=4, steps=6, candidates_per_step=6, topk=8)
    found, again = attack.run(attacked), attack.run(attacked)
    assert found.label == "text-only" and (found.spent.steps, found.spent.images) == (12, 0)
    assert found.prompts == again.prompts and all(len(prompt.split()) == 4 for prompt in found.prompts)
    arch = attacked.base.arch
    for i, prompt in enumerate(found.prompts):
        target = arch.encode([attacked.asked("pistol", n=2)[i].text])
        lowest = min(float(part.min()) for part in tried[6 * i : 6 * (i + 1)])
        assert float(by_hand(arch.encode([prompt]), target)) == pytest.approx(lowest, abs=1e-5)
        assert float(distance(pooled(arch.encode([prompt])), pooled(target))) == pytest.approx(lowest, abs=1e-5)
    assert not attacked.base.edits
    with pytest.raises(UserError, match="topk is 0"):
        MMA(topk=0)
