"""MACE's last stage: one low-rank edit that does what several do, each for its own concept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from pipelines.closed_form.mace_refine import TEMPLATES
from pipelines.closed_form.merging import text_parts, to_merge
from pipelines.closed_form.prior import PRIOR_HELP, ROWS, ROWS_HELP, SCALE, SCALE_HELP, PriorRows, caption_prior
from pipelines.closed_form.rows import encode, encode_concept
from toolkit.concepts import Concept, MergeTask, Task
from toolkit.edits.base import Edit, EditInfo
from toolkit.edits.low_rank import LowRank
from toolkit.errors import UserError
from toolkit.method import Method, Score, option
from toolkit.runs import seeded
from toolkit.solve import second_moment, shares

if TYPE_CHECKING:
    from toolkit.model import Model

Part = tuple[LowRank, float, Tensor]


@dataclass(frozen=True)
class MACEFuse(Method):
    """MACE: Mass Concept Erasure in Diffusion Models, Lu et al., arXiv 2403.06135, its fusion of LoRAs.

    Equation
        min_W'  sum_k ||W' C_k - (W + dW_k) C_k||_F^2 + p ||(W' - W) E||_F^2 + tr((W' - W) M (W' - W)^T) + lamb ||W' - W||_F^2
        for every layer that reads the text: W its current weight, dW_k = B_k A_k the k-th edit's change of it, C_k the token
        rows of prompts with that edit's concept, E those of the empty prompt, M = prior_scale sum x x^T over the rows of
        captions. It is solved by W' = W + sum_k dW_k R_k with R_k = C_k C_k^T (lamb I + M + p E E^T + sum_j C_j C_j^T)^{-1}, the
        same for all layers; the factors of W' - W are [B_1 B_2 ...] and the rows of all A_k R_k.

    Shapes
        C_k: [d, n_k], columns; E: [d, L]; M, R_k: [d, d], d the text encoder's width. W, dW_k: [o, d]. A_k: [r_k, d], B_k: [o, r_k].
        The result has rank at most sum_k r_k.

    Defaults
        The 30 templates of mace_refine around each concept's words. lamb 10 is the official code's for objects. preserve_scale 1,
        prior_scale 0.1 and our 100 captions are chosen by us; the paper's prior is the captions of COCO.

    Deviations
        BOS, the same row in every prompt, is not among the C_k. The empty prompt, which guidance reads for every image, is kept
        beside the captions. Captions that name a concept are left out of the prior. One right-hand factorisation in float64
        for all layers, where the official code inverts once for each in float32; and the result stays low-rank, where the
        official code writes a checkpoint. With as many concepts as one likes memory grows by one R_k each, so there is no second
        way for more than 1000 of them.
    """

    preserve_scale: float = option(1.0, "weight of each row of the empty prompt")
    prior: str = option("built-in", PRIOR_HELP)
    prior_rows: PriorRows = option(ROWS, ROWS_HELP)
    prior_scale: float = option(SCALE, SCALE_HELP)
    lamb: float = option(10.0, "weight of staying close to the given weights")

    kind: ClassVar = "merge"
    architectures: ClassVar = ("sd", "sdxl")
    paper: ClassVar = "arXiv:2403.06135"
    training_free: ClassVar = True

    def fit(self, model: Model, task: Task, *, score: Score | None = None) -> LowRank:
        """Solve once. There is nothing to choose among, so `score` is not called."""
        return self.fuse(model, list(to_merge(task)))

    def fuse(self, model: Model, pairs: Sequence[tuple[Edit, Concept]], preserve: Sequence[str] = ()) -> LowRank:
        """The same for edits with what each is about, also for one alone. preserve: prompts that are kept like the empty one."""
        edits = [text_parts(model, edit, LowRank) for edit, _ in pairs]
        if not 0 <= self.preserve_scale < float("inf"):
            raise UserError(f"preserve_scale is {self.preserve_scale}, needs a number of at least 0; give such a weight")
        concepts = [concept for _, concept in pairs]
        prior = caption_prior(model.arch, self.prior, self.prior_rows, self.prior_scale, concepts)
        prompts = []
        for edit, concept in pairs:
            with model.attached(edit):  # which also says whether it fits this model
                prompts.append(encode_concept(model.arch, concept, TEMPLATES[concept.kind]))
        kept = encode(model.arch, ["", *preserve])
        factors: dict[str, tuple[Tensor, Tensor]] = {}
        for name, stream in model.arch.text_streams().items():
            rows = [torch.cat([prompt.hidden[prompt.leading :] for prompt in placed[name]]) for placed in prompts]
            keep = self.preserve_scale * second_moment(torch.cat([segment.rows.flatten(0, 1) for segment in stream.segments(kept)]))
            if name in prior.moments:
                keep += prior.moments[name]
            parts = [
                (part, scale, share)
                for each, share in zip(edits, shares([second_moment(own) for own in rows], keep, self.lamb), strict=True)
                for part, scale in each
            ]
            factors |= _fused(parts, list(stream.linears))
        triggers = tuple(dict.fromkeys(word for edit, _ in pairs for word in edit.info.triggers))
        return LowRank.from_factors(factors, model.info(self, triggers, prior.notes))

    def needs(self) -> Literal["text"]:
        return "text"

    @classmethod
    def example_task(cls, model: Model) -> MergeTask:
        """Two changes of rank 1, as LoRAs are, for two concepts."""
        edits = []
        for name in ("cat", "dog"):
            draw = seeded("mace_fuse", name)
            factors = {
                site: (torch.randn(linear.out_features, 1, generator=draw), 0.1 * torch.randn(1, linear.in_features, generator=draw))
                for site, linear in model.arch.text_linears().items()
            }
            edits.append(LowRank.from_factors(factors, EditInfo("lora", base=model.fingerprint)))
        return MergeTask(tuple(edits), (Concept("cat", ("kitten",)), Concept("dog")))


def _fused(parts: Sequence[Part], sites: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Site -> factors of sum_k dW_k R_k. Sites whose changes share their down factors share the result's."""
    shared: dict[tuple[int | None, ...], Tensor] = {}
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for site in sites:
        ups, downs, key = [], [], []
        for part, scale, share in parts:
            if site in part.up:
                ups.append(scale * part.up[site].to(share))
                downs.append(part.down[site].to(share) @ share)
                key.append(id(part.down[site]))
            elif site in part.dense:
                ups.append(scale * part.dense[site].to(share))
                downs.append(share)
                key.append(id(share))
        if ups:
            factors[site] = torch.cat(ups, 1), shared.setdefault(tuple(key), torch.cat(downs))
    return factors
