"""From the solver's answer to an edit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from toolkit.edits.low_rank import LowRank
from toolkit.errors import UserError

if TYPE_CHECKING:
    from toolkit.method import Method
    from toolkit.model import Model
    from toolkit.solve import Change

_ROWS = 256  # rows of a weight in float64 at a time


def as_edit(model: Model, method: Method, changes: Mapping[str, Change], notes: Mapping[str, Any] | None = None) -> LowRank:
    """W -> W (I + D) for every layer that has a D, W being its current weight: up W U, down V shared by those with the same D.

    changes: stream or reader (see `Architecture.text_readers` and `encoder_readers`) -> D of all its layers, or site -> D of one
    layer; a layer with neither stays. A bias stays: it is added to what the changed weight gives.
    """
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    small = {id(change): change.compressed() for change in changes.values()}
    streams = {name: stream.linears for name, stream in model.arch.text_streams().items()}
    for name, linears in {**streams, **model.arch.text_readers(), **model.arch.encoder_readers()}.items():
        for site, linear in linears.items():
            change = changes.get(site, changes.get(name))
            if change is not None and (d := small[id(change)]).rank:
                factors[site] = _times(linear.weight.to(d.u.device), d.u), d.v
    if not factors:
        raise UserError("the edit changes nothing: every concept encodes like its anchor; name another anchor")
    return LowRank.from_factors(factors, model.info(method, notes=notes))


def _times(weight: Tensor, u: Tensor) -> Tensor:
    """weight @ u to the precision of what is stored: in float32 on a CPU, where its products are three times as fast.

    Elsewhere float32 may mean fewer digits (TF32), so it is float64 there, a few rows at a time to need no copy of them all.
    """
    if weight.device.type == "cpu":
        return weight.detach().float() @ u.float()
    return torch.cat([rows.double() @ u for rows in weight.detach().split(_ROWS)])
