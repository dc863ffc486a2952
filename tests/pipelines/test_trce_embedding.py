"""TRCE's closed form on a tiny Stable Diffusion, against its equation written out prompt by prompt and row by row."""

import pytest
import torch
from torch import Tensor

from pipelines.closed_form.rows import Placed, TaskRows, encode_task
from pipelines.closed_form.trce_embedding import TRCEEmbedding
from tests.pipelines.reference import assert_follows, layers
from toolkit.concepts import Concept, EraseTask
from toolkit.errors import UserError
from toolkit.model import Model

TASK = EraseTask((Concept("elephant", ("cow",), "big dog"), Concept("monet", kind="style")), ("bird",), ("{}", "a {} here"))
PAIRS = (
    ("elephant", "big dog"),
    ("cow", "big dog"),
    ("a elephant here", "a big dog here"),
    ("a cow here", "a big dog here"),
    ("monet", ""),
    ("a monet here", "a here"),
)
SUBJECTS = {"elephant": "elephant", "cow": "cow", "monet": "monet"}
KEPT = ("", "bird", "a bird here")


def encoded(model: Model, prompt: str) -> tuple[Tensor, int]:
    """Rows [77, d], and how many tokens come before EOT."""
    text = model.arch.encode([prompt])
    ids = text.ids[0].tolist()
    return text.hidden[0].double(), ids.index(model.arch.tokenizers()["text_encoder"].eos_token_id)


def subject_rows(model: Model, prompt: str) -> range:
    """Where the concept's tokens are, by the tokens of what stands before it and of itself."""
    word = next(word for word in SUBJECTS if word in prompt.split())
    before = encoded(model, prompt.split(word)[0].strip())[1]
    return range(before, before + encoded(model, word)[1] - 1)


def naive(model: Model, weight: Tensor, weights: tuple[float, float, float, float], s: float, lamb: float) -> Tensor:
    """The edited weight of one layer."""
    left, right = lamb * weight, lamb * torch.eye(weight.shape[1], dtype=torch.float64)
    sot, eot, pad, keyword = weights
    for old, new in PAIRS:
        (c, end), (g, new_end) = encoded(model, old), encoded(model, new)
        rows = [(c[0], g[0], sot), (c[end], g[new_end], eot), (c[76], g[76], pad * (77 - end - 1))]
        rows += [(c[row], g[76], keyword) for row in subject_rows(model, old)]
        for source, target, w in rows:
            left = left + w / len(PAIRS) * torch.outer(weight @ target, source)
            right = right + w / len(PAIRS) * torch.outer(source, source)
    for prompt in KEPT:
        for k in encoded(model, prompt)[0]:
            left = left + s / len(KEPT) * torch.outer(weight @ k, k)
            right = right + s / len(KEPT) * torch.outer(k, k)
    return left @ torch.linalg.inv(right)


@pytest.mark.parametrize("weights", [(0.0, 1.0, 0.0, 0.0), (0.5, 1.0, 0.2, 0.7), (0.0, 0.0, 0.0, 2.0)])
def test_it_is_the_weighted_sum_over_prompts(tiny64: Model, weights: tuple[float, float, float, float]) -> None:
    names = ("sot_weight", "eot_weight", "padding_weight", "keyword_weight")
    edit = TRCEEmbedding(**dict(zip(names, weights, strict=True)), preserve_scale=0.03, lamb=0.2).fit(tiny64, TASK)
    wanted = {site: naive(tiny64, weight, weights, 0.03, 0.2) - weight for site, weight in layers(tiny64).items()}
    assert_follows(edit, tiny64, wanted)


def test_the_end_of_text_is_found_by_tokens_and_not_by_words(tiny: Model) -> None:
    """The default moves one row of each prompt, and "elephant" has more tokens than words."""
    text = encode_task(tiny.arch, TASK, "template")["hidden"]
    source, target = TRCEEmbedding().rows_of(*text.pairs[0])
    (own, end), (other, other_end) = encoded(tiny, "elephant"), encoded(tiny, "big dog")
    assert end > 2 and torch.equal(source, own[end][None]) and torch.equal(target, other[other_end][None])


def test_the_end_of_text_answers_as_the_harmless_one_as_nothing_else_weighs(tiny: Model) -> None:
    task = EraseTask((Concept("elephant", anchor="dog"),), (), ("a {}",))
    edit = TRCEEmbedding(preserve_scale=0.0, lamb=1e-6).fit(tiny, task)
    (c, end), (g, other) = encoded(tiny, "a elephant"), encoded(tiny, "a dog")
    for site, linear in tiny.arch.text_linears().items():
        weight = linear.weight.detach().double()
        changed = (weight + edit.delta(site).double()) @ c[end]
        assert (changed - weight @ g[other]).norm() <= 1e-4 * (weight @ (c[end] - g[other])).norm()


