"""DreamBooth with LoRA: low-rank changes of the denoiser that draw a subject at a word, while the class stays what it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from toolkit.concepts import CustomizeTask, Subject, Task, named
from toolkit.errors import UserError
from toolkit.method import option
from toolkit.prompt_search import TokenRows
from toolkit.world.scenes import ASSETS
from trainers.loop import Objective
from trainers.parameters import LAYERS, Layers, layers_of
from trainers.preservation import PreservedDenoising, Preserving
from trainers.subjects import Photos, Prompts
from trainers.weights import LoraWeights, Trainable, WordsAndWeights

if TYPE_CHECKING:
    from toolkit.edits.base import Edit, EditInfo
    from toolkit.model import Model

TEMPLATES = ("a photo of {}",)


@dataclass(frozen=True)
class DreamBoothLora(Preserving):
    """DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation, Ruiz et al., arXiv 2208.12242,

    trained as LoRA: Low-Rank Adaptation of Large Language Models, Hu et al., arXiv 2106.09685.

    Equation
        min_{A, B}  E_{z, y, eps, t} || eps - e(z_t, t, c(y)) ||^2  +  prior_weight E_{z', eps, t} || eps - e(z'_t, t, c(y')) ||^2
        where e is the denoiser with each adapted layer W + (lora_alpha / rank) B A, z the latent of a picture of the subject, y a
        prompt with its word and its class, z' a picture of the class that the model drew before, and y' the class alone. On a model
        that predicts velocity the same is done in velocities.

    Shapes
        A: [rank, in], B: [out, rank]. z, eps: [batch, c, h', w'] scaled latents.

    Defaults
        Those of diffusers' train_dreambooth_lora.py and its guide: rank 4, lora_alpha as the rank, step size 1e-4, 500 steps of AdamW,
        constant, one picture in a step, the projections of every attention; num_class_images 100, prior_weight 1. There as here the
        class is not preserved unless asked for (prior).

    Deviations
        The paper trains every weight; layers "all" is nearest to that. prior "prediction" needs no pictures of
        the class: it keeps what the model predicts at the subject's pictures for the class name. With num_vectors the word has
        embeddings of its own, which start at the class name's and are learnt with the change (pivotal tuning, as in diffusers'
        train_dreambooth_lora_sd15_advanced.py), at a step size of their own if words_learning_rate says so; the edit is then a chain of
        the two. A picture's own caption is used when
        it has one, which should have the word in it; else a template with the word and the class. The posterior's mean is encoded,
        once, not a new sample in every step. Timesteps are stratified over the batch by default: each is still uniform. With masks the
        error counts on the subject only.
    """

    layers: Layers = option("attention", f"what is adapted: {LAYERS}")
    rank: int = option(4, "rank of the change of each layer")
    lora_alpha: float | None = option(None, "scale of the change is this divided by the rank; none is the rank")
    train_text_encoder: bool = option(False, "adapt the text encoders too")
    num_vectors: int = option(0, "embedding vectors of the word, which are learnt with the change; 0: tokens that are there spell it")
    words_learning_rate: float | None = option(None, "step size of these vectors; none is learning_rate")
    learning_rate: float = option(1e-4, "step size")

    architectures: ClassVar = ("sd", "sdxl")
    paper: ClassVar = "arXiv:2208.12242"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "rank")
        self.at_least(0, "num_vectors")
        if self.words_learning_rate is not None and not self.num_vectors:
            raise UserError(f"words_learning_rate {self.words_learning_rate} has no effect with num_vectors 0; set that, or leave it out")
        if (self.train_text_encoder or self.num_vectors) and self.cache == "disk":
            what = "train_text_encoder" if self.train_text_encoder else "num_vectors"
            raise UserError(f"cache disk with {what}: prompts change as it learns, and cannot be kept; set cache to memory")

    @contextmanager
    def objective(self, model: Model, task: Task) -> Iterator[tuple[Objective, Callable[[EditInfo], Edit]]]:
        subjects = self.subjects(task)
        encoders = model.arch.encoder_lora_targets() if self.train_text_encoder else {}
        targets = {**layers_of(model.arch, self.layers), **encoders}
        lora = LoraWeights(targets, self.rank, alpha=self.lora_alpha, seed=self.seed)
        with ExitStack() as stack:
            weights: Trainable = lora
            if self.num_vectors:
                start = {subject.token: subject.class_name for subject in subjects}
                rows = TokenRows(model, start, vectors=self.num_vectors, seed=self.seed)
                weights = WordsAndWeights(stack.enter_context(rows.unlisted()), lora)
            learning = self.learning(model, weights, subjects)
            stack.enter_context(weights)
            yield learning, weights.edit

    def learning(self, model: Model, weights: Trainable, subjects: Sequence[Subject]) -> Objective:
        """The loss. The weights act in the model while they are trained."""
        pictures = Photos.of(model.arch, subjects, self, TEMPLATES, named)
        return PreservedDenoising(model, weights, self.text(model), self, subjects, pictures)

    def words_rate(self) -> float:
        return self.learning_rate if self.words_learning_rate is None else self.words_learning_rate

    def text(self, model: Model) -> Prompts:
        """Encoded prompts, with the graph where what encodes them is trained."""
        return Prompts(model.arch, self.cache, grad=self.train_text_encoder or self.num_vectors > 0)

    @classmethod
    def example_task(cls, model: Model) -> CustomizeTask:
        """One picture that the package ships: the embedded world's sprites."""
        return CustomizeTask((Subject("<toy>", "picture", (ASSETS / "atlas.webp",)),))
