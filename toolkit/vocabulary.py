"""Finding prompts of existing words against a loss: what words there are, words that stand open, and searches over them.

A word here is one that every tokenizer of the model reads as one token. Words in a row, with spaces between them, are read
as the same tokens again, since no tokenizer merges over a space: whatever is found can be typed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError
from toolkit.prompt_search import LiveTokens

if TYPE_CHECKING:
    from toolkit.arch.text import Text
    from toolkit.model import Model

WORD = re.compile("[a-z]{2,}")  # what can be read; single letters and digits are bytes of the alphabet, most of them never trained
SHORT = 3  # letters; a name of fewer is looked for as a whole word only


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The words that a prompt is searched in; a choice of them is a tensor of places in `words`.

    words [V]. rows: component -> their embedding rows [V, d], without a gradient.
    """

    words: tuple[str, ...]
    rows: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: Model, without: Sequence[str] = ()) -> Self:
        """All words of a model's tokenizers, but those that `without` (names, which may be of several words) is spelled with.

        A word that has one of the names' words inside it ("handgun" for "gun") is left out too. No words left is a UserError.
        """
        tokenizers = list(model.arch.tokenizers().items())
        ids: dict[str, dict[str, int]] = {}
        known: list[str] | None = None
        for part, tokenizer in tokenizers:
            if known is None:
                texts = tokenizer.batch_decode([[i] for i in sorted(tokenizer.get_vocab().values())], skip_special_tokens=True)
                known = [word for word in dict.fromkeys(map(str.strip, texts)) if WORD.fullmatch(word)]
            read = tokenizer(known, add_special_tokens=False).input_ids if known else []
            ids[part] = {word: tokens[0] for word, tokens in zip(known, read, strict=True) if len(tokens) == 1}
            known = [word for word in known if word in ids[part]]
        names = {part for name in without for part in re.findall("[a-z0-9]+", name.lower())}
        words = tuple(word for word in known or () if not any(word == name or (len(name) >= SHORT and name in word) for name in names))
        if not words:
            raise UserError(f"no words of {model.source} are left to search without {', '.join(without)}; attack with fewer synonyms")
        tables = {part: embedding.weight.detach() for part, embedding in model.arch.token_embeddings().items()}
        return cls(words, {part: table[[ids[part][word] for word in words]].float() for part, table in tables.items()})

    def __len__(self) -> int:
        return len(self.words)

    def texts(self, choices: Tensor) -> list[str]:
        """The prompts [n] that choices [n, k] say."""
        return [" ".join(self.words[i] for i in choice) for choice in choices.tolist()]

    def random(self, shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
        """Choices, each of any word alike."""
        return torch.randint(len(self), shape, generator=draw)

    def nearest(self, rows: Mapping[str, Tensor]) -> Tensor:
        """The choices [...] whose rows are closest to rows [..., d] by the cosine, summed over the components."""
        near = [F.normalize(given, dim=-1) @ F.normalize(self.rows[part], dim=-1).T for part, given in rows.items()]
        return torch.stack(near).sum(0).argmax(-1)


class Slots:
    """Words of `length` tokens each that stand open in prompts, within a `with` block: what they mean is given for each encoding.

        with Slots(model, length=5, count=2) as slots:
            text = slots.encode(["<slot-0> a dog", "<slot-1> a cat"], rows)  # differentiable with respect to rows

    After the block tokenizers and embeddings are what they were before it.
    """

    def __init__(self, model: Model, length: int, count: int = 1) -> None:
        self._model = model
        self.words = [f"<slot-{i}>" for i in range(count)]
        embeddings = model.arch.token_embeddings()
        empty = {part: torch.zeros(length, embedding.embedding_dim) for part, embedding in embeddings.items()}
        start = TokenEdit.from_rows(dict.fromkeys(self.words, empty))
        self._given = {part: _Given() for part in embeddings}
        self._edit = LiveTokens(start.info, start.tokens, nn.ModuleDict(self._given))

    def encode(self, prompts: Sequence[str], rows: Mapping[str, Tensor]) -> Text:
        """Prompts with the slots' words in them. rows: component -> [count, length, d]."""
        for part, given in rows.items():
            self._given[part].rows = given.flatten(0, 1)
        return self._model.arch.encode(prompts, grad=True)

    def __enter__(self) -> Self:
        self._model.attach(self._edit)
        for part, given in self._given.items():
            given.rows = torch.cat([tokens[part] for tokens in self._edit.tokens.values()])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._model.detach(self._edit)


class _Given(nn.Module):
    """Rows [n, d] that somebody else computes."""

    rows: Tensor

    def forward(self) -> Tensor:
        return self.rows


# --- relaxed choices --------------------------------------------------------------------------------------------------
class StraightThrough(torch.autograd.Function):
    """One-hot rows [..., V] of choices [...]; the gradient of the relaxed weights is theirs, cut off at 1 (UnlearnDiffAtk's)."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, choice: Tensor) -> Tensor:
        return F.one_hot(choice, weights.shape[-1]).to(weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return F.hardtanh(gradients[0]), None


def onto_simplex(weights: Tensor) -> Tensor:
    """The nearest rows [..., V] that are not negative and add up to 1 (Duchi et al., ICML 2008)."""
    ranked = weights.sort(descending=True).values
    excess = (ranked.cumsum(-1) - 1) / torch.arange(1, weights.shape[-1] + 1, device=weights.device)
    kept = (ranked > excess).sum(-1, keepdim=True)
    return (weights - excess.gather(-1, kept - 1)).clamp(min=0)


# --- searches -----------------------------------------------------------------------------------------------------------
def swaps(gradient: Tensor, choice: Tensor, count: int, topk: int, draw: torch.Generator) -> Tensor:
    """Candidates [count, k] of greedy coordinate gradient (Zou et al., arXiv 2307.15043): each has one word of the choice replaced.

    gradient [k, V]: of the loss with respect to the choice's one-hot rows. topk: a word's replacement is any of so many of the lowest
    gradient alike. The places that are replaced are spread evenly.
    """
    best = (-gradient).topk(min(topk, gradient.shape[1])).indices.cpu()
    places = torch.arange(count) * len(choice) // count
    picked = torch.randint(best.shape[1], (count,), generator=draw)
    candidates = choice.repeat(count, 1)
    candidates[torch.arange(count), places] = best[places, picked]
    return candidates


def genetic(
    loss: Callable[[Tensor], Tensor],
    population: Tensor,
    words: int,
    *,
    generations: int,
    crossover: float,
    mutation: float,
    draw: torch.Generator,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, list[float]]:
    """The choice [k] of the lowest loss that a genetic search finds from a population [n, k], and the lowest loss of each generation.

    loss: choices [m, k] -> [m]; it is asked once for each. In each generation the better half stays; each of it has, with the
    probability `crossover`, two children with another of it, cut at one place; then all but the best change one word with the
    probability `mutation`. progress: called with how many generations are done, of how many.
    """
    size, length = population.shape
    losses, lowest = loss(population).to(population.device), []
    for generation in range(generations):
        order = losses.argsort()[: size // 2]
        parents, kept = population[order], losses[order]
        lowest.append(float(kept[0]))
        pairs = torch.rand(len(parents), generator=draw) < crossover
        first, second = parents[pairs], parents[torch.randint(len(parents), (int(pairs.sum()),), generator=draw)]
        head = torch.arange(length) < torch.randint(1, length + 1, (len(first), 1), generator=draw)
        population = torch.cat([parents, torch.where(head, first, second), torch.where(head, second, first)])
        changed = torch.rand(len(population), generator=draw) < mutation
        changed[0] = False
        place = torch.randint(length, (len(population),), generator=draw)
        word = torch.randint(words, (len(population),), generator=draw)
        population[changed, place[changed]] = word[changed]
        changed[len(parents) :] = True
        losses = torch.cat([kept, kept.new_zeros(len(population) - len(parents))])
        losses[changed] = loss(population[changed]).to(losses)
        if progress:
            progress(generation + 1, generations)
    best = int(losses.argmin())
    return population[best], [*lowest, float(losses[best])]
