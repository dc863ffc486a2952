"""UCE: one linear solve that erases concepts from the layers that read text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pipelines.closed_form.edit import as_edit
from pipelines.closed_form.prior import PRIOR_HELP, ROWS, ROWS_HELP, SCALE, SCALE_HELP, PriorRows, caption_prior
from pipelines.closed_form.rows import KeepChoice, Nothing, RowChoice, Templates, encode_task, erase_task
from toolkit.concepts import Concept, EraseTask, Task
from toolkit.method import Method, Score, option
from toolkit.solve import Change, closed_form

if TYPE_CHECKING:
    from toolkit.edits.low_rank import LowRank
    from toolkit.model import Model


@dataclass(frozen=True)
class UCE(Method):
    """Unified Concept Editing in Diffusion Models, Gandikota et al., arXiv 2308.14761.

    Equation
        min_W  a sum_i ||W c_i - W0 g_i||^2 + p sum_j ||W k_j - W0 k_j||^2 + lamb ||W - W0||_F^2
        for every layer W that reads the text (on a UNet the key and value projections of the cross-attention), where c_i
        are token rows of prompts with an erased concept, g_i those of its anchor and k_j rows to keep. It is solved by
        W = W0 (I + D) with one D for all layers:
        D = [a sum_i (g_i - c_i) c_i^T] (lamb I + a sum_i c_i c_i^T + p sum_j k_j k_j^T)^{-1}.
        All concepts, their synonyms (more rows towards the same anchor) and all templates go into the one solve.

    Shapes
        c, g: [n, d], k: [m, d] text encoder outputs, d its width. W, W0: [o, d]. D: [d, d] of rank at most n, so the
        edit is low-rank: W0 U per layer and one V shared by all, D = U V.

    Defaults
        erase_scale 1 and lamb 0.5 are the official code's; preserve_scale 0.1 is that of the code at the time of the paper
        from ten preserved prompts on (1/n for n fewer; the current one takes 1, which erases less). rows "all" instead of
        its last subject token: in a causal text encoder every later token, padding included, carries the concept too.
        pipelines/closed_form/rows.py says how prompts are paired.

    Deviations
        The official code computes the same right-hand matrix and its inverse again for every layer, in float32; here
        it is factored once, in float64, and not inverted. Its prompts are the bare concept and optional templates;
        here the task's templates, always. The subject token is located inside the template, where the official code
        takes the last token of the prompt. The rows of the empty prompt are always kept, as in the code at the time of
        the paper (the current one does not keep them). Preserved prompts keep all their rows, or with preserve_rows
        last_subject one, as there. With `prior` the rows of captions are kept too, each with weight prior_scale, as MACE
        and TRCE do; see prior.py.
    """

    rows: RowChoice = option("all", "token rows that are moved: last_subject, tail_aligned, matched or all")
    nothing: Nothing = option("empty_prompt", "where a concept without an anchor goes: empty_prompt, or the template without it")
    erase_scale: float = option(1.0, "weight of each moved row")
    preserve_scale: float = option(0.1, "weight of each kept row")
    preserve_rows: KeepChoice = option("all", "rows of preserved prompts that are kept: all, to_eot (without padding) or last_subject")
    prior: str = option("", PRIOR_HELP)
    prior_rows: PriorRows = option(ROWS, ROWS_HELP)
    prior_scale: float = option(SCALE, SCALE_HELP)
    lamb: float = option(0.5, "weight of staying close to the given weights")

    kind: ClassVar = "erase"
    architectures: ClassVar = ("sd", "sdxl", "sd3", "flux")
    paper: ClassVar = "arXiv:2308.14761"
    training_free: ClassVar = True
    needs: ClassVar = "text"

    def fit(self, model: Model, task: Task, *, score: Score | None = None) -> LowRank:
        """Solve once. There is nothing to choose among, so `score` is not called."""
        changes, notes = self.solve(model, task)
        return as_edit(model, self, changes, notes)

    def solve(self, model: Model, task: Task, own: Templates | None = None) -> tuple[dict[str, Change], Mapping[str, Any]]:
        """Stream -> D, and what is to be noted of the captions. own: see `encode_task`."""
        task = erase_task(task)
        prior = caption_prior(model.arch, self.prior, self.prior_rows, self.prior_scale, task.concepts)
        changes = {
            stream: closed_form(
                *text.moved(self.rows),
                text.keep(self.preserve_rows),
                erase_scale=self.erase_scale,
                preserve_scale=self.preserve_scale,
                lamb=self.lamb,
                prior=prior.moments.get(stream),
            )
            for stream, text in encode_task(model.arch, task, self.nothing, own).items()
        }
        return changes, prior.notes

    @classmethod
    def example_task(cls, model: Model) -> EraseTask:
        """An object with a synonym and an anchor, a style without one, and a word to keep."""
        concepts = (Concept("cat", synonyms=("kitten",), anchor="dog"), Concept("van gogh", kind="style"))
        return EraseTask(concepts, preserve=("bird",))
