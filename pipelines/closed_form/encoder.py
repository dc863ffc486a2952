"""What projections in the text encoders read of a task's prompts: captured while they encode, and solved layer by layer.

A layer's rows depend on the layers before it, so there is no one change of the rows for all, as there is behind the encoders. All
layers are captured in one go, in the model as it is given. Rows are moved and kept as in rows.py; a pooled projection reads one
row of each prompt, which moves as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipelines.closed_form.rows import KeepChoice, RowChoice, TaskPrompts, around, encode, exact_device, fill
from toolkit.arch.text import Segment
from toolkit.solve import Change, Sums, check_weights

if TYPE_CHECKING:
    from toolkit.arch.base import Architecture

_JOBS = 16  # pairs of prompts, or preserved prompts, whose rows are held at a time


def encoder_changes(
    arch: Architecture,
    prompts: TaskPrompts,
    rows: RowChoice,
    preserve_rows: KeepChoice,
    *,
    erase_scale: float,
    preserve_scale: float,
    lamb: float,
) -> dict[str, Change]:
    """Reader (see `Architecture.encoder_readers`) -> the D of `closed_form` for what it reads of the prompts.

    Memory: the rows of some prompts in all readers, and two d x d matrices in float64 for each reader.
    """
    check_weights(erase_scale, preserve_scale, lamb)
    readers, device = arch.encoder_readers(), exact_device(arch)
    sums = {name: Sums(next(iter(linears.values())).in_features, device) for name, linears in readers.items()}
    for number, part in enumerate(_parts(prompts)):
        with _reading(readers) as read:
            encode(arch, list(part.index))
        for name, batches in read.items():
            captured, length = torch.cat(batches), part.text.length
            pooled = captured.ndim == 2
            segment = Segment(captured[:, None], None, length, leading=0) if pooled else Segment(captured, part.text.ids, length)
            text = part.rows([segment])
            if part.pairs:
                sums[name].move(*text.moved(rows), erase_scale)
            sums[name].keep(text.preserved(preserve_rows) if number else text.keep(preserve_rows), preserve_scale)
    return {name: sums.pop(name).change(lamb) for name in readers}


def _parts(prompts: TaskPrompts) -> Iterator[TaskPrompts]:
    """The same pairs and preserved prompts, a few at a time, each with what must be encoded for them."""
    for first in range(0, max(len(prompts.pairs), len(prompts.kept)), _JOBS):
        pairs, kept = prompts.pairs[first : first + _JOBS], prompts.kept[first : first + _JOBS]
        jobs = [*kept, *(pair[:2] for pair in pairs), *(pair[2:] for pair in pairs)]
        needed = dict.fromkeys(["", *(text for job in jobs for text in (fill(*job), *around(job[0])))])
        chosen = torch.tensor([prompts.index[text] for text in needed])
        yield replace(prompts, pairs=pairs, kept=kept, index={text: i for i, text in enumerate(needed)}, text=prompts.text[chosen])


@contextmanager
def _reading(readers: Mapping[str, Mapping[str, nn.Linear]]) -> Iterator[dict[str, list[Tensor]]]:
    """Reader -> what it reads within the block, batch by batch."""
    read: dict[str, list[Tensor]] = {name: [] for name in readers}
    with ExitStack() as registered:
        for name, linears in readers.items():

            def before(module: nn.Module, given: tuple[Any, ...], name: str = name) -> None:
                read[name].append(given[0].detach())

            handle = next(iter(linears.values())).register_forward_pre_hook(before)
            registered.callback(handle.remove)
        yield read
