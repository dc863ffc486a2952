"""RealEra's closed form: UCE that erases random embeddings around a concept too, and keeps those further away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Generator, Tensor
from torch.nn.functional import cosine_similarity, normalize

from pipelines.closed_form.edit import as_edit
from pipelines.closed_form.rows import KeepChoice, Nothing, TaskRows, encode_task
from pipelines.closed_form.uce import UCE
from toolkit.concepts import EraseTask, Task
from toolkit.errors import UserError
from toolkit.method import Method, Score, option
from toolkit.solve import Change, closed_form

if TYPE_CHECKING:
    from toolkit.edits.low_rank import LowRank
    from toolkit.model import Model

_DRAWS = 1000  # of one embedding, until it is similar enough


@dataclass(frozen=True)
class RealEraEmbedding(Method):
    """RealEra: Semantic-level Concept Erasure via Neighbor-Concept Mining, Liu et al., arXiv 2410.09140.

    The closed form of the method, without the low-rank adapter that it trains afterwards.

    Equation
        min_W  a sum_i ||W c_i - W0 g_i||^2 + a sum_i sum_n ||W (e_i + x_in) - W0 h_i||^2
             + p sum_i sum_b ||W (e_i + y_ib) - W0 (e_i + y_ib)||^2 + p sum_j ||W k_j - W0 k_j||^2 + lamb ||W - W0||_F^2
        for every layer W that reads the text. c_i -> g_i are the rows that UCE moves, e_i -> h_i those among them of the concept's
        last token, k_j the rows to keep. Neighbours e + x share the concept's target, beyond-concept rows e + y stay:
            |x| <= D1,  S1 <= cos(e, e + x) <= S2,       D1 <= |y| <= D2,  cos(e, e + y) <= S1.
        It is solved by W = W0 (I + D) with one D for all layers, as in UCE.

    Shapes
        c, g: [n, d], e, h, x, y: [d], k: [m, d], d the width of the text encoder. W, W0: [o, d]. D: [d, d] of rank at most
        n plus the number of neighbours. D1 = radius |e| and D2 = beyond_radius |e|.

    Defaults
        The paper's are the two kinds of rows, what is asked of them and their targets. It comes without code, and its D1, D2,
        S1, S2 and counts are not known to us. 5 neighbours, 3 rows beyond, S1 = 0.5 and S2 = 0.9 are those of a
        re-implementation by CRCE's authors. So is beyond_radius 1.6: their radius is up to 400 around an encoded prompt of
        77 x 768 numbers, 1.6 times the norm of the random prompt that it moves towards. radius 1 is ours; the similarity
        decides more, as S1 = 0.5 is reached at 0.9 |e|. rows, erase_scale, preserve_scale and lamb are UCE's.

    Deviations
        Radii are relative to the norm of the row, so that they mean the same in every model. An embedding is a random one
        of the row's own norm, and a uniform distance on the way there: a step in a random direction would only make the row
        longer, and behind the layer norm that Stable Diffusion's text encoder ends in all rows have about one length. It is
        drawn again until its similarity fits. Rows are perturbed, not prompts as a whole: the layers read row by row, BOS
        has to stay as it is, and in a prompt's norm its padding counts most. Only the concept's last token in each prompt
        is perturbed: the directions are random, so that with the neighbours of all its 76 rows they would fill the width of
        the text, and everything would move. Neighbours weigh as much as moved rows, and rows beyond as much as kept ones.
        On SD3 and Flux every encoder's row and the pooled one have embeddings of their own; those of SD3's CLIP rows also leave
        the part of T5's width that these rows fill, as the layer reads it all. Solved in float64.
    """

    rows: Literal["last_subject", "tail_aligned", "all"] = option("all", "token rows that are moved: last_subject, tail_aligned or all")
    nothing: Nothing = option("empty_prompt", "where a concept without an anchor goes: empty_prompt, or the template without it")
    neighbours: int = option(5, "random embeddings near the concept that are erased, for each prompt")
    beyond: int = option(3, "random embeddings further away that are kept, for each prompt")
    radius: float = option(1.0, "how far neighbours are from the concept at most, in norms of its embedding")
    beyond_radius: float = option(1.6, "how far kept embeddings are at most; at least they are as far as radius")
    min_similarity: float = option(0.5, "cosine similarity to the concept that neighbours have at least, and kept embeddings at most")
    max_similarity: float = option(0.9, "cosine similarity to the concept that neighbours have at most")
    seed: int = option(0, "of the random embeddings")
    erase_scale: float = option(1.0, "weight of each moved row and neighbour")
    preserve_scale: float = option(0.1, "weight of each kept row, random ones among them")
    preserve_rows: KeepChoice = option("all", "rows of preserved prompts that are kept: all, to_eot (without padding) or last_subject")
    lamb: float = option(0.5, "weight of staying close to the given weights")

    kind: ClassVar = "erase"
    architectures: ClassVar = ("sd", "sdxl", "sd3", "flux")
    paper: ClassVar = "arXiv:2410.09140"
    training_free: ClassVar = True

    def fit(self, model: Model, task: Task, *, score: Score | None = None) -> LowRank:
        """Solve once. There is nothing to choose among, so `score` is not called."""
        self.check()
        make = Generator().manual_seed(self.seed)
        texts = encode_task(model.arch, task, self.nothing)
        return as_edit(model, self, {stream: self.change_of(text, make) for stream, text in texts.items()})

    def check(self) -> None:
        """Refuse options with which there is nothing to draw."""
        if not 0 < self.radius < self.beyond_radius:
            given = f"radius is {self.radius:g} and beyond_radius {self.beyond_radius:g}"
            raise UserError(f"{given}, needs radius above 0 and beyond_radius above that; set both")
        if not -1 <= self.min_similarity < self.max_similarity <= 1:
            given = f"min_similarity is {self.min_similarity:g} and max_similarity {self.max_similarity:g}"
            raise UserError(f"{given}, needs the first below the second and both from -1 to 1; set both")
        for name, count in (("neighbours", self.neighbours), ("beyond", self.beyond)):
            if count < 0:
                raise UserError(f"{name} is {count}, needs at least 0; give 0 for none")

    def change_of(self, text: TaskRows, make: Generator) -> Change:
        """D for the layers of one stream."""
        source, target = text.moved(self.rows)
        concept, goal = text.subjects(self.rows)
        neighbours, beyond = self.near(concept, make), self.further(concept, make)
        return closed_form(
            torch.cat([source, neighbours]),
            torch.cat([target, goal.repeat_interleave(self.neighbours, 0)]),
            torch.cat([text.keep(self.preserve_rows), beyond]),
            erase_scale=self.erase_scale,
            preserve_scale=self.preserve_scale,
            lamb=self.lamb,
        )

    def near(self, rows: Tensor, make: Generator) -> Tensor:
        """Neighbours of each row: [n, d] -> [n neighbours, d], float64."""
        return around(rows, self.neighbours, (0, self.radius), (self.min_similarity, self.max_similarity), make)

    def further(self, rows: Tensor, make: Generator) -> Tensor:
        """Embeddings beyond the neighbours of each row: [n, d] -> [n beyond, d], float64."""
        return around(rows, self.beyond, (self.radius, self.beyond_radius), (-1, self.min_similarity), make)

    def needs(self) -> Literal["text"]:
        return "text"

    @classmethod
    def example_task(cls, model: Model) -> EraseTask:
        """The same as UCE's."""
        return UCE.example_task(model)


