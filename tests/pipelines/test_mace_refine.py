"""MACE's refinement against its equation written out token by token and layer by layer."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.closed_form.mace_refine import TEMPLATES, MACERefine
from pipelines.closed_form.prior import caption_moments
from tests.pipelines.reference import assert_follows, in_float64, layers
from toolkit.arch.flux import Flux
from toolkit.arch.sd import SD
from toolkit.arch.sd3 import SD3
from toolkit.arch.sdxl import SDXL
from toolkit.concepts import Concept, EraseTask
from toolkit.errors import UserError
from toolkit.model import Model

TASK = EraseTask((Concept("cat", anchor="dog"), Concept("red car", anchor="street")), preserve=("bird",), templates=("a {} at night",))


def hidden(model: Model, prompt: str) -> Tensor:
    return model.arch.encode([prompt]).hidden[0].double()


def beside(model: Model, old: str, new: str) -> tuple[Tensor, Tensor]:
    """Rows of the tokens before and after where two prompts differ, found by walking the token ids; BOS is left out."""
    text = model.arch.encode([old, new])
    chosen = in_common(text.ids, text.length, 1)
    return hidden(model, old)[chosen[0]], hidden(model, new)[chosen[1]]


def in_common(both: Tensor, lengths: Tensor, leading: int) -> list[list[int]]:
    """Where the tokens that two prompts share are in each, and as much padding as both have; without the first `leading`."""
    ids = [row[: int(length)] for row, length in zip(both.tolist(), lengths, strict=True)]
    start = 0
    while start < min(map(len, ids)) and ids[0][start] == ids[1][start]:
        start += 1
    ends = [len(row) for row in ids]
    while min(ends) > start and ids[0][ends[0] - 1] == ids[1][ends[1] - 1]:
        ends = [end - 1 for end in ends]
    padding = both.shape[1] - max(map(len, ids))
    return [[*range(leading, start), *range(end, len(row) + padding)] for row, end in zip(ids, ends, strict=True)]


def naive(w: Tensor, source: Tensor, target: Tensor, keep: Tensor, p: float, prior: Tensor, lamb: float) -> Tensor:
    """One layer's new weight."""
    right = lamb * torch.eye(w.shape[1]) + source.T @ source + p * keep.T @ keep + prior
    left = lamb * w + (w @ target.T) @ source + p * (w @ keep.T) @ keep + w @ prior
    return left @ torch.linalg.inv(right)


@pytest.mark.parametrize("family", [SD, SDXL, None])
def test_it_follows_its_equation(family: type[SD] | None, tmp_path, request: pytest.FixtureRequest) -> None:
    """On tiny models, and on layers as Stable Diffusion 1.4 has them."""
    model = in_float64(family.tiny()) if family else request.getfixturevalue("real64")
    captions = tmp_path / "captions.csv"
    captions.write_text("prompt\na boat\nmany cats\ntwo houses\n", encoding="utf-8")
    method = MACERefine(preserve_scale=0.3, prior=str(captions), prior_scale=0.2, prior_rows="words", lamb=0.7)
    edit = method.fit(model, TASK)
    pairs = [("a cat at night", "a dog at night"), ("a red car at night", "a street at night")]
    source, target = map(torch.cat, zip(*(beside(model, *pair) for pair in pairs), strict=True))
    keep = torch.cat([hidden(model, ""), hidden(model, "a bird at night")])
    prior = 0.2 * caption_moments(model.arch, ["a boat", "two houses"], "words")["hidden"]  # not the one with a cat
    assert_follows(edit, model, {site: naive(w, source, target, keep, 0.3, prior, 0.7) - w for site, w in layers(model).items()})
    assert edit.info.notes == {"prior": {"captions": 2, "column": "prompt", "left_out": 1}}


@pytest.mark.parametrize("family", [SD3, Flux])
def test_it_follows_its_equation_in_each_stream_of_a_transformer(family: Any, tmp_path) -> None:
    """The pooled encoding has no words beside the concept, and moves as a whole."""
    model, captions = in_float64(family.tiny()), tmp_path / "captions.txt"
    captions.write_text("a boat\ntwo houses\n", encoding="utf-8")
    edit = MACERefine(preserve_scale=0.3, prior=str(captions), prior_scale=0.2, lamb=0.7).fit(model, TASK)
    prior, olds, news = caption_moments(model.arch, ["a boat", "two houses"], "all"), (0, 1), (2, 3)
    prompts = ["a cat at night", "a red car at night", "a dog at night", "a street at night", "", "a bird at night"]
    assert set(edit.sites()) == {f"{site}.weight" for site in model.arch.text_linears()}
    for name, stream in model.arch.text_streams().items():
        source, target, keep = [], [], []
        for segment in stream.segments(model.arch.encode(prompts)):
            rows = segment.rows.double()
            for old, new in zip(olds, news, strict=True):
                both = [old, new]
                chosen = [[0], [0]] if segment.ids is None else in_common(segment.ids[both], segment.length[both], segment.leading)
                source.append(rows[old, chosen[0]])
                target.append(rows[new, chosen[1]])
            keep += [rows[4], rows[5]]
        for site, linear in stream.linears.items():
            w = linear.weight.double()
            wanted = naive(w, torch.cat(source), torch.cat(target), torch.cat(keep), 0.3, 0.2 * prior[name], 0.7) - w
            assert (edit.delta(site).double() - wanted).norm() <= 1e-6 * wanted.norm()


