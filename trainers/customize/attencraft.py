"""AttenCraft: several subjects out of one picture, with masks that are made of the denoiser's own attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.attention import AttentionMaps
from toolkit.concepts import CustomizeTask, Subject
from toolkit.errors import PalimpsestError, UserError
from toolkit.method import option
from toolkit.runs import seeded
from toolkit.world.scenes import ASSETS
from trainers.attention_masks import apart, minmax, similarity, spread
from trainers.keys_and_values import WithKeysAndValues
from trainers.loop import Batch
from trainers.scenes import OUTSIDE, AttentiveDenoising, Scenes, own_words
from trainers.subjects import Prompts, Samples
from trainers.weights import WordsAndWeights

if TYPE_CHECKING:
    from toolkit.model import Model

TEMPLATE = "a photo of {}"
CALM = 0.3  # masks are made at noise levels below this part of all
TRIES = 20  # noise levels that are tried for the first masks
SAME = 0.8  # structural similarity from which on new masks replace the old ones
TOGETHER = 20  # how often all subjects together are among the prompts that are chosen from, when the others are reweighted


@dataclass(frozen=True)
class AttenCraft(WithKeysAndValues):
    """AttenCraft: Attention-guided Disentanglement of Multiple Concepts for Text-to-Image Customization, Shentu et al., arXiv 2405.17965.

    Equation
        L = || M_S * (eps - e(z_t, t, c(y_S))) ||^2  +  attention_weight / |S|  sum_{i in S} JSD( softmax(A_i), softmax(M_i) )
          + prior_weight L_prior
        with S some of the subjects of a picture, drawn anew for every sample, y_S "a photo of <a> and <b>", A_i where the picture attends
        to the word of i, from 0 to 1, M_i its mask and M_S their union, and JSD the Jensen-Shannon divergence over all places. The
        masks are made before training: see `trainers.attention_masks.spread`, with the prompt's first token for the background. A
        place is a word's when it belongs to it by mask_threshold more than to any other. They are made again every mask_steps steps,
        and replace the old ones when these are still recognised.

    Shapes
        M: [h, w] at the size of the self-attention maps, for the error at that of the latent. z, eps: [batch, c, h', w'].

    Defaults
        The official code's: 500 steps of 1 picture at 5e-5 beside 1 of the class ("a photo at the beach"), keys and values, maps of
        16 x 16 and of 32 x 32 for self-attention, mask_threshold 0.1, mask_steps 20, attention_weight 1, masks of one
        noise level. New words start from their class names. sampling uniform chooses each subject alone as often as all together, as its
        code does; reweighted, the paper's second version, chooses a word the more often the less it is attended to at its mask, and all
        together in one of three.

    Deviations
        Any number of subjects and pictures, where the official code has two in one; with masks given, none are made. The error is
        averaged over the mask unless mask_normalization is image. outside_weight, mask_draws and mask_shares are ours: M is the mean over
        noise levels, and of C_i counts its share in what all subjects' words are attended to. First masks are looked for up to 20 times,
        and not told apart at any of them they are an error that says so; the official code tries once. What the release leaves out of the
        reweighting is chosen by us: shares in proportion to 1 / (attention within the mask).
    """

    sampling: Literal["uniform", "reweighted"] = option("uniform", "how often each subject is learnt alone: equally, or the less, the more")
    attention_weight: float = option(1.0, "weight of words being attended to where their subjects are")
    attention_side: int = option(16, "side of the maps of cross-attention")
    self_attention_side: int = option(32, "side of the maps of self-attention, and of the masks")
    mask_threshold: float = option(0.1, "how much more a place belongs to a word than to the others to be its")
    mask_steps: int = option(20, "steps after which the masks are made again; 0: never")
    mask_draws: int = option(1, "noise levels over which masks are averaged")
    mask_shares: bool = option(False, "weigh how a word is attended to by its share of what all subjects' words are")
    outside_weight: float = option(0.0, OUTSIDE)
    initializer_tokens: tuple[str, ...] = option((), "words that new ones start from, in turn; empty: the class names")
    class_prompts: tuple[str, ...] = option(("a photo at the beach",), "what the model draws for it, in turn; empty: a photo of each class")
    train_batch_size: int = option(1, "pictures that are computed at once")
    learning_rate: float = option(5e-5, "step size")

    paper: ClassVar = "arXiv:2405.17965"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "attention_weight", "mask_threshold", "mask_steps", "outside_weight")
        self.at_least(1, "attention_side", "self_attention_side", "mask_draws")
        if len(self.templates) > 1:
            raise UserError(f"{len(self.templates)} templates given, and masks are made with the words of one; give one")

    def learning(self, model: Model, weights: WordsAndWeights, subjects: Sequence[Subject]) -> Crafting:
        pictures = Scenes(model.arch, subjects, self, self.templates or TEMPLATE, alone_or_all)
        return Crafting(model, weights, self, subjects, pictures)

    @classmethod
    def example_task(cls, model: Model) -> CustomizeTask:
        """Two subjects in the one picture that the package ships, each everywhere: an untrained model's attention tells none apart."""
        picture = (ASSETS / "atlas.webp",)
        return CustomizeTask((Subject("<toy>", "dog", picture, picture), Subject("<pal>", "cat", picture, picture)))


