"""Custom Diffusion's merge: exact at each subject's words, and the least change of the captions' rows."""

import warnings

import pytest
import torch
from torch import Tensor

from pipelines.closed_form.custom_diffusion_merge import CustomDiffusionMerge
from pipelines.closed_form.prior import caption_moments
from tests.pipelines.reference import assert_follows, in_float64, layers
from toolkit.arch.sd import SD
from toolkit.arch.sdxl import SDXL
from toolkit.concepts import Concept, MergeTask
from toolkit.edits.base import Edit, EditInfo
from toolkit.edits.chain import Chain
from toolkit.edits.delta import Delta
from toolkit.edits.low_rank import LowRank
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError
from toolkit.model import Model

CAPTIONS = ["a boat on a lake", "two dogs in a park", "the moon", "a bowl of rice", "six old keys"]


@pytest.fixture
def captions(tmp_path) -> str:
    path = tmp_path / "captions.txt"
    path.write_text("\n".join(CAPTIONS), encoding="utf-8")
    return str(path)


def learnt(model: Model, token: str, seed: int, kind: type[Edit] = Delta, vectors: int = 1) -> Chain:
    """A word and changes of the layers that read text, dense or of rank 2."""
    draw = torch.Generator().manual_seed(seed)
    tables = model.arch.token_embeddings()
    rows = {part: torch.randn(vectors, table.embedding_dim, generator=draw) for part, table in tables.items()}
    linears = model.arch.text_linears()
    if kind is Delta:
        change = Delta.from_deltas({f"{s}.weight": 0.3 * torch.randn(w.weight.shape, generator=draw) for s, w in linears.items()})
    else:
        factors = {
            s: (torch.randn(w.out_features, 2, generator=draw), torch.randn(2, w.in_features, generator=draw)) for s, w in linears.items()
        }
        change = LowRank.from_factors(factors)
    return Chain.of([TokenEdit.from_rows({token: rows}, EditInfo(triggers=(token,), base=model.fingerprint)), change])


def rows_of(model: Model, edit: Edit, word: str) -> Tensor:
    """The rows from the subject's first token to EOT in both prompts, read with the edit's words."""
    with model.attached(edit):
        text = model.arch.encode([word, f"photo of a {word}"])
        before = int(model.arch.encode(["photo of a"]).length[0]) - 1
    return torch.cat([text.hidden[0, 1 : int(text.length[0])], text.hidden[1, before : int(text.length[1])]]).double()


@pytest.mark.parametrize("family", [SD, SDXL])
def test_each_subject_is_read_as_its_own_edit_read_it(family: type[SD], captions: str) -> None:
    """W' C^T = V^T to 1e-6, in the weights that the model has with the merged edit attached."""
    model = in_float64(family.tiny())
    edits = learnt(model, "<one>", 0), learnt(model, "<two>", 1, LowRank, vectors=2)
    merged = CustomDiffusionMerge(prior=captions).fit(model, MergeTask(edits))
    assert [part.kind() for part, _ in merged.parts()] == ["token", "token", "low_rank"]
    assert merged.info.triggers == ("<one>", "<two>") and merged.info.notes["error"] < 1e-6
    for edit, word in zip(edits, ("<one>", "<two>"), strict=True):
        rows = rows_of(model, edit, word)
        torch.testing.assert_close(rows_of(model, merged, word), rows, rtol=1e-6, atol=1e-6)
        for site, linear in model.arch.text_linears().items():
            wanted = rows @ (linear.weight.double() + edit.delta(f"{site}.weight").double()).T
            given = rows @ (linear.weight.double() + merged.delta(f"{site}.weight").double()).T
            assert (given - wanted).norm() <= 1e-6 * wanted.norm()


def test_it_is_the_papers_formula_with_bos_held(model64: Model, captions: str) -> None:
    edits = learnt(model64, "<one>", 0), learnt(model64, "<two>", 1)
    concepts = Concept("<one> cat"), Concept("<two> dog")
    merged = CustomDiffusionMerge(prior=captions, lamb=0.7).fit(model64, MergeTask(edits, concepts))
    own = [rows_of(model64, edit, concept.name) for edit, concept in zip(edits, concepts, strict=True)]
    bos = model64.arch.encode([""]).hidden[0, :1].double()
    c = torch.cat([*own, bos])
    regularization = torch.cat(
        [text.hidden[0, 1 : int(text.length)] for text in (model64.arch.encode([caption]) for caption in CAPTIONS)]
    ).double()
    a = regularization.T @ regularization + 0.7 * torch.eye(c.shape[1])
    d = c @ torch.linalg.inv(a)
    wanted = {}
    for site, w in layers(model64).items():
        v = torch.cat([rows @ (w + edit.delta(f"{site}.weight").double()).T for rows, edit in zip(own, edits, strict=True)] + [bos @ w.T])
        wanted[site] = (v.T - w @ c.T) @ torch.linalg.inv(d @ c.T) @ d
        change = merged.delta(f"{site}.weight").double()
        assert (bos @ change.T).norm() <= 1e-6 * bos.norm() * change.norm()
    assert_follows(merged.parts()[-1][0], model64, wanted)


