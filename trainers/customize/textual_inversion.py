"""Textual inversion: a new word for a subject, found by gradient descent on its embedding alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from toolkit.concepts import CustomizeTask, Subject, Task
from toolkit.layer_rows import LayerRows
from toolkit.method import option
from toolkit.prompt_search import TokenRows
from toolkit.world.scenes import ASSETS
from trainers.loop import Objective
from trainers.subjects import Denoising, Learned, Photos, Prompts

if TYPE_CHECKING:
    from toolkit.edits.base import Edit, EditInfo
    from toolkit.model import Model

TEMPLATES = {
    "object": ("a {}", "a photo of a {}", "a picture of a {}", "a rendering of a {}", "a depiction of a {}", "a photo of one {}"),
    "style": ("in the style of {}", "a picture in the style of {}", "a painting in the style of {}", "a rendering in the style of {}"),
}


@dataclass(frozen=True)
class TextualInversion(Learned):
    """An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion, Gal et al., arXiv 2208.01618.

    With per_layer, P+: Extended Textual Conditioning in Text-to-Image Generation, Voynov et al., arXiv 2303.09522.

    Equation
        v* = argmin_v E_{z, y, eps, t} || eps - eps_theta(z_t, t, c(y; v)) ||^2,    z_t = alpha_t z + sigma_t eps,
        where z is the latent of a picture of the subject, y a caption with the new word, v the word's embedding and c the
        text encoder; everything but v is frozen. With a model that predicts velocity the same is done in velocities.
        per_layer: v = (v_1, ..., v_l) for the l cross-attentions, of which the i-th reads c(y; v_i) as its keys and values.

    Shapes
        v: [vectors, d] for each word, d the width of the token embedding; per_layer [l, vectors, d]. z, eps: [batch, c, h', w'] scaled
        latents.

    Defaults
        learning_rate 0.005 and a batch of 4, constant, AdamW, as in the paper; there the rate is further multiplied by the
        batch size and the number of GPUs to 0.04, and 5000 steps are taken. max_train_steps 500 is chosen by us for the
        embedded model: give 2000 to 5000 for photographs. per_layer is off, as in the first paper; the second one changes nothing else
        but the number of steps, which is 500.

    Deviations
        Only new rows exist as parameters, where the official code trains the table and restores the other rows.
        A picture's own caption is used when it has one, else a template; the templates are fewer than the official 27,
        without its "cropped", "dark" and the like, which say things about a picture that need not be true. No random
        flip: captions may name sides. The posterior's mean is encoded, once, not a new sample in every step. Timesteps are
        stratified over the batch by default: each is still uniform, with less variance between steps. With masks the
        error counts on the subject only, divided by its area. Several vectors, also in the paper's appendix, start from
        the class name's tokens in turn.
        per_layer: all v_i start from the same rows and are trained at once by one loss. The pooled encoding of SDXL, which the paper has
        not, is one for the whole image: it is made with the mean of the v_i, in training too. Layers are told apart by their attention,
        16 in Stable Diffusion 1, 70 in XL, for each of which a prompt is encoded in every step.
    """

    num_vectors: int = option(1, "embedding vectors for each new word")
    per_layer: bool = option(False, "rows of its own for each cross-attention (P+, arXiv 2303.09522)")
    initializer_token: str | None = option(None, "word or phrase to start from; none is the subject's class name")
    learnable_property: Literal["object", "style"] = option("object", "what is learned, which decides the templates")
    train_batch_size: int = option(4, "pictures that are computed at once")
    learning_rate: float = option(5e-3, "step size")
    max_grad_norm: float = option(math.inf, "largest norm of the gradient; inf: any")

    architectures: ClassVar = ("sd", "sdxl")
    paper: ClassVar = "arXiv:2208.01618"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "num_vectors")

    @contextmanager
    def objective(self, model: Model, task: Task) -> Iterator[tuple[Objective, Callable[[EditInfo], Edit]]]:
        subjects = self.subjects(task)
        start = {subject.token: self.initializer_token or subject.class_name for subject in subjects}
        words = LayerRows if self.per_layer else TokenRows
        with words(model, start, vectors=self.num_vectors, seed=self.seed).unlisted() as rows:
            pictures = Photos.of(model.arch, subjects, self, TEMPLATES[self.learnable_property])
            yield Denoising(rows, pictures, Prompts(model.arch, self.cache, grad=True), self), rows.edit

    @classmethod
    def example_task(cls, model: Model) -> CustomizeTask:
        """One picture that the package ships: the embedded world's sprites."""
        return CustomizeTask((Subject("<toy>", "picture", (ASSETS / "atlas.webp",)),))
