"""What a closed-form edit should keep of everything else: the second moment of the token rows of many captions.

M = sum x x^T over the captions' rows x stands in the solver for keeping every one of these rows as it is. It depends on the
text encoders and the captions alone, so it is computed once, in batches, and kept in the user's cache (`cache_folder`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from pipelines.closed_form.rows import BATCH, encode, exact_device
from toolkit.arch.text import Segment
from toolkit.cache import cached
from toolkit.captions import load_captions
from toolkit.concepts import Concept
from toolkit.errors import UserError
from toolkit.fingerprint import text_fingerprint
from toolkit.runs import progress
from toolkit.solve import second_moment

if TYPE_CHECKING:
    from toolkit.arch.base import Architecture

PriorRows = Literal["all", "words"]

PRIOR_HELP = "captions that are kept as they are: a .txt, .csv or .jsonl file, built-in for our own 100, empty for none"
ROWS_HELP = "rows of the captions: all, or words (from the first word to EOT, without BOS and padding)"
SCALE_HELP = "weight of each row of the captions"
ROWS, SCALE = "all", 0.1  # the defaults of every method: a caption's row counts as much as one of a preserved prompt in UCE

BUILT_IN = Path(__file__).with_name("captions.txt")
FORMAT = 1  # of the cached files; to be raised when what is summed changes


@dataclass(frozen=True)
class Prior:
    """moments: stream -> the weighted M [d, d] in float64, {} for none. notes: what was read, for `EditInfo.notes`."""

    moments: Mapping[str, Tensor]
    notes: Mapping[str, Any]


def caption_prior(arch: Architecture, source: str, rows: PriorRows, scale: float, erased: Sequence[Concept] = ()) -> Prior:
    """M of the captions of a file, times `scale`, for every stream of text that the model reads.

    source, rows, scale: as the options that `PRIOR_HELP`, `ROWS_HELP` and `SCALE_HELP` describe. erased: captions that name one
    of these concepts are left out, since an edit cannot both move and keep what they say.
    """
    if not source:
        if (rows, scale) != (ROWS, SCALE):
            raise UserError("prior_rows and prior_scale have no effect without prior; give prior a file of captions, or built-in")
        return Prior({}, {})
    if not 0 < scale < float("inf"):
        raise UserError(f"prior_scale is {scale}, needs a number above 0; give such a weight, or an empty prior")
    found = load_captions(BUILT_IN if source == "built-in" else source)
    moments = _cached_moments(arch, found.texts, rows)
    contrary = _naming(found.texts, erased)
    if len(contrary) == len(found.texts):
        raise UserError(f"every caption of {source} names what is erased; give other captions")
    if contrary:
        moments = {name: moments[name] - part for name, part in caption_moments(arch, contrary, rows).items()}
    notes = {"captions": len(found.texts) - len(contrary), "column": found.column, "left_out": len(contrary)}
    return Prior({name: scale * moment for name, moment in moments.items()}, {"prior": notes})


def caption_moments(arch: Architecture, captions: Sequence[str], rows: PriorRows) -> dict[str, Tensor]:
    """Stream -> sum x x^T [d, d] over the captions' rows, in float64. One batch of captions is held at a time."""
    streams = arch.text_streams()
    moments: dict[str, Tensor] = {}
    with progress("captions") as show:
        for first in range(0, len(captions), BATCH):
            text = encode(arch, captions[first : first + BATCH])
            for name, stream in streams.items():
                for segment in stream.segments(text):
                    moment = second_moment(segment.rows.flatten(0, 1) if rows == "all" else _words(segment))
                    moments[name] = moments[name] + moment if name in moments else moment
            show(min(first + BATCH, len(captions)), len(captions))
    return moments


def _words(segment: Segment) -> Tensor:
    """The rows [n, d] from the first word up to EOT."""
    position = torch.arange(segment.rows.shape[1], device=segment.rows.device)
    return segment.rows[(position >= segment.leading) & (position < segment.length[:, None])]


def _naming(captions: Sequence[str], concepts: Sequence[Concept]) -> list[str]:
    """The captions in which a word of a concept stands, also in the plural."""
    words = "|".join(re.escape(word) for concept in concepts for word in concept.words)
    return [caption for caption in captions if words and re.search(rf"(?<!\w)({words})(e?s)?(?!\w)", caption, re.IGNORECASE)]


def _cached_moments(arch: Architecture, captions: Sequence[str], rows: PriorRows) -> dict[str, Tensor]:
    """`caption_moments`, from the cache when the same captions were summed for the same text encoders before."""
    key = [FORMAT, text_fingerprint(arch), rows, *captions]
    moments = cached("prior", key, lambda: caption_moments(arch, captions, rows))
    return {name: moment.to(exact_device(arch)) for name, moment in moments.items()}
