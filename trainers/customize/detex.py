"""DETEX: a word for the subject, and words of each picture's own for its pose and its background, so that these stay out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.concepts import Subject, Task, named
from toolkit.edits.base import EditInfo
from toolkit.errors import UserError
from toolkit.method import option
from toolkit.prompt_search import LiveTokens, initial_rows
from toolkit.runs import seeded
from trainers.image_features import CLIP, features_of, two_layers
from trainers.keys_and_values import WithKeysAndValues
from trainers.loop import Objective
from trainers.preservation import PreservedDenoising
from trainers.subjects import Photos, Prompts, Seen
from trainers.weights import WithAuxiliary, WordsAndWeights

if TYPE_CHECKING:
    from toolkit.edits.base import Edit
    from toolkit.model import Model

TEMPLATES = ("a photo of a {}",)
ATTRIBUTES = ("pose", "background")  # the words that a picture's own words stand before


@dataclass(frozen=True)
class Detex(WithKeysAndValues):
    """Decoupled Textual Embeddings for Customized Image Generation, Cai et al., arXiv 2312.11826 (AAAI 2024).

    Equation
        min_{v, W, g}  E_{i, S, eps, t}  sum(m_S * (eps - e(z_t, t, c(y_S; v, g_pose(f_i), g_background(f_i))))^2) / sum(m_S)  +  L_prior
        with v the embedding of the subject's word, which all pictures share; f_i a picture's CLIP feature, which the attribute mappers
        g turn into embeddings of two words [P_i] and [B_i] of that picture alone; W the keys and values of the cross-attention; S which of
        the two the prompt has, drawn anew for every sample: "a photo of a [P_i] pose <toy> dog on a [B_i] background"; m_S the
        subject's mask when [B_i] is left out, else everywhere; and L_prior Custom Diffusion's. On a model that predicts velocity the
        same is done in velocities.

    Shapes
        f: [k], unit length. g(f): [d] for each text encoder, d the width of its token embedding. W, v: as in `custom_diffusion`.

    Defaults
        What the paper trains beside words is Custom Diffusion's, and so are here the steps, the step size, the class's pictures and what
        words start from. Its own constants were not at hand. Chosen by us: g is a perceptron with one hidden layer, as wide as f, whose
        last layer starts at zero with the embedding of "pose" or "background" as its bias; the wording; each choice of S is as likely
        as the others. Its CLIP is OpenAI's ViT-L/14, in open_clip hf-hub:timm/vit_large_patch14_clip_224.openai, its model SD 1.4.

    Deviations
        Without masks [B_i] is never left out: the picture would be learnt with its background as the subject's. The paper has a mask of
        every picture, and a cut-out, which is not used here. A caption of a picture may be given: pose and background are put around
        the word and behind everything there too, so that it should say neither. prior "prediction" is refused: the model before does
        not know the pictures' own words. The edit is the word with the keys and values; mappers are not kept, so that a picture's
        pose or background cannot be asked for again. Sizes of pictures are not drawn: f is that of the whole picture. What
        `custom_diffusion` says of pictures, words and steps holds here too.
    """

    clip: str | None = option(None, f"CLIP {CLIP}")

    paper: ClassVar = "arXiv:2312.11826"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prior == "prediction":
            raise UserError("prior is prediction, and the model before does not know the pictures' own words; give images or distillation")

    @contextmanager
    def objective(self, model: Model, task: Task) -> Iterator[tuple[Objective, Callable[[EditInfo], Edit]]]:
        with super().objective(model, task) as (learning, edit):
            assert isinstance(learning, Decoupling)
            with learning.mappers.words.unlisted(model):
                yield learning, edit

    def learning(self, model: Model, weights: WordsAndWeights, subjects: Sequence[Subject]) -> Decoupling:
        pictures = OwnWords.of(model.arch, subjects, self, TEMPLATES, named)
        pictures.add_words([subject for subject in subjects for _ in subject.images])
        mappers = Mappers(model, features_of(model, pictures, self.clip), self.seed)
        return Decoupling(model, weights, mappers, self, subjects, pictures)


class OwnWords(Photos):
    """Pictures whose prompts may have the picture's own words for pose and background.

    whole: the prompts with which the error counts everywhere.
    """

    whole: frozenset[str] = frozenset()

    def add_words(self, shown: Sequence[Subject]) -> None:
        """Make of each prompt those with and without the picture's own words. shown: of each picture the subject."""
        captions, whole = [], set[str]()
        for row, (subject, given, mask) in enumerate(zip(shown, self.captions, self.masks, strict=True)):
            choices = []
            posed, behind = f"{own_word('pose', row)} pose {subject.token}", f" on a {own_word('background', row)} background"
            for caption, token, end in product(given, (subject.token, posed), ("", behind) if mask else (behind,)):
                choices.append(caption.replace(subject.token, token) + end)
                whole |= {choices[-1]} if end else set()
            captions.append(tuple(choices))
        self.captions, self.whole = captions, frozenset(whole)

    def at(self, row: int, prompt: str, draw: torch.Generator) -> Seen:
        seen = super().at(row, prompt, draw)
        return Seen(prompt, seen.latent, torch.ones_like(seen.weight)) if prompt in self.whole else seen


