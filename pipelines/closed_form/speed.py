"""SPEED: erase in the null space of what is to stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import normalize

from pipelines.closed_form.edit import as_edit
from pipelines.closed_form.rows import KeepChoice, Nothing, RowChoice, TaskRows, encode_task
from pipelines.closed_form.uce import UCE
from toolkit.concepts import EraseTask, Task
from toolkit.errors import UserError
from toolkit.method import Method, Score, option
from toolkit.solve import Change, closed_form, joint_weight, second_moment

if TYPE_CHECKING:
    from toolkit.edits.low_rank import LowRank
    from toolkit.model import Model

_ROUNDING = 1e-6  # part of what a text encoder computes in float32 that may be its rounding
_ROUNDS = 50  # of k-means, for some hundred rows at most


@dataclass(frozen=True)
class SPEED(Method):
    """SPEED: Scalable, Precise, and Efficient Concept Erasure for Diffusion Models, Li et al., arXiv 2503.07392.

    Equation
        min_D  1/N sum_i ||W (I + D P) c_i - W g_i||^2 + r ||W D P||_F^2   subject to   D P k = 0 for every invariant k,
        with c_i -> g_i the moved rows of N prompts and P the projection onto the directions in which the retained rows x_j
        have a second moment, R = 1/m sum_j x_j x_j^T, below threshold tr(R) / d. What is retained changes by less than
            1/m sum_j ||W D P x_j||^2 <= threshold tr(R) / d ||W D P||_F^2.
        The constraint only makes the null space smaller. With P' the projection on what is left,
            D P = [1/N sum_i (g_i - c_i) c_i^T] P' (r I + 1/N sum_i P' c_i c_i^T P')^{-1},
        which is UCE's solution for rows P' c_i. It equals the paper's
            (G - S) P [I - M K (K^T P M K)^{-1} K^T P] M,   M = (S P + r I)^{-1},
        S and G the means of c c^T and g c^T, K the invariants as columns, and needs no inverse.
        Which rows x_j are retained: influence-based prior filtering leaves, of the rows of the preserved prompts (without any,
        of the empty prompt), those with ||W E x|| above its mean, W E being the change of W that erases without retaining
        anything (r = 1). Directed prior augmentation adds to these, `augmentations` times, x + v v^T e with e standard normal
        and v the direction of W's smallest singular value, where ||W E x|| is above its mean over what could be added.
        Invariants are BOS, and the centres of `invariants` clusters of the empty prompt's other rows.

    Shapes
        c, g: [n, d], x: [m, d] text encoder outputs, k: [d], d its width. W: [o, d]. D, P: [d, d]; D P has rank at most n.

    Defaults
        The official ones are layers "values", 10 augmentations, 3 invariants and retain_scale 1 (0.05 for ten and more
        celebrities, 0.7 for nudity). Its rows and preserve_rows are last_subject for all but nudity, which moves all rows and
        retains the empty prompt's. Ours are "all", as for UCE: in a causal text encoder every later token carries the concept,
        and what is drawn of a retained word comes from its later tokens too. The official threshold is 0.1 with one row to a
        prompt, and 0.0001 for celebrities. Ours is 0.005: among 77 rows to a prompt a single one weighs that much less. On the
        embedded model 0.001 leaves too little of a concept in the null space to erase it.

    Deviations
        The threshold is a part of the mean singular value tr(R) / d. That is about 1 for the encoders that end in a layer norm,
        so that the official numbers keep their meaning, and what is null does not depend on a model's scale. The constraint is
        exact; the official nudity setting softens it (lamb 0.5), as K^T P M K is singular when the invariants are retained rows
        as well, while here such invariants need nothing. Several words and templates of a concept are more prompts of the mean.
        The singular vector of the augmentation is the smallest within W's row space; noise outside it W does not see. The
        filter's mean for augmented rows is over all of them; the official code's is over batches of 128 rows. Without augmentation
        the filter stays, which there goes with it. k-means starts from the rows furthest apart instead of random ones. With
        `per_layer` off the rows are refined for all layers together, by the sum of their changes: one solve instead of one for
        each layer, and a smaller edit. On SD3 and Flux the layers are those of UCE, one for each stream of text: keys and values
        are made of what they give, so that `layers` is the same either way. N counts a prompt once however many encoders
        read it. T5 has no BOS, and of the pooled encoding it is the empty prompt's one row that stays. Solved in float64.
    """

    rows: RowChoice = option("all", "token rows that are moved: last_subject, tail_aligned, matched or all")
    nothing: Nothing = option("empty_prompt", "where a concept without an anchor goes: empty_prompt, or the template without it")
    layers: Literal["values", "keys_and_values"] = option("values", "layers that are changed: values, or keys_and_values")
    preserve_rows: KeepChoice = option("all", "retained rows of preserved prompts: all, to_eot (without padding) or last_subject")
    threshold: float = option(5e-3, "part of their mean below which singular values of the retained rows are null")
    retain_scale: float = option(1.0, "weight of staying close to the given weights within the null space")
    prior_filter: bool = option(True, "retain only the rows that erasing would change more than their mean")
    augmentations: int = option(10, "times that retained rows are added with noise that the layer hardly reads")
    invariants: int = option(3, "clusters of the empty prompt's rows whose centres stay exactly as they are, beside BOS")
    per_layer: bool = option(True, "filter and augment for each layer by itself, as the paper does, or for all together")
    seed: int = option(0, "of the noise")

    kind: ClassVar = "erase"
    architectures: ClassVar = ("sd", "sdxl", "sd3", "flux")
    paper: ClassVar = "arXiv:2503.07392"
    training_free: ClassVar = True

    def fit(self, model: Model, task: Task, *, score: Score | None = None) -> LowRank:
        """Solve once for each layer. There is nothing to choose among, so `score` is not called."""
        for name, count in (("augmentations", self.augmentations), ("invariants", self.invariants)):
            if count < 0:
                raise UserError(f"{name} is {count}, needs at least 0; give 0 for none")
        texts, values = encode_task(model.arch, task, self.nothing), model.arch.value_linears()
        make, changes = Generator().manual_seed(self.seed), {}
        for name, stream in model.arch.text_streams().items():
            linears = {site: linear for site, linear in stream.linears.items() if self.layers != "values" or site in values}
            if linears:
                changes |= self.changes_of(texts[name], linears, make)
        return as_edit(model, self, changes)

    def changes_of(self, text: TaskRows, linears: Mapping[str, nn.Linear], make: Generator) -> dict[str, Change]:
        """Site -> D, for layers of one stream."""
        source, target = (rows.double() for rows in text.moved(self.rows))
        blank = torch.cat([prompt.hidden[prompt.leading :] for prompt in text.blank]).double()
        retained = text.preserved(self.preserve_rows).double() if text.kept else blank
        bos = [prompt.hidden[: prompt.leading].double() for prompt in text.blank]
        invariant = torch.cat([*bos, centres(blank, self.invariants)])
        weight = len(text.blank) / len(text.pairs)  # a prompt has a pair, and the empty one a part, for each encoder
        erase = closed_form(source, target, source[:0], erase_scale=weight, lamb=1.0)
        alike = not (self.per_layer and (self.prior_filter or self.augmentations))
        changes = {}
        for sites in [list(linears)] if alike else [[site] for site in linears]:
            moment = self.refined(retained, [linears[site].weight.to(source.device) for site in sites], erase, make)
            null = self.project(source, moment, invariant)
            goal = null + target - source
            change = closed_form(null, goal, null[:0], erase_scale=weight, lamb=self.retain_scale, option="retain_scale")
            changes |= dict.fromkeys(sites, change)
        return changes

    def refined(self, retained: Tensor, weights: Sequence[Tensor], erase: Change, make: Generator) -> Tensor:
        """R [d, d] of the retained rows [m, d] that are left and added for these layers together."""
        joint = joint_weight(weights)
        influence = joint @ erase.u @ erase.v  # |influence x|: what erasing changes for a row x, in all these layers
        if self.prior_filter:
            retained = retained[above_mean((retained @ influence.T).norm(dim=1))]
        if not self.augmentations:
            return second_moment(retained) / len(retained)
        v = normalize(joint[max(len(joint) - sum(map(len, weights)), 0)], dim=0)
        v = v * v.sum().sign()  # the sign of a singular vector is the library's choice
        noise = torch.randn(self.augmentations, len(retained), generator=make, dtype=torch.float64).to(v.device)
        # Rows x + v n all lie on lines along one v, so that neither |influence (x + v n)| nor their moment needs them written out.
        along = influence @ v
        square = (retained @ influence.T).square().sum(1) + 2 * noise * (retained @ (influence.T @ along)) + noise**2 * (along @ along)
        chosen = above_mean(square.clamp(min=0).sqrt())
        noise, times = noise * chosen, 1 + chosen.sum(0)
        cross = torch.outer(noise.sum(0) @ retained, v)
        total = second_moment(times.sqrt()[:, None] * retained) + cross + cross.T + noise.square().sum() * torch.outer(v, v)
        return total / times.sum()

    def project(self, rows: Tensor, moment: Tensor, invariant: Tensor) -> Tensor:
        """P' of rows [n, d]: their part in the null space of R [d, d], without the invariants [b, d]."""
        values, vectors = torch.linalg.eigh(moment)
        parts = values / values.mean()
        null = vectors[:, parts < self.threshold]
        _, sizes, taken = torch.linalg.svd(invariant @ null, full_matrices=False)
        taken = taken[sizes > _ROUNDING * invariant.norm()]
        inside = rows @ null
        inside = inside - inside @ taken.T @ taken
        if inside.norm() <= _ROUNDING * rows.norm():
            smallest = f"the smallest singular value of the retained rows is {parts[0]:.2g} of their mean, the threshold {self.threshold:g}"
            left = f"leaves {null.shape[1]} null directions, {len(taken)} for invariants, and nothing of the concept in them"
            raise UserError(f"{smallest}, which {left}; raise threshold or preserve fewer prompts")
        return inside @ null.T

    def needs(self) -> Literal["text"]:
        return "text"

    @classmethod
    def example_task(cls, model: Model) -> EraseTask:
        """UCE's in one template: more retained rows would fill the narrow text encoder of a tiny model."""
        return replace(UCE.example_task(model), templates=("{}",))


def above_mean(shift: Tensor) -> Tensor:
    """Which are above the mean; all, where they are equal."""
    return shift >= shift.mean().clamp(max=shift.max())  # a mean of equal numbers may be rounded up


def centres(rows: Tensor, count: int) -> Tensor:
    """k-means: at most `count` centres [b, d] of clusters of rows [n, d]. It starts from rows that are far from one another."""
    found = rows[:0]
    for _ in range(count):
        far = torch.cdist(rows, found).amin(1) if len(found) else rows.norm(dim=1)
        found = torch.cat([found, rows[far.argmax()][None]])
    for _ in range(_ROUNDS if count else 0):
        nearest = torch.cdist(rows, found).argmin(1)
        found = torch.stack([rows[nearest == cluster].mean(0) for cluster in nearest.unique()])
    return found
