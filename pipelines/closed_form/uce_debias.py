"""UCE's debiasing: a concept is drawn with several attributes, each in its part of the images."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from pipelines.closed_form.edit import as_edit
from pipelines.closed_form.rows import KeepChoice, encode_task
from toolkit.concepts import Concept, DebiasTask, EraseTask, Task, expect
from toolkit.errors import UserError
from toolkit.method import Method, Score, option
from toolkit.solve import closed_form

if TYPE_CHECKING:
    from toolkit.edits.low_rank import LowRank
    from toolkit.model import Model


@dataclass(frozen=True)
class UCEDebias(Method):
    """Unified Concept Editing in Diffusion Models, Gandikota et al., arXiv 2308.14761, its debiasing.

    Equation
        min_W  sum_k sum_i ||W c_ki - W0 (c_ki + sum_a x_ka (g_kai - c_ki))||^2 + p sum_j ||W k_j - W0 k_j||^2 + lamb ||W - W0||_F^2
        for every layer that reads the text: c_ki the rows of concept k's prompts, g_kai those of the same prompts with attribute a in
        the concept's place. The x_ka start at 0. Again and again the images of the edited model are counted, and
        x_ka += step_size (wanted_a - measured_ka), for every concept that has an |error| of tolerance or more; the weights
        are solved anew from W0. It stops when no concept has.

    Shapes
        c, g: [n, d], k: [m, d] text encoder outputs, d its width. x: [concepts, attributes]. W, W0: [o, d].

    Defaults
        max_iterations 30, tolerance 0.05 and lamb 0.5 are the official code's. Its step_size of 0.1 has no effect: in effect it takes
        steps of 1; 0.5 is chosen by us. preserve_scale 0.1 and rows "all" are those of `uce`.

    Deviations
        The ratios come from the task's `classify`, not from a CLIP that is built in. The official code adds to the targets of the
        step before because it changes a cached tensor in place; here the x_ka are added up by name. Its step size is read
        and not used; here it is used. Errors are compared with tolerance by their absolute value, where the official code
        tests the largest and the smallest apart. It adds x_ka g_kai where x_ka (g_kai - c_ki) stands here: the same when the
        measured parts add up to 1, and without it rows that have nothing to do with the concept would grow or shrink. When
        max_iterations steps do not suffice the best of them is given, with a warning, where the official code gives the last.
    """

    rows: Literal["last_subject", "all"] = option("all", "token rows that are moved: last_subject or all")
    step_size: float = option(0.5, "how far the target goes towards an attribute for an error of 1")
    tolerance: float = option(0.05, "largest error of a ratio that is good enough")
    max_iterations: int = option(30, "times that images are drawn, counted and the weights solved")
    preserve_scale: float = option(0.1, "weight of each kept row")
    preserve_rows: KeepChoice = option("all", "rows of preserved prompts that are kept: all, to_eot (without padding) or last_subject")
    lamb: float = option(0.5, "weight of staying close to the given weights")

    kind: ClassVar = "debias"
    architectures: ClassVar = ("sd", "sdxl")
    paper: ClassVar = "arXiv:2308.14761"
    training_free: ClassVar = True

    def __post_init__(self) -> None:
        for name in ("step_size", "tolerance", "max_iterations"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} is {getattr(self, name)}, needs a number above 0; give such a number")

    def fit(self, model: Model, task: Task, *, score: Score | None = None) -> LowRank:
        """Solve and count until the ratios are right. The task's `classify` decides, so `score` is not called."""
        task = expect(DebiasTask, task)
        wanted = torch.tensor(task.ratios or [1 / len(task.attributes)] * len(task.attributes), dtype=torch.float64)
        solve = self._solver(model, task)
        errors = wanted - _measure(model, task)
        if errors.abs().max() < self.tolerance:
            raise UserError(
                f"every ratio is within {self.tolerance} of the wanted one already; lower tolerance, or leave the model as it is"
            )
        x, tried = torch.zeros_like(errors), []
        while errors.abs().max() >= self.tolerance and len(tried) < self.max_iterations:
            x = x + self.step_size * errors * (errors.abs().amax(1, keepdim=True) >= self.tolerance)
            edit = solve(x)
            with model.attached(edit):
                measured = _measure(model, task)
            errors = wanted - measured
            tried.append((float(errors.abs().max()), edit, measured))
        error, edit, measured = min(tried, key=lambda each: each[0])
        if error >= self.tolerance:
            what = f"after {len(tried)} steps a ratio is still {error:.2f} from the wanted one"
            warnings.warn(f"{what}; give more max_iterations, or a smaller step_size when the ratios jump", stacklevel=2)
        ratios = {concept.name: list(map(float, row)) for concept, row in zip(task.concepts, measured, strict=True)}
        notes = {"iterations": len(tried), "error": error, "ratios": ratios}
        return dataclasses.replace(edit, info=dataclasses.replace(edit.info, notes=notes))

    def _solver(self, model: Model, task: DebiasTask) -> Callable[[Tensor], LowRank]:
        """What gives the edit for the steps x [concepts, attributes], with all prompts encoded once."""
        first = EraseTask(task.concepts, task.preserve, task.templates)
        keep = {name: text.keep(self.preserve_rows) for name, text in encode_task(model.arch, first, "empty_prompt").items()}
        moves = [self._moves(model, task, concept) for concept in task.concepts]

        def solve(x: Tensor) -> LowRank:
            changes = {}
            for name, kept in keep.items():
                sources = [source for source, _ in (each[name] for each in moves)]
                targets = [
                    source + torch.einsum("a,and->nd", own.to(towards), towards)
                    for own, (source, towards) in zip(x, (each[name] for each in moves), strict=True)
                ]
                changes[name] = closed_form(
                    torch.cat(sources), torch.cat(targets), kept, preserve_scale=self.preserve_scale, lamb=self.lamb
                )
            return as_edit(model, self, changes)

        return solve

    def _moves(self, model: Model, task: DebiasTask, concept: Concept) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Stream -> a concept's rows c [n, d] and for each attribute the way to its rows, g - c [attributes, n, d], in float64."""
        towards = [dataclasses.replace(concept, anchor=attribute) for attribute in task.attributes]
        texts = [encode_task(model.arch, EraseTask((each,), (), task.templates), "empty_prompt") for each in towards]
        moves = {}
        for name in texts[0]:
            pairs = [text[name].moved(self.rows) for text in texts]  # the sources are the same whatever the attribute
            source = pairs[0][0].double()
            moves[name] = source, torch.stack([target.double() - source for _, target in pairs])
        return moves

    @classmethod
    def example_task(cls, model: Model) -> DebiasTask:
        """A concept, two attributes, and instead of drawing images something that answers to the weights as images would."""
        concept, attributes = Concept("doctor"), ("woman", "man")
        return DebiasTask((concept,), attributes, _linear_response(model, attributes), templates=("{}",))


