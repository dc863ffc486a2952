"""Custom Diffusion: a new word and the keys and values that read it, learnt together, for one subject or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from toolkit.concepts import Subject, named
from toolkit.method import option
from trainers.augmentation import Scaled
from trainers.keys_and_values import WithKeysAndValues
from trainers.loop import Objective
from trainers.preservation import PreservedDenoising
from trainers.subjects import Photos, Prompts
from trainers.weights import WordsAndWeights

if TYPE_CHECKING:
    from toolkit.model import Model

TEMPLATES = ("photo of a {}",)


@dataclass(frozen=True)
class CustomDiffusion(WithKeysAndValues):
    """Multi-Concept Customization of Text-to-Image Diffusion, Kumari et al., arXiv 2212.04488.

    Equation
        min_{v, W}  E_{z, y, eps, t} sum(m * (eps - e(z_t, t, c(y; v)))^2) / sum(m)
                  + prior_weight E_{z', eps, t} || eps - e(z'_t, t, c(y')) ||^2
        with W the keys and values of the cross-attention, v the embeddings of the new words, z the latent of a picture at a drawn
        size, y its prompt ("photo of a <toy> dog", with "a far away", "very small", "zoomed in" or "close up" before it at such a
        size), m where the picture is, and z', y' pictures of the class with their captions. Several subjects are learnt together,
        from the pictures of all of them: one W, a word for each. The key and value of the prompt's first token, which is the same in
        every prompt, pass no gradient on. On a model that predicts velocity the same is done in velocities.

    Shapes
        W: [o, d] for each layer that reads the text. v: [vectors, d]. z, eps: [batch, c, h', w'] scaled latents.

    Defaults
        The official code's, on one GPU: 500 steps with 2 pictures each, step size 1e-5 times 2 pictures times 2 for the class beside
        them, AdamW, 200 pictures of the class, prior_weight 1, the keys and values alone; parameters cross_attention is its
        choice for faces. New words start from its three rare ones, in turn; compress 0.6 is its ratio, off there too. Sizes
        are drawn as there: in two of three cases from a third to the whole, else 1.2 to 1.4 times as large.

    Deviations
        The class's pictures are drawn by the model, or a folder's, where the paper retrieves real ones with similar captions.
        No random flip: captions may name sides. The posterior's mean is encoded. The error of each picture is averaged over its
        own m, not over that of the batch. Timesteps are stratified over the batch by default: each is still uniform. Only new
        rows exist as parameters, so that no row of the table needs its gradient masked. The change is stored low-rank or dense,
        whichever is smaller, and loads as a LoRA.
    """

    augment: bool = option(True, "draw the size of pictures anew for every sample; they are then encoded at each use")

    paper: ClassVar = "arXiv:2212.04488"

    def learning(self, model: Model, weights: WordsAndWeights, subjects: Sequence[Subject]) -> Objective:
        text = Prompts(model.arch, self.cache, grad=True)
        return PreservedDenoising(model, weights, text, self, subjects, self.pictures(model, subjects))

    def pictures(self, model: Model, subjects: Sequence[Subject]) -> Photos:
        """Those of all subjects."""
        return (Scaled if self.augment else Photos).of(model.arch, subjects, self, TEMPLATES, named)
