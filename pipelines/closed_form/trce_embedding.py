"""TRCE, first stage: what the end-of-text row of a harmful prompt says becomes what that of a harmless one says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from pipelines.closed_form.edit import as_edit
from pipelines.closed_form.rows import KeepChoice, Nothing, Placed, TaskRows, encode_task
from pipelines.closed_form.uce import UCE
from toolkit.concepts import EraseTask, Task
from toolkit.errors import UserError
from toolkit.method import Method, Score, option
from toolkit.solve import Change, closed_form

if TYPE_CHECKING:
    from toolkit.edits.low_rank import LowRank
    from toolkit.model import Model


@dataclass(frozen=True)
class TRCEEmbedding(Method):
    """TRCE: Towards Reliable Malicious Concept Erasure in Text-to-Image Diffusion Models, Chen et al., arXiv 2503.07389.

    The first of its two stages, the closed form on the cross-attention. The second trains what this one leaves over.

    Equation
        min_W  1/N sum_p sum_i w_i ||W c_pi - W0 g_pi||^2 + s/M sum_q sum_j ||W k_qj - W0 k_qj||^2 + lamb ||W - W0||_F^2
        over N pairs p of a prompt with the concept and the same prompt with its anchor, and M prompts q to keep (the empty one
        among them), for every layer W that reads the text. The rows i of a pair and their weights w_i:
            BOS -> BOS                                    sot_weight
            EOT -> EOT                                    eot_weight
            the last padding row -> the last padding row  padding_weight times the number of padding rows
            each token of the concept -> the last row     keyword_weight
        It is solved by W = W0 (I + D) with one D for all layers, as in UCE.

    Shapes
        c, g: [n, d], k: [m, d] text encoder outputs, d its width. W, W0: [o, d]. D: [d, d] of rank at most n.

    Defaults
        The weights (0, 1, 0, 0) are the official ones: EOT alone, which in a causal text encoder has read the whole prompt and,
        the paper finds, decides what is drawn. preserve_scale 0.01 is the official one for sexual content; it takes 0.02 for
        other unsafe content. lamb 0.5 is UCE's. A concept without an anchor goes to its template without it (nothing
        "template"), because the paper's pairs differ in the concept only. Templates are the task's; the official code takes 15
        of its own, and 20 phrases for a concept, which here are synonyms.

    Deviations
        The official lamb is 0: what makes its system regular is a sum over 30,000 COCO captions, computed for one checkpoint.
        Here what is kept are the preserved prompts, which leave directions free, and lamb takes their place: at s = 0.01 the
        captions weigh about s 77 |k|^2 / d = 0.8 in each direction, as |k|^2 is near d behind a layer norm. With lamb 0 and too
        few preserved prompts the error says so. preserve_scale counts once; the official code multiplies by it twice and so
        by 1e-4. EOT is found by the tokens; the official code counts words, which is wrong as soon as one word has several
        tokens. Every token of the concept has the keyword's weight; there only the first. A pooled encoding is its own EOT.
        SD3 and Flux are not declared: T5 is not causal, its end-of-text row is one among many that have read the prompt, and no
        summary of it. What EOT alone moves there leaves the concept in all others, and with every row moved the method is uce.
        Solved in float64.
    """

    nothing: Nothing = option("template", "where a concept without an anchor goes: empty_prompt, or the template without it")
    sot_weight: float = option(0.0, "weight of BOS, which stays")
    eot_weight: float = option(1.0, "weight of EOT, which goes to the anchor prompt's")
    padding_weight: float = option(0.0, "weight of each padding row; the last one, which stands for all, goes to the anchor prompt's")
    keyword_weight: float = option(0.0, "weight of each token of the concept, which goes to the anchor prompt's last row")
    preserve_scale: float = option(0.01, "weight of each kept prompt")
    preserve_rows: KeepChoice = option("all", "rows of preserved prompts that are kept: all, to_eot (without padding) or last_subject")
    lamb: float = option(0.5, "weight of staying close to the given weights; 0 needs many preserved prompts")

    kind: ClassVar = "erase"
    architectures: ClassVar = ("sd", "sdxl")
    paper: ClassVar = "arXiv:2503.07389"
    training_free: ClassVar = True

    def fit(self, model: Model, task: Task, *, score: Score | None = None) -> LowRank:
        """Solve once. There is nothing to choose among, so `score` is not called."""
        texts = encode_task(model.arch, task, self.nothing)
        return as_edit(model, self, {stream: self.change_of(text) for stream, text in texts.items()})

    def change_of(self, text: TaskRows) -> Change:
        """D for the layers of one stream."""
        weights = (self.sot_weight, self.eot_weight, self.padding_weight, self.keyword_weight)
        if min(weights) < 0 or max(weights[1:]) == 0:
            given = ", ".join(f"{weight:g}" for weight in weights)
            raise UserError(f"the row weights are {given}, need none below 0 and one that moves something; raise eot_weight")
        source, target = map(torch.cat, zip(*(self.rows_of(*pair) for pair in text.pairs), strict=True))
        return closed_form(
            source,
            target,
            text.keep(self.preserve_rows),
            erase_scale=1 / len(text.pairs),
            preserve_scale=self.preserve_scale / (len(text.kept) + len(text.blank)),
            lamb=self.lamb,
        )

    def rows_of(self, concept: Placed, anchor: Placed) -> tuple[Tensor, Tensor]:
        """One pair's rows to move and where they go, both [n, d], each times the root of its weight."""
        last, tokens = len(concept.hidden) - 1, range(concept.start, concept.end)
        padding = len(concept.hidden) - concept.length
        moves = [(row, row, self.sot_weight) for row in range(concept.leading)]
        moves += [(concept.length - 1, anchor.length - 1, self.eot_weight), (last, last, self.padding_weight * padding)]
        moves += [(row, last, self.keyword_weight) for row in tokens if concept.ids is not None]
        moves = [move for move in moves if move[2]]
        root = concept.hidden.new_tensor([weight for _, _, weight in moves], dtype=torch.float64).sqrt()[:, None]
        return root * concept.hidden[[row for row, _, _ in moves]], root * anchor.hidden[[row for _, row, _ in moves]]

    def needs(self) -> Literal["text"]:
        return "text"

    @classmethod
    def example_task(cls, model: Model) -> EraseTask:
        """The same as UCE's."""
        return UCE.example_task(model)