def _measure(model: Model, task: DebiasTask) -> Tensor:
    """The part of each attribute [concepts, attributes], in float64, among the images of each concept."""
    rows: list[Sequence[float]] = [task.classify(model, concept) for concept in task.concepts]
    for concept, row in zip(task.concepts, rows, strict=True):
        if len(row) != len(task.attributes) or not all(0 <= part <= 1 for part in row):
            given = ", ".join(map(str, row))
            raise UserError(f"classify gave {given} for {concept.name!r}, needs {len(task.attributes)} parts from 0 to 1; check it")
    return torch.tensor([list(map(float, row)) for row in rows], dtype=torch.float64)


def _linear_response(model: Model, attributes: tuple[str, str]) -> Callable[[Model, Concept], Sequence[float]]:
    """Parts of two attributes: 0.2 and 0.8 with the weights of now, and linear in how far a layer's answer to a concept moves."""
    site, layer = next(iter(model.arch.text_linears().items()))
    before = layer.weight.detach().clone()
    text = model.arch.encode(attributes)
    one, two = text.hidden[[0, 1], text.length - 2]
    way = before @ (one - two)

    def classify(edited: Model, concept: Concept) -> Sequence[float]:
        text = edited.arch.encode([concept.name])
        moved = (edited.arch.text_linears()[site].weight - before) @ text.hidden[0, int(text.length) - 2]
        part = min(max(0.2 + 0.5 * float(moved @ way / way.square().sum()), 0.0), 1.0)
        return part, 1 - part

    return classify