def test_no_other_weights_with_these_values_change_the_captions_less(tiny: Model, captions: str) -> None:
    """Moving from the solution along any direction that keeps the values raises the objective: the gradient lies in C's rows."""
    edits = learnt(tiny, "<one>", 0), learnt(tiny, "<two>", 1)
    merged = CustomDiffusionMerge(prior=captions, lamb=0.7).fit(tiny, MergeTask(edits))
    c = torch.cat(
        [*(rows_of(tiny, edit, word) for edit, word in zip(edits, ("<one>", "<two>"), strict=True)), tiny.arch.encode([""]).hidden[0, :1]]
    )
    a = caption_moments(tiny.arch, CAPTIONS, "words")["hidden"] + 0.7 * torch.eye(32)
    free = torch.eye(32) - torch.linalg.pinv(c) @ c  # onto the directions that no row of C has
    for site in tiny.arch.text_linears():
        gradient = merged.delta(f"{site}.weight").double() @ a
        assert (gradient @ free).norm() <= 1e-4 * gradient.norm()


def test_captions_are_kept_better_than_by_the_sum_of_the_edits(tiny: Model, captions: str) -> None:
    edits = learnt(tiny, "<one>", 0), learnt(tiny, "<two>", 1)
    merged = CustomDiffusionMerge(prior=captions, lamb=1e-3).fit(tiny, MergeTask(edits))
    a = caption_moments(tiny.arch, CAPTIONS, "words")["hidden"]
    for site in tiny.arch.text_linears():
        drift = [
            torch.einsum("od,de,oe->", x, a, x)
            for x in (merged.delta(f"{site}.weight").double(), sum(e.delta(f"{site}.weight").double() for e in edits))
        ]
        assert drift[0] < 0.3 * drift[1]


def test_a_word_alone_keeps_its_rows(tiny: Model, captions: str) -> None:
    """An edit with a new word only (textual inversion) is merged with one that changes layers: its own rows do not move."""
    word = TokenEdit.from_rows({"<word>": {"text_encoder": torch.randn(32, generator=torch.Generator().manual_seed(3))}})
    merged = CustomDiffusionMerge(prior=captions).fit(tiny, MergeTask((word, learnt(tiny, "<one>", 0))))
    rows = rows_of(tiny, word, "<word>")
    for site, linear in tiny.arch.text_linears().items():
        assert (rows @ merged.delta(f"{site}.weight").double().T).norm() <= 1e-6 * (rows @ linear.weight.double().T).norm()


def test_edits_without_words_of_their_own_give_one_low_rank_edit(tiny: Model, captions: str) -> None:
    edits = [learnt(tiny, "<one>", seed, LowRank).edits[1] for seed in range(2)]
    merged = CustomDiffusionMerge(prior=captions).fit(tiny, MergeTask(tuple(edits), (Concept("cat"), Concept("dog"))))
    assert isinstance(merged, LowRank)


def test_edits_that_ask_for_different_things_at_the_same_rows_are_a_warning(tiny: Model, captions: str) -> None:
    edits = [learnt(tiny, "<one>", seed, LowRank).edits[1] for seed in range(2)]
    with pytest.warns(UserWarning, match="the merge misses what the edits do at their words by"):
        CustomDiffusionMerge(prior=captions).fit(tiny, MergeTask(tuple(edits), (Concept("cat"), Concept("cat"))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CustomDiffusionMerge(prior=captions).fit(tiny, MergeTask((edits[0], edits[0]), (Concept("cat"), Concept("cat"))))


def test_what_cannot_be_merged_is_refused(tiny: Model, captions: str) -> None:
    one, word = learnt(tiny, "<one>", 0), TokenEdit.from_rows({"<one>": {"text_encoder": torch.ones(32)}})
    other = TokenEdit.from_rows({"<other>": {"text_encoder": torch.ones(32)}})
    encoder = next(f"text_encoder.{name}" for name, _ in tiny.arch.components()["text_encoder"].named_parameters())
    bad = Delta.from_deltas({encoder: torch.ones(1)}, EditInfo("few_shot"))
    for edits, message in (
        ((one, word), "two edits bring the word '<one>'"),
        ((word, other), "no edit changes a layer that reads text"),
        ((one, bad), "few_shot edit brings no new words"),
    ):
        with pytest.raises(UserError, match=message):
            CustomDiffusionMerge(prior=captions).fit(tiny, MergeTask(edits))
    with pytest.raises(UserError, match=r"few_shot edit changes text_encoder.*, which reads no text"):
        CustomDiffusionMerge(prior=captions).fit(tiny, MergeTask((one, bad), (Concept("<one>"), Concept("cat"))))
    with pytest.raises(UserError, match="prior is empty"):
        CustomDiffusionMerge(prior="").fit(tiny, MergeTask((one, other)))
    assert tiny.edits == ()