class Crafting(AttentiveDenoising):
    """The masked error, and how far where words are attended to is from the masks."""

    def __init__(self, model: Model, weights: WordsAndWeights, method: AttenCraft, subjects: Sequence[Subject], pictures: Scenes) -> None:
        super().__init__(model, weights, Prompts(model.arch, method.cache, grad=True), method, subjects, pictures)
        self.crafting, self.pictures, self.renewed, self.outside_weight = method, pictures, 0, method.outside_weight
        self.made = [row for row, masks in enumerate(pictures.masks_of) if None in masks]  # pictures whose masks are not the user's
        for row in self.made:
            self._put(row, *self._first(row))

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        every = self.crafting.mask_steps
        if every and batch.step % every == 0 and batch.step != self.renewed:
            self.renewed = batch.step
            for row in self.made:
                self._again(row, batch.step)
        return super().loss(batch)

    def attention(self, samples: Samples, maps: AttentionMaps) -> tuple[Tensor, dict[str, float]]:
        errors = []
        for row, prompt, own in zip(samples.rows, samples.prompts, self.looks(maps, samples, self.crafting.attention_side), strict=True):
            masks = self.pictures.masks_in(row, prompt)
            errors.append(torch.stack([_divergence(seen, mask) for seen, mask in zip(own, masks, strict=True)]).mean())
        value = torch.stack(errors).mean()
        return self.crafting.attention_weight * value, {"attention": value.item()}

    def state(self) -> Any:
        return {"masks": {row: self._masks(row) for row in self.made}, "captions": list(self.pictures.captions)}

    def load_state(self, state: Any) -> None:
        self.pictures.captions = state["captions"]
        for row, masks in state["masks"].items():
            self.pictures.masks_of[row] = list(masks[:, None, None])

    # --- masks --------------------------------------------------------------------------------------------------------
    def _masks(self, row: int) -> Tensor:
        """Those of a picture [k, h', w']."""
        return torch.cat([mask for mask in self.pictures.masks_of[row] if mask is not None])[:, 0]

    def _put(self, row: int, masks: Tensor, scores: Sequence[float]) -> None:
        """Take these masks [k, h', w']. scores: how much each word is attended to at its own."""
        self.pictures.masks_of[row] = list(masks[:, None, None])
        if self.crafting.sampling == "reweighted" and len(scores) > 1:
            parts = {subject: 1 / score for subject, score in zip(self.pictures.members[row], scores, strict=True)}
            captions, chosen = [*self.pictures.captions], list[str]()
            for prompt in dict.fromkeys(captions[row]):
                one, *others = self.pictures.asked[prompt]
                chosen += [prompt] * (TOGETHER if others else max(1, round(2 * TOGETHER * parts[one] / sum(parts.values()))))
            captions[row] = tuple(chosen)
            self.pictures.captions = captions

    def _first(self, row: int) -> tuple[Tensor, list[float]]:
        for number in range(TRIES):
            if (found := self._found(row, "first", number)) is not None:
                return found
        words = " and ".join(subject.token for subject in self.pictures.members[row])
        where = self.pictures.names[row]
        raise PalimpsestError(f"{words} are not told apart by attention in {where}; give masks, or other class names")

    def _again(self, row: int, step: int) -> None:
        """Make the masks of a picture anew, and take them if the old ones are recognised in them."""
        found = self._found(row, "again", step)
        if found is not None and bool((similarity(found[0], self._masks(row)) >= SAME).all()):
            self._put(row, *found)

    def _found(self, row: int, *key: str | int) -> tuple[Tensor, list[float]] | None:
        """Masks [k, h', w'] at the latent's places from mask_draws noise levels, and how much their words are attended to there."""
        method, arch, subjects = self.crafting, self.arch, self.pictures.members[row]
        draw, latent = seeded("attencraft masks", method.seed, row, *key), self.pictures.encoded(row)[0]
        prompt = self.pictures.whole(row)
        text, words = arch.encode([prompt]), own_words(arch, prompt, subjects)
        tokens = torch.cat([words, (torch.arange(words.shape[1], device=words.device) == 0)[None]])
        sides, rivals, found = (method.attention_side, method.self_attention_side), len(subjects) if method.mask_shares else 0, []
        for _ in range(method.mask_draws):
            t = torch.randint(int(CALM * arch.train_timesteps), (1,), generator=draw).to(latent.device)
            noisy = arch.add_noise(latent, torch.randn(latent.shape, generator=draw).to(latent), t)
            found.append(torch.stack(spread(arch, noisy, t, text, tokens, sides, rivals)))
        belongs, looked = torch.stack(found).mean(0)
        masks = apart(minmax(belongs.flatten(1)).view_as(belongs), method.mask_threshold)
        if masks is None:
            return None
        scores = (looked[:-1] * masks).flatten(1).sum(1) / masks.flatten(1).sum(1)
        return F.interpolate(masks[:, None], latent.shape[2:], mode="bilinear")[:, 0].cpu(), scores.clamp(min=1e-6).tolist()


def alone_or_all(count: int) -> list[tuple[int, ...]]:
    """Each subject alone, and all together."""
    return [*((i,) for i in range(count)), *([tuple(range(count))] if count > 1 else [])]


def _divergence(seen: Tensor, mask: Tensor) -> Tensor:
    """The Jensen-Shannon divergence of softmax over all places of a map [h, w], from 0 to 1, and of a mask [1, 1, h', w']."""
    mask = F.interpolate(mask.to(seen), seen.shape, mode="bilinear").flatten()
    p, q = minmax(seen.flatten()).log_softmax(0), mask.log_softmax(0)
    middle = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))
    return (F.kl_div(middle, p, reduction="sum", log_target=True) + F.kl_div(middle, q, reduction="sum", log_target=True)) / 2