def around(rows: Tensor, count: int, distance: tuple[float, float], similarity: tuple[float, float], make: Generator) -> Tensor:
    """`count` random embeddings around each row, on the way to random embeddings of its norm: [n, d] -> [n count, d], float64.

    distance: the least and the most, in norms of the row. similarity: the least and the most cosine to the row.
    """
    (near, far), (low, high) = distance, similarity
    centre = rows.double().repeat_interleave(count, 0)
    found, missing = centre.clone(), torch.arange(len(centre), device=centre.device)
    for _ in range(_DRAWS):
        row = centre[missing]
        norm = row.norm(dim=1, keepdim=True)
        other = torch.randn(row.shape, generator=make, dtype=torch.float64).to(row.device)
        step = near + (far - near) * torch.rand(len(row), 1, generator=make, dtype=torch.float64).to(row.device)
        drawn = row + norm * step * normalize(norm * normalize(other) - row)
        cosine = cosine_similarity(drawn, row)
        fits = (cosine >= low) & (cosine <= high)
        found[missing[fits]] = drawn[fits]
        missing = missing[~fits]
        if not len(missing):
            return found
    asked = f"{near:g} to {far:g} norms away with a similarity of {low:g} to {high:g}"
    raise UserError(f"found no embedding {asked} among {_DRAWS} random ones; widen the similarities or the radius")
