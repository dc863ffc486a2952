"""Closed-form preimage: the embedding that the edited layers answer as the original ones answered the concept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from eval.attacks.base import Attack, AttackResult, Scenario
from toolkit.errors import UserError
from toolkit.options import option
from toolkit.sample import Hook, State
from toolkit.solve import preimage

if TYPE_CHECKING:
    from toolkit.model import Model


@dataclass(frozen=True)
class ClosedFormPreimage(Attack):
    """Reliable and Efficient Concept Erasure of Text-to-Image Diffusion Models, Gong et al., arXiv 2407.12383.

    RECE's own derivation, used as the attacker would: for every token row c of a concept prompt, as the unedited text
    encoder gives it,

        c' = argmin sum_l ||W_l c' - W0_l c||^2 + reg ||c'||^2

    over the layers l that read text, W0 unedited and W edited. The rows c' replace the prompt's while sampling; BOS,
    which every prompt has, stays. The attacker needs the weights before and after.
    """

    reg: float = option(1e-3, "ridge on the embeddings; smaller finds embeddings further away")

    label: ClassVar = "white-box"
    paper: ClassVar = "arXiv:2407.12383"

    def run(self, scenario: Scenario) -> AttackResult:
        before, clean = scenario.by_name()
        hook = ReplaceText(scenario.base, self.inverse(scenario.model, scenario.base))
        shown = scenario.painter.draw(scenario.model, [item.prompt for item in before], "attack", hooks=[hook])
        return self.result(scenario, shown, clean)

    def inverse(self, model: Model, base: Model) -> Tensor:
        """P [d, d] with c' = c P for rows c. A model whose text-reading layers are as before is a UserError."""
        edited, original = ([linear.weight for linear in m.arch.text_linears().values()] for m in (model, base))
        if all(torch.equal(w, w0.to(w)) for w, w0 in zip(edited, original, strict=True)):
            raise UserError("the edits do not change the layers that read text, so there is nothing to invert; use another attack")
        device = "cpu" if edited[0].device.type == "mps" else edited[0].device  # Metal has no float64
        unit = torch.eye(edited[0].shape[1], dtype=torch.float64, device=device)
        return preimage((w.to(device) for w in edited), (w.to(device) for w in original), unit, self.reg)


class ReplaceText(Hook):
    """Samples with the base model's own encoding of the prompts, its rows after BOS multiplied by `inverse` [d, d]."""

    def __init__(self, base: Model, inverse: Tensor) -> None:
        self.base, self.inverse = base, inverse

    def on_prompt(self, state: State) -> None:
        text = self.base.arch.encode(list(state.prompts))
        hidden = text.hidden.to(self.inverse)
        rows = torch.cat([hidden[:, :1], hidden[:, 1:] @ self.inverse], 1)
        current = state.texts["prompt"].hidden
        state.texts["prompt"] = replace(text, hidden=rows.to(current))
