"""Prior preservation: what the model drew of the class before, it is to draw after it has learnt a subject of it (DreamBooth)."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.arch.text import Text
from toolkit.concepts import Subject
from toolkit.errors import UserError
from toolkit.method import option
from toolkit.pictures import captioned, pictures
from toolkit.prompt_search import TokenRows
from trainers.loop import Batch, LoopConfig
from trainers.photos import drawings
from trainers.subjects import Denoising, Drawings, Learned, Photos, Pool, Prompts, Samples
from trainers.weights import Trainable

if TYPE_CHECKING:
    from toolkit.model import Model

CLASS = "a photo of a {}"  # the prompt of pictures of a class
DRAWING = ("class_images", "class_prompts", "num_class_images", "class_image_steps", "class_image_guidance")  # options of pictures
OF_PICTURES = ("images", "distillation")
Prior = Literal["none", "images", "prediction", "distillation"]
PRIOR = "what keeps the class: images of it, the model's own prediction at the subject's images, or at images of the class (distillation)"


@dataclass(frozen=True)
class Preserving(Learned, ABC):
    """Base of the methods that learn subjects and can preserve the class."""

    prior: Prior = option("none", PRIOR)
    prior_weight: float = option(1.0, "weight of that")
    class_images: str | None = option(None, "folder of pictures of the class; none: the model draws them")
    class_prompts: tuple[str, ...] = option((), "what the model draws instead, in turn; empty: a photo of each class")
    num_class_images: int = option(100, "pictures that the model draws of each class, or of all class_prompts")
    class_image_steps: int = option(20, "steps of each of them")
    class_image_guidance: float | None = option(None, "guidance scale of each of them; none is the model's own")

    def __post_init__(self) -> None:
        super().__post_init__()
        unused = self.changed((*DRAWING, "prior_weight"))
        if self.prior == "prediction":
            unused = [name for name in unused if name != "prior_weight"]
        if self.prior in OF_PICTURES:
            unused = [name for name in unused if self.class_images is not None and name in DRAWING[1:]]
        if unused:
            beside = f"prior {self.prior}" + (" and class_images" if self.prior in OF_PICTURES else "")
            raise UserError(f"{', '.join(unused)} given with {beside}, where it has no effect; leave it out")
        if min(self.num_class_images, self.class_image_steps) < 1 or self.prior_weight <= 0:
            given = (
                f"num_class_images {self.num_class_images}, class_image_steps {self.class_image_steps}, prior_weight {self.prior_weight}"
            )
            raise UserError(f"{given}; needs at least 1, at least 1, and more than 0")

    def words_rate(self) -> float:
        """The step size of words' embeddings, where some are trained beside weights."""
        return self.learning_rate


class ClassPictures(Drawings):
    """What a model draws of prompts, each with a seed of its own."""

    def __init__(self, model: Model, prompts: Sequence[str], method: Preserving) -> None:
        latents = drawings(
            model,
            prompts,
            first_seed=method.seed,
            steps=method.class_image_steps,
            guidance=method.class_image_guidance,
            amp=method.draws_in_bf16(model),
            title="class pictures",
        )
        super().__init__(model.arch, prompts, latents)


