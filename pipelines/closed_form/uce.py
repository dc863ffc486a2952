"""UCE: one linear solve that erases concepts from the layers that read text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pipelines.closed_form.edit import as_edit
from pipelines.closed_form.encoder import encoder_changes
from pipelines.closed_form.features import captured_changes
from pipelines.closed_form.prior import PRIOR_HELP, ROWS, ROWS_HELP, SCALE, SCALE_HELP, PriorRows, caption_prior
from pipelines.closed_form.rows import KeepChoice, Nothing, RowChoice, Templates, encode_prompts, encode_task
from toolkit.concepts import Concept, EraseTask, Task, expect
from toolkit.errors import UserError
from toolkit.method import Method, Score, option
from toolkit.solve import Change, closed_form

if TYPE_CHECKING:
    from toolkit.edits.low_rank import LowRank
    from toolkit.model import Model

Layers = Literal["text", "values", "encoder", "captured", "both"]


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
        On SD3 and Flux the layers that read text as it is are the first ones, of its tokens and of its pooled encoding. With
        `layers` captured, the keys and values that joint attention makes of the text are changed, by the mean of this objective
        over noisy latents x_t, with rows that depend on them: c_i(x_t) and g_i(x_t) are what the layer reads on the same x_t
        under the concept's and under its anchor's prompt. Each input of its own has a D of its own, which is that of each
        layer by itself, as D does not depend on W. features.py says how rows are captured, and what that costs. With `layers`
        encoder, on models with a UNet, the same is done for what the keys and values of the text encoders' own attention read,
        and on SDXL the projection that gives the pooled encoding, which no layer of the cross-attention reads; see encoder.py.

    Shapes
        c, g: [n, d], k: [m, d] text encoder outputs, d its width. W, W0: [o, d]. D: [d, d] of rank at most n, so the
        edit is low-rank: W0 U per layer and one V shared by all, D = U V. Captured, n counts the rows of all steps and
        images, d is the denoiser's width, and an edit of more than 2/3 d rows is stored dense: 4.3 GB for Flux.1 with rows
        all, while last_subject leaves a rank of (prompts x steps x images) at most.

    Defaults
        erase_scale 1 and lamb 0.5 are the official code's; preserve_scale 0.1 is that of the code at the time of the paper
        from ten preserved prompts on (1/n for n fewer; the current one takes 1, which erases less). rows "all" instead of
        its last subject token: in a causal text encoder every later token, padding included, carries the concept too.
        pipelines/closed_form/rows.py says how prompts are paired. layers "text" because it is the paper's, needs no prediction
        of the denoiser, and one change of the encoded prompt reaches all layers behind it. Captured layers alone leave the pooled
        encoding, which scales and shifts what every block reads, and the text's own rows: they are meant for "both". 8 steps and
        2 images are ours.

    Deviations
        The official code computes the same right-hand matrix and its inverse again for every layer, in float32; here
        it is factored once, in float64, and not inverted. Its prompts are the bare concept and optional templates;
        here the task's templates, always. The subject token is located inside the template, where the official code
        takes the last token of the prompt. The rows of the empty prompt are always kept, as in the code at the time of
        the paper (the current one does not keep them). Preserved prompts keep all their rows, or with preserve_rows
        last_subject one, as there. With `prior` the rows of captions are kept too, each with weight prior_scale, as MACE
        and TRCE do, by the layers that read text as it is; see prior.py. The official code for Flux edits these layers too,
        but counts their bias to v_i and not to W, which adds it twice; here v_i = W0 g_i, and the bias stays. Captured layers are
        ours. With "both", they are captured with the edit of the first layers attached, since what they read comes from there.
        Layers "values" is that code's choice to leave the keys. Layers "encoder" is ours too: a concept's own rows keep it in the
        residual stream, so it is meant as an edit to build a second one on, of the layers that read what it leaves.
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
    layers: Layers = option("text", "text (all that read it as it is), values (of these), encoder, captured (behind text), or both")
    capture_steps: int = option(8, "steps of drawing a prompt, at each of which captured layers are seen")
    capture_images: int = option(2, "images that are drawn of each prompt for captured layers")
    capture_seed: int = option(0, "of the first of these images")

    kind: ClassVar = "erase"
    architectures: ClassVar = ("sd", "sdxl", "sd3", "flux")
    paper: ClassVar = "arXiv:2308.14761"
    training_free: ClassVar = True

    def fit(self, model: Model, task: Task, *, score: Score | None = None) -> LowRank:
        """Solve once for each stream of text, and for each captured input. There is nothing to choose among: `score` is not called."""
        self.check(model)
        if self.layers == "encoder":
            prompts = encode_prompts(model.arch, task, self.nothing)
            weights = {"erase_scale": self.erase_scale, "preserve_scale": self.preserve_scale, "lamb": self.lamb}
            return as_edit(model, self, encoder_changes(model.arch, prompts, self.rows, self.preserve_rows, **weights))
        changes, notes = self.solve(model, task) if self.layers != "captured" else ({}, {})
        if self.layers == "values":
            streams, values = model.arch.text_streams(), model.arch.value_linears()
            changes = {site: changes[name] for name, stream in streams.items() for site in stream.linears if site in values}
        if self.layers in ("text", "values"):
            return as_edit(model, self, changes, notes)
        prompts = encode_prompts(model.arch, task, self.nothing)
        with model.attached(*([as_edit(model, self, changes)] if changes else [])):
            captured = captured_changes(
                model,
                prompts,
                self.rows,
                self.preserve_rows,
                erase_scale=self.erase_scale,
                preserve_scale=self.preserve_scale,
                lamb=self.lamb,
                steps=self.capture_steps,
                images=self.capture_images,
                seed=self.capture_seed,
            )
        return as_edit(model, self, changes | captured, notes)

    def check(self, model: Model) -> None:
        """Refuse a choice of layers that the model does not have, and options without effect on it."""
        default, arch = UCE(), model.arch
        capture = ("capture_steps", "capture_images", "capture_seed")
        if self.layers not in ("captured", "both") and any(getattr(self, name) != getattr(default, name) for name in capture):
            raise UserError(f"{', '.join(capture)} have no effect on layers {self.layers}; set layers to captured or both")
        if self.layers in ("captured", "encoder") and (self.prior, self.prior_rows, self.prior_scale) != ("", ROWS, SCALE):
            what = f"prior, prior_rows and prior_scale have no effect on layers {self.layers}"
            raise UserError(f"{what}; preserve prompts, or set layers to {'both' if self.layers == 'captured' else 'text'}")
        if self.layers == "values" and arch.value_linears().keys() == arch.text_linears().keys():
            raise UserError(f"layers is values, but in {arch.name} one layer gives keys and values both; leave it at text")
        if self.layers == "encoder" and not arch.encoder_readers():
            raise UserError(f"layers is encoder, which works on models with a UNet, and this is {arch.name}; leave it at text")
        if self.layers in ("captured", "both"):
            if not arch.text_readers():
                raise UserError(f"layers is {self.layers}, but in {arch.name} all layers read the text as it is; leave it at text")
            if min(self.capture_steps, self.capture_images) < 1:
                given = f"capture_steps is {self.capture_steps} and capture_images {self.capture_images}"
                raise UserError(f"{given}, needs at least 1 of each; set both")

    def solve(self, model: Model, task: Task, own: Templates | None = None) -> tuple[dict[str, Change], Mapping[str, Any]]:
        """Stream -> D, and what is to be noted of the captions. own: see `encode_task`."""
        task = expect(EraseTask, task)
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

    def needs(self) -> Literal["text", "all"]:
        return "all" if self.layers in ("captured", "both") else "text"

    @classmethod
    def example_task(cls, model: Model) -> EraseTask:
        """An object with a synonym and an anchor, a style without one, and a word to keep."""
        concepts = (Concept("cat", synonyms=("kitten",), anchor="dog"), Concept("van gogh", kind="style"))
        return EraseTask(concepts, preserve=("bird",))
