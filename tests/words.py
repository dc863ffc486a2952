"""Small random models that know words, those of the embedded model's tokenizer, and what their text encoders say of words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from toolkit.arch.sd import SD
from toolkit.arch.sdxl import SDXL
from toolkit.arch.text import Text
from toolkit.edits.delta import Delta
from toolkit.model import EMBEDDED, Model


def wordy(monkeypatch: pytest.MonkeyPatch, family: type[SD | SDXL] = SD, prediction: Any = "epsilon") -> Model:
    """A tiny model with the embedded model's tokenizer, in place of one that knows hardly any words."""
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer")
    for module in ("sd", "sdxl"):
        monkeypatch.setattr(f"toolkit.arch.{module}.tiny_tokenizer", lambda: tokenizer)
    return Model(family.tiny(prediction_type=prediction))


def erased(model: Model) -> Model:
    """The model with a random edit of the layers that read text attached."""
    torch.manual_seed(1)
    linears = model.arch.text_linears()
    deltas: dict[str, Any] = {f"{site}.weight": 0.1 * torch.randn_like(layer.weight) for site, layer in linears.items()}
    model.attach(Delta.from_deltas(deltas))
    return model


def word_gradients(model: Model, typed: Sequence[str], words: int, loss: Callable[[Text], Tensor]) -> dict[str, Tensor]:
    """Component -> the gradient [n, words, d] of a loss of typed prompts with respect to the embeddings of their first words."""
    seen: dict[str, Tensor] = {}
    handles = []
    for part, embedding in model.arch.token_embeddings().items():

        def hook(module: Any, inputs: Any, output: Tensor, part: str = part) -> Tensor:
            seen[part] = output.detach().requires_grad_()
            return seen[part]

        handles.append(embedding.register_forward_hook(hook))
    try:
        value = loss(model.arch.encode(typed, grad=True))
    finally:
        for handle in handles:
            handle.remove()
    gradients = torch.autograd.grad(value, list(seen.values()))
    return {part: gradient[:, 1 : words + 1] for part, gradient in zip(seen, gradients, strict=True)}  # after BOS