class PreservedDenoising(Denoising):
    """The denoiser's error on a subject's pictures, and on the class, or how far what it predicts for the class has moved.

    "images": L + prior_weight E || eps - eps_theta(z'_t, t, c(class)) ||^2 over pictures z' of the class. "prediction": needs none;
    L + prior_weight E || eps*(z_t, t, c(y')) - eps_theta(z_t, t, c(y')) ||^2 with z_t that of the subject's picture, y' its prompt with the
    class name for the word, and eps* the model before. "distillation" is that at pictures of the class and their own prompts, so that
    what is to stay may be anything, by `class_prompts`; unlike with "images", there is nothing to learn from them.
    """

    module: Trainable

    def __init__(
        self,
        model: Model,
        weights: Trainable,
        text: Callable[[Sequence[str]], Text],
        method: Preserving,
        subjects: Sequence[Subject],
        pictures: Pool,
    ) -> None:
        super().__init__(weights, pictures, text, method)
        self.preserving, self.subjects = method, subjects
        self.known = class_pictures(model, subjects, method) if method.prior in OF_PICTURES else None
        self.before = Prompts(model.arch, method.cache)  # what the text encoders say without what is trained

    def optimizer(self, parameters: list[nn.Parameter], config: LoopConfig) -> torch.optim.Optimizer:
        words = {id(row) for part in self.module.modules() if isinstance(part, TokenRows) for row in part.parameters()}
        others = [parameter for parameter in parameters if id(parameter) not in words]
        if (rate := self.preserving.words_rate()) == config.learning_rate or not words or not others:
            return super().optimizer(parameters, config)
        made = super().optimizer(others, config)
        made.add_param_group({"params": [parameter for parameter in parameters if id(parameter) in words], "lr": rate})
        return made

    def loss_of(self, samples: Samples, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        if self.preserving.prior == "prediction":
            learnt, kept = self._without_pictures(samples)
        elif self.known is not None:
            known = self.known.draw(f"{self.method.name()} class", self.method, batch)
            learnt, kept = self._with_pictures(samples, known)
        else:
            return super().loss_of(samples, batch)
        return learnt + self.preserving.prior_weight * kept, {"subject": learnt.item(), "class": kept.item()}

    def _without_pictures(self, samples: Samples) -> tuple[Tensor, Tensor]:
        prompts = [without_token(prompt, self.subjects) for prompt in samples.prompts]
        noisy, count = self.noisy(samples), len(samples.rows)
        after = self.output(torch.cat([noisy, noisy]), torch.cat([samples.t, samples.t]), [*samples.prompts, *prompts])
        return self.learnt(samples, after[:count]), self._moved(after[count:], noisy, samples.t, prompts)

    def _with_pictures(self, samples: Samples, known: Samples) -> tuple[Tensor, Tensor]:
        noisy, count = (self.noisy(samples), self.noisy(known)), len(samples.rows)
        if noisy[0].shape[2:] != noisy[1].shape[2:]:
            ours, theirs = (self.output(z, one.t, one.prompts) for z, one in zip(noisy, (samples, known), strict=True))
        else:
            both = self.output(torch.cat(noisy), torch.cat([samples.t, known.t]), [*samples.prompts, *known.prompts])
            ours, theirs = both[:count], both[count:]
        if self.preserving.prior == "distillation":
            return self.learnt(samples, ours), self._moved(theirs, noisy[1], known.t, known.prompts)
        return self.learnt(samples, ours), self.error(known, theirs)

    def _moved(self, output: Tensor, noisy: Tensor, t: Tensor, prompts: Sequence[str]) -> Tensor:
        """How far an output is from that of the model before: the mean square."""
        return F.mse_loss(output, self.said_before(noisy, t, prompts))

    @torch.no_grad()
    def said_before(self, noisy: Tensor, t: Tensor, prompts: Sequence[str]) -> Tensor:
        """What the model predicts without what is trained."""
        with self.module.off():
            return self.arch.predict(noisy, t, self.before(prompts))


def class_pictures(model: Model, subjects: Sequence[Subject], method: Preserving) -> Pool:
    """Pictures of each subject's class: the user's, or what the model draws."""
    names = list(dict.fromkeys(subject.class_name for subject in subjects))
    if method.class_images is None:
        prompts = method.class_prompts or [CLASS.format(name) for name in names]
        return ClassPictures(
            model, list(islice(cycle(prompts), method.num_class_images * (1 if method.class_prompts else len(names)))), method
        )
    files, captions = captioned(pictures(method.class_images), method.class_images)
    if not captions and len(names) > 1:
        raise UserError(f"class_images of {len(names)} classes have no captions; give a metadata.jsonl, or no class_images")
    prompts = captions or [CLASS.format(names[0])] * len(files)
    return Photos(model.arch, files, [(prompt,) for prompt in prompts], [None] * len(files), method)


def without_token(prompt: str, subjects: Sequence[Subject]) -> str:
    """A prompt with the class name for each subject's word, or for the word and the class name after it."""
    for subject in subjects:
        prompt = prompt.replace(f"{subject.token} {subject.class_name}", subject.class_name).replace(subject.token, subject.class_name)
    return prompt
