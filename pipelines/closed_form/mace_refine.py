"""MACE's first stage: the words around a concept no longer tell that it is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pipelines.closed_form.edit import as_edit
from pipelines.closed_form.prior import PRIOR_HELP, ROWS, ROWS_HELP, SCALE, SCALE_HELP, PriorRows
from pipelines.closed_form.rows import KeepChoice, Nothing, Templates
from pipelines.closed_form.uce import UCE
from toolkit.concepts import Concept, EraseTask, Task
from toolkit.method import Method, Score, option

if TYPE_CHECKING:
    from toolkit.edits.low_rank import LowRank
    from toolkit.model import Model

TEMPLATES: Templates = {
    "object": (
        "a photo of a {}",
        "a photo of the {}",
        "a picture of a {}",
        "a snapshot of the {} outdoors",
        "a close view of a {}",
        "a {} seen from far away",
        "a {} on a plain background",
        "a {} in the morning light",
        "a {} at night",
        "a {} in the rain",
        "a {} by the sea",
        "a {} in a crowded street",
        "a {} on the grass",
        "a {} next to a window",
        "a {} inside a room",
        "a painting of a {}",
        "an oil painting of the {}",
        "a watercolour of a {}",
        "a pencil drawing of a {}",
        "a quick sketch of the {}",
        "a cartoon of a {}",
        "a poster with a {} on it",
        "a 3d render of a {}",
        "a black and white picture of a {}",
        "a colourful illustration of a {}",
        "a postcard that shows a {}",
        "a book cover with the {}",
        "two people looking at a {}",
        "someone standing beside the {}",
        "an advertisement for a {}",
    ),
    "style": (
        "a picture by {}",
        "a painting by {}",
        "a drawing by {}",
        "a print by {}",
        "a large canvas by {}",
        "a small study by {}",
        "an early work by {}",
        "a late work by {}",
        "a well known work by {}",
        "an unfinished piece by {}",
        "a landscape by {}",
        "a portrait by {}",
        "a still life by {}",
        "a street scene by {}",
        "a view of the sea by {}",
        "a house in the style of {}",
        "a tree in the style of {}",
        "a dog in the style of {}",
        "a city at night in the style of {}",
        "a poster in the style of {}",
        "an illustration in the style of {}",
        "a mural inspired by {}",
        "a digital picture inspired by {}",
        "a photo that imitates {}",
        "the colours of {} in a garden scene",
        "the brushwork of {} on a portrait",
        "a museum room with works of {}",
        "an exhibition of {} in spring",
        "a catalogue of {} on a table",
        "a copy after {} in a frame",
    ),
}


@dataclass(frozen=True)
class MACERefine(Method):
    """MACE: Mass Concept Erasure in Diffusion Models, Lu et al., arXiv 2403.06135, its closed-form refinement.

    Equation
        min_W  sum_i ||W f_i - W0 g_i||^2 + p sum_j ||W k_j - W0 k_j||^2 + tr((W - W0) M (W - W0)^T) + lamb ||W - W0||_F^2
        for every layer W that reads the text. f_i are the rows of the tokens that stand beside the concept in a prompt, g_i
        the rows of the same tokens in the anchor's prompt: in a causal text encoder whatever follows a concept carries it. k_j
        are rows to keep, M = prior_scale sum x x^T over the rows of captions. One D for all layers solves it, as in UCE:
        W = W0 (I + D), D = [sum_i (g_i - f_i) f_i^T] (lamb I + M + sum_i f_i f_i^T + p sum_j k_j k_j^T)^{-1}.
        The concept's own tokens stay: the paper erases them next with one LoRA for each concept (fit these on a model that has
        this edit attached) and fuses the LoRAs (the method mace_fuse).

    Shapes
        f, g: [n, d], k: [m, d] text encoder outputs, d its width. M, D: [d, d]. W, W0: [o, d]. D has rank at most n.

    Defaults
        30 templates, as many as in the paper, in our words; a task's own templates take their place. lamb 10 is the official
        code's for objects; it is not 0, as for celebrities, which without many captions leaves no solution. preserve_scale and
        prior_scale 0.1 are chosen by us, with our 100 captions where the paper takes those of COCO (prior_scale 1e-4 for
        celebrities): give prior a file of yours.

    Deviations
        The weight of the prior counts once. The official code applies it twice when there are at most 1000 concepts, and with
        more of them its batches leave some out. Tokens are matched from both ends as in the official code, but BOS, the same
        row in every prompt, is not among them.
        Captions that name the concept are left out of the prior. A concept without an anchor goes to the empty prompt, or to
        the template without it; the paper always names one. Synonyms and preserved prompts are ours. On SD3 and Flux the layers
        are those of UCE. T5 reads in both directions, so that the words before a concept carry it too, and are moved as well;
        the pooled encoding, where the concept cannot be told from the words beside it, moves as a whole. The paper's next two
        stages are for a UNet: mace_fuse is not declared there. Solved in float64 with
        one factorisation for all layers, where the official code inverts once for each in float32.
    """

    nothing: Nothing = option("empty_prompt", "where a concept without an anchor goes: empty_prompt, or the template without it")
    preserve_scale: float = option(0.1, "weight of each kept row")
    preserve_rows: KeepChoice = option("all", "rows of preserved prompts that are kept: all, to_eot (without padding) or last_subject")
    prior: str = option("built-in", PRIOR_HELP)
    prior_rows: PriorRows = option(ROWS, ROWS_HELP)
    prior_scale: float = option(SCALE, SCALE_HELP)
    lamb: float = option(10.0, "weight of staying close to the given weights")

    kind: ClassVar = "erase"
    architectures: ClassVar = ("sd", "sdxl", "sd3", "flux")
    paper: ClassVar = "arXiv:2403.06135"
    training_free: ClassVar = True

    def fit(self, model: Model, task: Task, *, score: Score | None = None) -> LowRank:
        """Solve once. There is nothing to choose among, so `score` is not called."""
        shared = {name: getattr(self, name) for name in self.config()}  # its options are among UCE's
        changes, notes = UCE(rows="matched", **shared).solve(model, task, TEMPLATES)
        return as_edit(model, self, changes, notes)

    def needs(self) -> Literal["text"]:
        return "text"

    @classmethod
    def example_task(cls, model: Model) -> EraseTask:
        """Two concepts of unequal length to their anchors, in one template."""
        return EraseTask((Concept("cat", anchor="dog"), Concept("red car", anchor="street")), templates=("a photo of a {} at night",))
