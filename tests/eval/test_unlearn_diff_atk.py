"""UnlearnDiffAtk: its step against one computed from typed prompts, and the run as a whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.attacks import unlearn_diff_atk
from eval.attacks.unlearn_diff_atk import UnlearnDiffAtk
from tests.eval.test_words import scenario
from tests.words import erased, word_gradients, wordy
from toolkit.arch.sd import SD
from toolkit.arch.sdxl import SDXL
from toolkit.arch.text import Text
from toolkit.errors import UserError
from toolkit.vocabulary import Slots, Vocabulary, onto_simplex
from toolkit.world.oracle import Oracle
from toolkit.world.scenes import World


@pytest.mark.parametrize(("family", "prediction"), [(SD, "epsilon"), (SD, "v_prediction"), (SDXL, "epsilon")])
def test_a_step_is_the_papers(world: World, untrained: Oracle, monkeypatch: pytest.MonkeyPatch, family: Any, prediction: str) -> None:
    model = erased(wordy(monkeypatch, family, prediction))
    arch, attacked = model.arch, scenario(world, untrained, model)
    projected: list[Tensor] = []
    rows: list[dict[str, Tensor]] = []
    noised: list[tuple[Tensor, Tensor]] = []
    encode, predict = Slots.encode, arch.predict
    monkeypatch.setattr(unlearn_diff_atk, "onto_simplex", lambda w: projected.append(w.clone()) or onto_simplex(w))
    monkeypatch.setattr(Slots, "encode", lambda self, prompts, given: rows.append(given) or encode(self, prompts, given))
    monkeypatch.setattr(arch, "predict", lambda x, t, text: noised.append((x, t)) or predict(x, t, text))
    attack = UnlearnDiffAtk(prompts=2, length=3, timesteps=2, steps_per_timestep=1)
    vocabulary = Vocabulary.of(model, attacked.words("pistol"))
    given = attack.attacked(attacked, "pistol")
    x0 = given.latents
    assert x0 is not None
    (choices, steps), *_ = attack.candidates(attacked, given, vocabulary)
    monkeypatch.undo()

    (x, t), typed = noised[0], vocabulary.texts(vocabulary.nearest({part: row.detach() for part, row in rows[0].items()}))
    assert t.tolist() == [250, 250] and steps == 1
    alpha, sigma = (part.double() for part in arch.signal_and_noise(t))
    noise = (x.double() - alpha * x0.double()) / sigma
    assert abs(float(noise.std()) - 1) < 0.15
    goal = noise if prediction == "epsilon" else alpha * noise - sigma * x0

    def loss(text: Text) -> Tensor:
        return (arch.predict(x, t, text).double() - goal).square().mean((1, 2, 3)).sum()

    prompts = [f"{words} {prompt}" for words, prompt in zip(typed, given.prompts, strict=True)]
    at_words = word_gradients(model, prompts, 3, loss)
    uniform = torch.full((2, 3, len(vocabulary)), 1 / len(vocabulary))
    gradient = sum(at_words[part] @ table.T for part, table in vocabulary.rows.items()) + torch.zeros_like(uniform)
    decayed = F.hardtanh(gradient) + attack.weight_decay * uniform
    expected = uniform - attack.learning_rate * decayed / (decayed.abs() + 1e-8)
    clear = decayed.abs() > 1e-5  # where rounding does not decide the sign
    assert clear.float().mean() > 0.5
    torch.testing.assert_close(projected[0][clear], expected[clear], rtol=0, atol=2e-4)
    assert torch.equal(choices, onto_simplex(projected[0]).argmax(-1))


def test_it_runs_and_leaves_the_models_alone(world: World, untrained: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    model = erased(wordy(monkeypatch))
    before = {name: value.clone() for name, value in model.arch.components()["text_encoder"].state_dict().items()}
    attack = UnlearnDiffAtk(prompts=2, timesteps=2, steps_per_timestep=2)
    found, again = (attack.run(scenario(world, untrained, model)) for _ in range(2))
    assert found.label == "white-box" and len(model.edits) == 1
    assert found.prompts == again.prompts and all("pistol" in prompt for prompt in found.prompts)
    after = model.arch.components()["text_encoder"].state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    with pytest.raises(UserError, match="learning_rate is 0"):
        UnlearnDiffAtk(learning_rate=0)
