"""Custom Diffusion's merge: several learnt subjects in one edit, each drawn as its own edit drew it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from pipelines.closed_form.merging import text_parts, to_merge
from pipelines.closed_form.prior import PRIOR_HELP, ROWS_HELP, PriorRows, caption_prior
from pipelines.closed_form.rows import Placed, Templates, encode, encode_concept
from toolkit.concepts import MergeTask, Task
from toolkit.edits.base import Edit
from toolkit.edits.chain import Chain
from toolkit.edits.delta import Delta
from toolkit.edits.low_rank import LowRank
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError
from toolkit.method import Method, Score, option
from toolkit.runs import seeded
from toolkit.solve import balanced, exact

if TYPE_CHECKING:
    from toolkit.model import Model

TEMPLATES: Templates = {"object": ("{}", "photo of a {}"), "style": ("{}", "painting in the style of {}")}
Changes = Sequence[tuple[LowRank | Delta, float]]
INEXACT = 1e-4  # relative error of the values at the learnt rows above which a warning is due


@dataclass(frozen=True)
class CustomDiffusionMerge(Method):
    """Multi-Concept Customization of Text-to-Image Diffusion, Kumari et al., arXiv 2212.04488, its closed-form merge.

    Equation
        min_W'  ||(W' - W) C_reg^T||_F^2 + lamb ||W' - W||_F^2   so that   W' C^T = V^T exactly,
        for every layer W that reads the text. C_reg are the token rows of captions. C stacks, for each edit k, the rows from its
        new word to EOT in prompts with it; V the values W + dW_k gives them. With A = C_reg^T C_reg + lamb I it is solved by
        W' = W + (V^T - W C^T) (C A^{-1} C^T)^{-1} C A^{-1}; the right-hand factor is the same for all layers.

    Shapes
        C: [m, d], C_reg: [n, d], rows of the text encoder's output, d its width; V: [m, o]. W, dW_k: [o, d]. A: [d, d]. W' - W
        has rank at most m. The result is a chain: the new words of all edits, then one low-rank edit.

    Defaults
        The paper's two prompts around each edit's words, "{}" and "photo of a {}", or "painting in the style of {}". What an edit
        is about are the new words that it brings, or the task's concepts: give these with the class, "<toy> cat", as the paper
        has them. prior_rows words, from the first word to EOT, is the paper's; its 200 captions are not published with the
        code, ours are 100. lamb 0.5 and tolerance 1e-6 are chosen by us: the paper has no ridge, and removes rows that are
        given twice only when they are equal to the last digit.

    Deviations
        BOS is not free to move with the captions: C has its row, with the value that W gives it, since it is the same row in
        every prompt (the paper does not train on it either). With the ridge there is a solution for captions of any number.
        Solved in float64 through a Cholesky factor of A and one pseudo-inverse, where the official code inverts. The edits may
        have any rank or be dense; the paper's are dense. An edit with a new word alone may be among them: its rows stay.
    """

    prior: str = option("built-in", PRIOR_HELP.replace(", empty for none", ""))
    prior_rows: PriorRows = option("words", ROWS_HELP)
    lamb: float = option(0.5, "weight of staying close to the given weights, beside the captions")
    tolerance: float = option(1e-6, "learnt rows that differ by less than this part count as one; raise it for near-duplicates")

    kind: ClassVar = "merge"
    architectures: ClassVar = ("sd", "sdxl")
    paper: ClassVar = "arXiv:2212.04488"
    training_free: ClassVar = True

    def fit(self, model: Model, task: Task, *, score: Score | None = None) -> Edit:
        """Solve once. There is nothing to choose among, so `score` is not called."""
        pairs = list(to_merge(task))
        parts = [text_parts(model, edit, TokenEdit, LowRank, Delta) for edit, _ in pairs]
        words = [part for each in parts for part, _ in each if isinstance(part, TokenEdit)]
        _check_distinct(words)
        changes = [[(part, scale) for part, scale in each if not isinstance(part, TokenEdit)] for each in parts]
        if not any(changes):
            raise UserError("no edit changes a layer that reads text, so nothing is to be solved; chain them: compose without --method")
        if not self.prior:
            raise UserError("prior is empty, needs captions to keep; give a file of captions, or built-in")
        prior = caption_prior(model.arch, self.prior, self.prior_rows, 1.0)
        prompts = []
        for edit, concept in pairs:
            with model.attached(edit):  # its words are read, and it is said whether it fits this model
                prompts.append(encode_concept(model.arch, concept, TEMPLATES[concept.kind]))
        empty = encode(model.arch, [""])
        factors: dict[str, tuple[Tensor, Tensor]] = {}
        errors = []
        for name, stream in model.arch.text_streams().items():
            rows = [torch.cat([_learnt(prompt) for prompt in placed[name]]).double() for placed in prompts]
            rows.append(torch.cat([segment.rows[0, : segment.leading] for segment in stream.segments(empty)]).double())
            right = exact(torch.cat(rows), prior.moments[name], self.lamb, self.tolerance)
            values = {site: _values(site, layer.out_features, [*changes, []], rows) for site, layer in stream.linears.items()}
            wanted = torch.cat(list(values.values()))
            errors.append(float((wanted @ (right @ torch.cat(rows).T) - wanted).norm() / wanted.norm().clamp(min=1e-300)))
            factors |= _split(values, right)
        if not factors:
            raise UserError("the edits change nothing at their own words; give the concepts (--concept), what each edit is about")
        if max(errors) > INEXACT:
            what = f"the merge misses what the edits do at their words by {max(errors):.1e}"
            warnings.warn(
                f"{what}: they ask for different things at like rows; give each its own words, or another tolerance", stacklevel=2
            )
        triggers = tuple(dict.fromkeys(word for edit, _ in pairs for word in edit.info.triggers))
        info = model.info(self, triggers, {**prior.notes, "error": max(errors)})
        merged = LowRank.from_factors(factors, info)
        return Chain.of([*words, merged], info=info) if words else merged

    def needs(self) -> Literal["text"]:
        return "text"

    @classmethod
    def example_task(cls, model: Model) -> MergeTask:
        """Two edits as Custom Diffusion makes them: a word that the model does not know yet, and dense changes."""
        edits = []
        known = max(embedding.num_embeddings for embedding in model.arch.token_embeddings().values())
        for name in (f"<one{known}>", f"<two{known}>"):
            draw = seeded("custom_diffusion_merge", name)
            rows = {part: torch.randn(table.embedding_dim, generator=draw) for part, table in model.arch.token_embeddings().items()}
            deltas = {f"{site}.weight": layer.weight.shape for site, layer in model.arch.text_linears().items()}
            dense = Delta.from_deltas({site: 0.1 * torch.randn(shape, generator=draw) for site, shape in deltas.items()})
            edits.append(Chain.of([TokenEdit.from_rows({name: rows}), dense]))
        return MergeTask(tuple(edits))


def _check_distinct(words: Sequence[TokenEdit]) -> None:
    """No two edits may bring the same word."""
    seen: set[str] = set()
    for token in (token for edit in words for token in edit.tokens):
        if token in seen:
            raise UserError(f"two edits bring the word {token!r}; learn one of them again with another token")
        seen.add(token)


def _learnt(prompt: Placed) -> Tensor:
    """The rows [n, d] from the concept's first token to EOT, or a pooled encoding."""
    return prompt.hidden if prompt.ids is None else prompt.hidden[prompt.start : len(prompt.ids)]


def _values(site: str, width: int, changes: Sequence[Changes], rows: Sequence[Tensor]) -> Tensor:
    """What a layer of this width should give more than now, (V^T - W C^T) [o, m]: what each edit adds at its rows."""
    name, columns = f"{site}.weight", []
    for each, own in zip(changes, rows, strict=True):
        added = torch.zeros(width, len(own), dtype=own.dtype, device=own.device)
        for part, scale in each:
            if name in part.parameter_names():
                added += scale * part.delta(name).to(own) @ own.T
        columns.append(added)
    return torch.cat(columns, 1)


def _split(values: Mapping[str, Tensor], right: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Site -> factors of its values times `right`, the second one shared."""
    up, down = balanced(torch.cat(list(values.values())), right)
    ups = up.split([len(value) for value in values.values()])
    return {site: (own, down) for site, own in zip(values, ups, strict=True)} if len(down) else {}
