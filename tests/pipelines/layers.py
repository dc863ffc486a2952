"""What cross-attention is given, and what it gives."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from toolkit.model import Model


@contextmanager
def layers_seen(model: Model) -> Iterator[dict[str, tuple[Tensor, Tensor, Tensor]]]:
    """Of each cross-attention: what it was given of image and text, and what it gave."""
    seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    handles = []
    for site, attention in model.arch.cross_attention_sites().items():

        def note(module: Any, given: Any, named: dict[str, Any], output: Tensor, site: str = site) -> None:
            seen[site] = given[0], named["encoder_hidden_states"], output

        handles.append(attention.register_forward_hook(note, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
