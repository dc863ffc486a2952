"""Words that are learnt together with the layers that read them, as Custom Diffusion and what is built on it do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from toolkit.concepts import CustomizeTask, Subject, Task
from toolkit.edits.low_rank import LowRank
from toolkit.errors import UserError
from toolkit.method import option
from toolkit.prompt_search import TokenRows
from toolkit.world.scenes import ASSETS
from trainers.loop import Objective
from trainers.parameters import LAYERS, Layers, layers_of
from trainers.preservation import PRIOR, Preserving, Prior
from trainers.weights import FullWeights, LoraWeights, Trainable, WordsAndWeights

if TYPE_CHECKING:
    from toolkit.edits.base import Edit, EditInfo
    from toolkit.edits.delta import Delta
    from toolkit.model import Model


@dataclass(frozen=True)
class WithKeysAndValues(Preserving, ABC):
    """Base of the methods that learn words and the keys and values of the cross-attention, or all of it.

    The edit is a chain: the words, then a change that is stored low-rank or dense, whichever is smaller, and loads as a LoRA. compress
    keeps of the change U S V^T of a layer [o, d] the first k singular values, with (s_1 + ... + s_k) / (s_1 + s_2 + ...) just above
    it, in k (o + d) numbers. The papers train one embedding and the whole keys and values; num_vectors, parameters and rank are ours, for
    what these cannot draw.
    """

    parameters: Layers = option("keys_and_values", f"what is trained beside the words: {LAYERS}")
    rank: int = option(0, "train low-rank changes of this rank instead of the weights themselves; 0: these")
    num_vectors: int = option(1, "embedding vectors of each word")
    initializer_tokens: tuple[str, ...] = option(("ktn", "pll", "ucd"), "words that new ones start from, in turn; empty: the class names")
    compress: float = option(0.0, "part of the sum of each change's singular values that is kept, such as 0.6; 0: all of it")
    prior: Prior = option("images", PRIOR)
    num_class_images: int = option(200, "pictures that the model draws of each class, or of all class_prompts")
    train_batch_size: int = option(2, "pictures that are computed at once")
    learning_rate: float = option(4e-5, "step size")

    architectures: ClassVar = ("sd", "sdxl")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "rank")
        self.at_least(1, "num_vectors")
        if self.rank and self.compress:
            raise UserError(
                f"compress {self.compress} has no effect with rank {self.rank}, which is what is stored; leave one of the two out"
            )
        if not 0 <= self.compress < 1:
            raise UserError(f"compress is {self.compress}, needs 0, or a part below 1 such as 0.6; give such a number")

    @abstractmethod
    def learning(self, model: Model, weights: WordsAndWeights, subjects: Sequence[Subject]) -> Objective:
        """The loss. The words are in the model already; the weights act in it while they are trained."""

    @contextmanager
    def objective(self, model: Model, task: Task) -> Iterator[tuple[Objective, Callable[[EditInfo], Edit]]]:
        subjects = self.subjects(task)
        words = self.initializer_tokens or [subject.class_name for subject in subjects]
        start = {subject.token: words[i % len(words)] for i, subject in enumerate(subjects)}
        with TokenRows(model, start, vectors=self.num_vectors, seed=self.seed).unlisted() as rows:
            weights = WordsAndWeights(rows, *self.weights(model))
            learning = self.learning(model, weights, subjects)
            with weights, first_token_detached(model):
                yield learning, weights.edit

    def weights(self, model: Model) -> tuple[Trainable, Callable[[Any], Edit]]:
        """What is trained beside the words, and what becomes of its change."""
        layers = layers_of(model.arch, self.parameters)
        if self.rank:
            return LoraWeights(layers, self.rank, seed=self.seed), lambda change: change
        return FullWeights(model, [f"{site}.weight" for site in layers]), lambda change: low_rank(change, self.compress)

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