def test_it_is_the_minimiser(tiny64: Model) -> None:
    """The gradient of the objective as the paper writes it, at the edited weights (stored in float32)."""
    edit = MACERefine(preserve_scale=0.5, prior="", lamb=1.0).fit(tiny64, TASK)
    pairs = [("a cat at night", "a dog at night"), ("a red car at night", "a street at night")]
    source, target = map(torch.cat, zip(*(beside(tiny64, *pair) for pair in pairs), strict=True))
    keep = torch.cat([hidden(tiny64, ""), hidden(tiny64, "a bird at night")])
    for site, linear in tiny64.arch.text_linears().items():
        w = linear.weight.double()
        gradients = []
        for weight in (w, w + edit.delta(site).double()):
            free = weight.clone().requires_grad_()
            refined = (source @ free.T - target @ w.T).square().sum() + (free - w).square().sum()
            objective = refined + 0.5 * (keep @ (free - w).T).square().sum()
            gradients.append(torch.autograd.grad(objective, free)[0].norm())
        assert gradients[1] <= 1e-6 * gradients[0]


def test_free_of_other_terms_the_words_beside_the_concept_come_as_near_the_anchor_as_any_weights_can(tiny: Model) -> None:
    """There are more rows than dimensions here, so that not even the best weights reach all of them. The tiny encoder's last
    layer norm takes one direction from every row; what rounding leaves of it is no direction to fit along, hence rcond."""
    task = EraseTask((Concept("cat", anchor="dog"),), templates=("{} at night",))
    edit = MACERefine(prior="", preserve_scale=0.0, lamb=1e-9).fit(tiny, task)
    source, target = beside(tiny, "cat at night", "dog at night")
    for site, linear in tiny.arch.text_linears().items():
        w = linear.weight.double()
        best = torch.linalg.lstsq(source, target @ w.T, rcond=1e-6, driver="gelsd").solution.T
        before, after, possible = ((source @ weight.T - target @ w.T).norm() for weight in (w, w + edit.delta(site).double(), best))
        assert after <= 1.001 * possible < 0.2 * before


def test_it_has_thirty_templates_for_each_kind_which_the_task_can_replace(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [len(set(TEMPLATES[kind])) for kind in ("object", "style")] == [30, 30]
    prompts: list[str] = []
    encode = tiny.arch.encode
    monkeypatch.setattr(tiny.arch, "encode", lambda given, **options: prompts.extend(given) or encode(given, **options))
    MACERefine(prior="").fit(tiny, EraseTask((Concept("cat", anchor="dog"), Concept("monet", anchor="art", kind="style"))))
    assert {template.format("cat") for template in TEMPLATES["object"]} | {t.format("monet") for t in TEMPLATES["style"]} <= set(prompts)
    prompts.clear()
    MACERefine(prior="").fit(tiny, EraseTask((Concept("cat", anchor="dog"),), templates=("my {} here",)))
    assert set(prompts) == {"", "my cat here", "my dog here", "my", "here"}


def test_the_built_in_captions_are_kept_by_default(tiny: Model) -> None:
    notes = MACERefine().fit(tiny, TASK).info.notes["prior"]
    assert notes["captions"] + notes["left_out"] == 100 and notes["left_out"] >= 1


def test_without_ridge_and_captions_there_is_no_solution(tiny: Model) -> None:
    with pytest.raises(UserError, match=r"raise lamb \(now 0\)"):
        MACERefine(prior="", lamb=0.0).fit(tiny, TASK)


def test_an_anchor_that_leaves_the_words_beside_it_alone_is_refused(tiny: Model) -> None:
    with pytest.raises(UserError, match="changes nothing"):
        MACERefine(prior="").fit(tiny, EraseTask((Concept("cat", anchor=" cat "),), templates=("a {}",)))
