"""Custom Diffusion: a new word and the keys and values that read it, learnt together, for one subject or several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from toolkit.concepts import CustomizeTask, Subject, Task
from toolkit.edits.low_rank import LowRank
from toolkit.errors import UserError
from toolkit.method import option
from toolkit.prompt_search import TokenRows
from toolkit.world.scenes import ASSETS
from trainers.augmentation import Scaled
from trainers.loop import Objective
from trainers.preservation import PRIOR, PreservedDenoising, Preserving, Prior
from trainers.subjects import Photos, Pool, Prompts, named
from trainers.weights import FullWeights, WordsAndWeights

if TYPE_CHECKING:
    from toolkit.edits.base import Edit, EditInfo
    from toolkit.edits.delta import Delta
    from toolkit.model import Model

TEMPLATES = ("photo of a {}",)


@dataclass(frozen=True)
class CustomDiffusion(Preserving):
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
        compress keeps of the change U S V^T of a layer the first k singular values, with (s_1 + ... + s_k) / (s_1 + s_2 + ...) just
        above it, in k (o + d) numbers.

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

    parameters: Literal["keys_and_values", "cross_attention"] = option("keys_and_values", "what is trained beside the words")
    initializer_tokens: tuple[str, ...] = option(("ktn", "pll", "ucd"), "words that new ones start from, in turn; empty: the class names")
    augment: bool = option(True, "draw the size of pictures anew for every sample; they are then encoded at each use")
    compress: float = option(0.0, "part of the sum of each change's singular values that is kept, such as 0.6; 0: all of it")
    prior: Prior = option("images", PRIOR)
    num_class_images: int = option(200, "pictures that the model draws of each class, or of all class_prompts")
    train_batch_size: int = option(2, "pictures that are computed at once")
    learning_rate: float = option(4e-5, "step size")

    architectures: ClassVar = ("sd", "sdxl")
    paper: ClassVar = "arXiv:2212.04488"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.compress < 1:
            raise UserError(f"compress is {self.compress}, needs 0, or a part below 1 such as 0.6; give such a number")

    @contextmanager
    def objective(self, model: Model, task: Task) -> Iterator[tuple[Objective, Callable[[EditInfo], Edit]]]:
        subjects = self.subjects(task)
        words = self.initializer_tokens or [subject.class_name for subject in subjects]
        start = {subject.token: words[i % len(words)] for i, subject in enumerate(subjects)}
        with TokenRows(model, start, seed=self.seed).unlisted() as rows:
            pictures = (Scaled if self.augment else Photos).of(model.arch, subjects, self, TEMPLATES, named)
            weights = WordsAndWeights(rows, FullWeights(model, self.names(model)), lambda change: low_rank(change, self.compress))
            with weights, first_token_detached(model):
                yield self.denoising(model, weights, subjects, pictures), weights.edit

    def names(self, model: Model) -> list[str]:
        """The parameters that are trained."""
        if self.parameters == "keys_and_values":
            return [f"{site}.weight" for site in model.arch.text_linears()]
        cross = tuple(f"{site}." for site in model.arch.cross_attention_sites())
        return [f"{site}.weight" for site in model.arch.lora_targets() if site.startswith(cross)]

    def denoising(self, model: Model, weights: WordsAndWeights, subjects: Sequence[Subject], pictures: Pool) -> Objective:
        """The loss."""
        return PreservedDenoising(model, weights, Prompts(model.arch, self.cache, grad=True), self, subjects, pictures)

    @classmethod
    def example_task(cls, model: Model) -> CustomizeTask:
        """Two subjects, each in a picture that the package ships: the embedded world's sprites."""
        picture = (ASSETS / "atlas.webp",)
        return CustomizeTask((Subject("<toy>", "picture", picture), Subject("<pal>", "cat", picture)))


def low_rank(change: Delta, keep: float) -> LowRank:
    """A change of linear layers as factors, with this part of the sum of their singular values, or all of it (0)."""
    deltas = {name.removesuffix(".weight"): change.delta(name) for name in change.parameter_names()}
    if not keep:
        return LowRank.from_deltas(deltas, change.info)
    return LowRank.from_factors({site: _largest(delta, keep) for site, delta in deltas.items()}, change.info)


def _largest(delta: Tensor, keep: float) -> tuple[Tensor, Tensor]:
    """Factors with as many of the largest singular values as have more than this part of their sum."""
    up, values, down = torch.linalg.svd(delta.double(), full_matrices=False)
    share = values.cumsum(0) / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    rank = int((share <= keep).sum()) + 1
    return (up[:, :rank] * values[:rank]).float(), down[:rank].float()


@contextmanager
def first_token_detached(model: Model) -> Iterator[None]:
    """Within the block no gradient reaches the layers that read text from the first token of a prompt."""

    def detach(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.cat([output[:, :1].detach(), output[:, 1:]], 1)

    handles = [layer.register_forward_hook(detach) for layer in model.arch.text_linears().values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