def test_bos_stays_as_its_weight_grows(tiny: Model) -> None:
    bos = encoded(tiny, "")[0][0].float()
    drift = []
    for weight in (0.0, 1.0, 1e3, 1e6):
        edit = TRCEEmbedding(sot_weight=weight, preserve_scale=0.0).fit(tiny, TASK)
        drift.append(sum(float((edit.delta(site) @ bos).norm()) for site in tiny.arch.text_linears()))
    assert drift == sorted(drift, reverse=True) and drift[-1] < 1e-4 * drift[0]


def random_rows(width: int, pairs: int, kept: int, length: int = 9) -> TaskRows:
    make = torch.Generator().manual_seed(0)

    def prompt() -> Placed:
        return Placed(torch.randn(length, width, generator=make), 1, 3, (0, 1, 2, 3))

    return TaskRows(tuple((prompt(), prompt()) for _ in range(pairs)), tuple(prompt() for _ in range(kept)), (prompt(),))


def test_its_gradient_is_zero() -> None:
    text = random_rows(24, 5, 2)
    method = TRCEEmbedding(padding_weight=0.3, keyword_weight=0.4, preserve_scale=0.05)
    d = method.change_of(text).matrix() - torch.eye(24)
    source, target = map(torch.cat, zip(*(method.rows_of(*pair) for pair in text.pairs), strict=True))
    keep = text.keep("all").double()
    erase = (source @ d.T - (target - source)).T @ source / 5
    rest = 0.05 / 3 * d @ keep.T @ keep + 0.5 * d
    assert (erase + rest).norm() <= 1e-8 * rest.norm()


@pytest.mark.parametrize("out", [320, 640, 1280])
def test_layers_as_wide_as_stable_diffusions(out: int) -> None:
    text, weight = random_rows(768, 20, 6, 77), torch.randn(out, 768, generator=torch.Generator().manual_seed(1)).double()
    method = TRCEEmbedding(padding_weight=0.1, keyword_weight=0.5, preserve_scale=0.2)
    source, target = map(torch.cat, zip(*(method.rows_of(*pair) for pair in text.pairs), strict=True))
    keep, one = text.keep("all").double(), torch.eye(768, dtype=torch.float64)
    left = weight @ (target.T @ source / 20 + 0.2 / 7 * keep.T @ keep + 0.5 * one)
    wanted = left @ torch.linalg.inv(source.T @ source / 20 + 0.2 / 7 * keep.T @ keep + 0.5 * one)
    assert (weight @ method.change_of(text).matrix() - wanted).norm() <= 1e-6 * (wanted - weight).norm()


def test_kept_prompts_stay_as_their_weight_grows_which_counts_once() -> None:
    text = random_rows(24, 2, 1)
    keep, drift = text.keep("all").double(), []
    for scale in (1e-2, 1.0, 1e3, 1e6):
        d = TRCEEmbedding(preserve_scale=scale, lamb=1e-9).change_of(text).matrix() - torch.eye(24)
        drift.append(float((keep @ d.T).norm()))
    assert drift == sorted(drift, reverse=True) and drift[-1] < 1e-5 * drift[0]
    # Where the kept rows span everything, what moves is proportional to 1 / scale; a scale squared would give 1e-6.
    full = random_rows(8, 1, 3)
    small, large = (TRCEEmbedding(preserve_scale=scale, lamb=0.0).change_of(full) for scale in (1e3, 1e6))
    ratio = (large.matrix() - torch.eye(8)).norm() / (small.matrix() - torch.eye(8)).norm()
    assert abs(float(ratio) - 1e-3) < 1e-5


def test_without_lamb_few_preserved_prompts_are_refused(tiny: Model) -> None:
    with pytest.raises(UserError, match=r"raise lamb \(now 0\)"):
        TRCEEmbedding(lamb=0.0).fit(tiny, TASK)
    TRCEEmbedding(lamb=0.0).change_of(random_rows(24, 1, 3))


NOTHING = [TRCEEmbedding(eot_weight=0.0), TRCEEmbedding(eot_weight=0.0, sot_weight=1.0), TRCEEmbedding(keyword_weight=-1.0)]


@pytest.mark.parametrize("method", NOTHING)
def test_weights_that_move_nothing_are_refused(tiny: Model, method: TRCEEmbedding) -> None:
    with pytest.raises(UserError, match=r"row weights are .*raise eot_weight"):
        method.fit(tiny, TASK)


def test_a_pooled_encoding_is_its_own_end_of_text() -> None:
    pooled, other = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(0))
    pair = Placed(pooled, 0, 1, None, 0, False), Placed(other, 0, 1, None, 0, False)
    source, target = TRCEEmbedding(padding_weight=1.0, keyword_weight=1.0).rows_of(*pair)
    assert torch.equal(source, pooled.double()) and torch.equal(target, other.double())