class Mappers(nn.Module):
    """Each picture's own words: for every attribute a perceptron, of the pictures' features, for each text encoder.

    words: what makes a model know them; their rows are computed whenever they are read. features: [pictures, k].
    """

    def __init__(self, model: Model, features: Tensor, seed: int) -> None:
        super().__init__()
        embeddings, tokenizers = model.arch.token_embeddings(), model.arch.tokenizers()
        self.of = nn.ModuleDict()
        for part, embedding in embeddings.items():
            start = {word: initial_rows(embedding, tokenizers[part], word, 1, seeded("unused")) for word in ATTRIBUTES}
            self.of[part] = _OfOneEncoder(F.normalize(features, dim=-1), start, seed, part)
        names = [own_word(attribute, row) for attribute in ATTRIBUTES for row in range(len(features))]
        widths = {part: embedding.weight.shape[1] for part, embedding in embeddings.items()}
        still = LiveTokens.from_rows({name: {part: torch.zeros(1, width) for part, width in widths.items()} for name in names})
        self.words = LiveTokens(still.info, still.tokens, self.of)


class _OfOneEncoder(nn.Module):
    """Rows [attributes * pictures, d] for one text encoder. start: attribute -> the row that all of its words are at first [1, d]."""

    features: Tensor

    def __init__(self, features: Tensor, start: dict[str, Tensor], seed: int, part: str) -> None:
        super().__init__()
        self.register_buffer("features", features, persistent=False)
        self.mappers = nn.ModuleList()
        for attribute, row in start.items():
            mapper = two_layers(features.shape[1], row.shape[1], "mapper", seed, part, attribute)
            last: nn.Linear = mapper[-1]  # pyright: ignore[reportAssignmentType]
            with torch.no_grad():
                last.weight.zero_()
                last.bias.copy_(row[0])
            self.mappers.append(mapper.to(features.device))

    def forward(self) -> Tensor:
        return torch.cat([mapper(self.features) for mapper in self.mappers])


class Decoupling(PreservedDenoising):
    """Custom Diffusion's loss at prompts that name what is the picture's own."""

    def __init__(
        self,
        model: Model,
        weights: WordsAndWeights,
        mappers: Mappers,
        method: Detex,
        subjects: Sequence[Subject],
        pictures: OwnWords,
    ) -> None:
        text = Prompts(model.arch, method.cache, grad=True)
        super().__init__(model, WithAuxiliary(weights, mappers), text, method, subjects, pictures)
        self.mappers = mappers


def own_word(attribute: str, row: int) -> str:
    """What a picture's word for an attribute is called while it is learnt."""
    return f"<{attribute}-{row}>"
