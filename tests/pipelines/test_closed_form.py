"""UCE and RECE on Stable Diffusion, against the equations written out layer by layer on the real encoded prompts."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from benchmarks.closed_form import Shaped, text
from pipelines.closed_form.edit import as_edit
from pipelines.closed_form.rece import RECE
from pipelines.closed_form.uce import UCE
from tests.pipelines.reference import assert_follows, layers
from toolkit.concepts import Concept, EraseTask
from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.solve import closed_form

BARE = ("{}",)
CAT_TO_DOG = EraseTask((Concept("cat", anchor="dog"),), templates=BARE)
Pair = tuple[Tensor, Tensor]


def hidden(model: Model, prompt: str) -> Tensor:
    return model.arch.encode([prompt]).hidden[0].double()


def last(model: Model, prompt: str) -> Tensor:
    """The row of the last token before EOT, [1, d]."""
    text = model.arch.encode([prompt])
    return text.hidden[0, int(text.length) - 2].double()[None]


def tail(model: Model, word: str, anchor: str) -> Pair:
    """UCE's alignment at the time of the paper, as the specification words it."""
    old, new = (int(model.arch.encode([prompt]).length) - 2 for prompt in (word, anchor))
    far, size = max(old, new), 77
    return hidden(model, word)[old : size - (far - old)], hidden(model, anchor)[new : size - (far - new)]


def naive(weight: Tensor, source: Tensor, target: Tensor, keep: Tensor, a: float, b: float, lamb: float) -> Tensor:
    """The edited weight of one layer, v_i = weight g_i."""
    left = lamb * weight + a * (weight @ target.T) @ source + b * (weight @ keep.T) @ keep
    right = lamb * torch.eye(weight.shape[1], dtype=torch.float64) + a * source.T @ source + b * keep.T @ keep
    return left @ torch.linalg.inv(right)


def naive_changes(model: Model, source: Tensor, target: Tensor, keep: Tensor, a: float, b: float, lamb: float) -> dict[str, Tensor]:
    return {site: naive(weight, source, target, keep, a, b, lamb) - weight for site, weight in layers(model).items()}


def test_uce_of_last_tokens_with_synonyms_and_a_preserve_set(model64):
    task = EraseTask((Concept("cat", ("kitten",), "dog"), Concept("cow", anchor="horse")), preserve=("bird",), templates=BARE)
    edit = UCE(rows="last_subject", erase_scale=2.0, preserve_scale=0.3, lamb=0.7).fit(model64, task)
    source = torch.cat([last(model64, word) for word in ("cat", "kitten", "cow")])
    target = torch.cat([last(model64, word) for word in ("dog", "dog", "horse")])
    keep = torch.cat([hidden(model64, ""), hidden(model64, "bird")])
    assert_follows(edit, model64, naive_changes(model64, source, target, keep, 2.0, 0.3, 0.7))


@pytest.mark.parametrize("anchor", ["dog", "elephant", None])
def test_uce_of_aligned_tails(tiny64, anchor):
    """With no anchor the tail of the empty prompt starts at BOS, as in the official code."""
    edit = UCE(rows="tail_aligned").fit(tiny64, EraseTask((Concept("cat", anchor=anchor),), templates=BARE))
    source, target = tail(tiny64, "cat", anchor or "")
    assert_follows(edit, tiny64, naive_changes(tiny64, source, target, hidden(tiny64, ""), 1.0, 0.1, 0.5))


def test_uce_of_all_rows_of_a_style_template(model64):
    style = Concept("monet", anchor="manet", kind="style")
    edit = UCE().fit(model64, EraseTask((style,), preserve=("dali",), templates=("{} style",)))
    source, target = (hidden(model64, f"{word} style")[1:] for word in ("monet", "manet"))
    keep = torch.cat([hidden(model64, ""), hidden(model64, "dali style")])
    assert_follows(edit, model64, naive_changes(model64, source, target, keep, 1.0, 0.1, 0.5))


def test_erased_words_answer_as_their_anchor_and_kept_ones_as_before(tiny):
    task = EraseTask((Concept("cat", anchor="dog"), Concept("cow", anchor="dog")), templates=BARE)
    edit = UCE(rows="last_subject", preserve_scale=1e-3, lamb=1e-6).fit(tiny, task)
    with torch.no_grad():
        before = {word: [linear(last(tiny, word).float()) for linear in tiny.arch.text_linears().values()] for word in ("cat", "dog")}
        with tiny.attached(edit):
            after = [linear(last(tiny, "cat").float()) for linear in tiny.arch.text_linears().values()]
    for old, new, anchor in zip(before["cat"], after, before["dog"], strict=True):
        assert (new - anchor).norm() < 0.05 * (old - anchor).norm()


def test_factors_are_as_exact_as_what_is_stored():
    """At the width of SD1, against float64: computing a layer's factor in float32 must not cost more than storing it does by much."""
    torch.manual_seed(0)
    shaped = Shaped({(320, 768): 2})
    change = closed_form(text(40, 768), text(40, 768), text(77, 768))
    edit = as_edit(shaped.model, UCE(), {"hidden": change})
    for site, layer in shaped.linears.items():
        wanted = layer.weight.double() @ change.u @ change.v
        assert (edit.delta(site).double() - wanted).norm() <= 1e-6 * wanted.norm()


def naive_rece(model: Model, source: Tensor, target: Tensor, epochs: int, reg: float, again: bool) -> dict[str, Tensor]:
    """The change after every epoch on explicit weights, those of all layers one below the other; the first stage is UCE's."""
    weights = {site: linear.weight.detach().double() for site, linear in model.arch.text_linears().items()}
    keep, original = hidden(model, ""), torch.cat(list(weights.values()))
    current = naive(original, source, target, keep, 1.0, 1.0, 0.5)
    for _ in range(epochs):
        system = torch.cat([current, reg**0.5 * torch.eye(keep.shape[1], dtype=torch.float64)])
        wanted = torch.cat([original @ source.T, torch.zeros(keep.shape[1], len(source), dtype=torch.float64)])
        derived = torch.linalg.lstsq(system, wanted, driver="gels").solution.T
        rows, goals = (torch.cat([derived, source]), torch.cat([target, target])) if again else (derived, target)
        current = naive(current, rows, goals, keep, 1.0, 0.1, 0.1)
    changes = dict(zip(weights, (current - original).split([len(weight) for weight in weights.values()]), strict=True))
    return {site: changes[site] for site in layers(model)}


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("epochs", [1, 3])
def test_rece_follows_its_equations(tiny64, epochs, again):
    """Two concepts: both are derived from the same weights and moved in one solve."""
    task = EraseTask((Concept("cat", anchor="dog"), Concept("cow", anchor="elephant")), templates=BARE)
    edit = RECE(rows="tail_aligned", derive_rows="tail_aligned", epochs=epochs, again=again).fit(tiny64, task)
    source, target = map(torch.cat, zip(tail(tiny64, "cat", "dog"), tail(tiny64, "cow", "elephant"), strict=True))
    assert_follows(edit, tiny64, naive_rece(tiny64, source, target, epochs, 0.1, again))
    assert edit.info.notes == {"epoch": epochs}


def test_rece_of_layers_as_stable_diffusion_has_them(real64):
    edit = RECE().fit(real64, CAT_TO_DOG)
    source, target = (hidden(real64, word)[1:] for word in ("cat", "dog"))
    assert_follows(edit, real64, naive_rece(real64, source, target, 1, 0.1, True))


def test_rece_keeps_the_epoch_that_scores_best(tiny):
    before, scores, seen = layers(tiny), iter((1.0, 3.0, 2.0)), []

    def score(model: Model) -> float:
        seen.append(layers(model))
        return next(scores)

    edit = RECE(epochs=3).fit(tiny, CAT_TO_DOG, score=score)
    assert edit.info.notes["epoch"] == 2 and len(seen) == 3
    with tiny.attached(edit):
        assert all(torch.equal(weight, seen[1][site]) for site, weight in layers(tiny).items())
    assert all(torch.equal(weight, before[site]) for site, weight in layers(tiny).items())
    assert tiny.edits == ()


@pytest.mark.parametrize("method", [UCE(), RECE()])
def test_fitted_on_an_edited_model_the_current_weights_are_the_base(tiny64, method):
    first = UCE(rows="last_subject").fit(tiny64, EraseTask((Concept("cow", anchor="horse"),)))
    tiny64.attach(first)
    current = layers(tiny64)
    edit = method.fit(tiny64, CAT_TO_DOG)
    assert all(torch.equal(weight, current[site]) for site, weight in layers(tiny64).items())
    assert edit.info.on == ("uce",) and edit.info.base == tiny64.fingerprint
    if isinstance(method, UCE):
        source, target = hidden(tiny64, "cat")[1:], hidden(tiny64, "dog")[1:]
        assert_follows(edit, tiny64, naive_changes(tiny64, source, target, hidden(tiny64, ""), 1.0, 0.1, 0.5))


@pytest.mark.parametrize("method", [UCE(), RECE(epochs=2)])
def test_the_order_of_concepts_does_not_matter(tiny, method):
    concepts = Concept("cat", ("kitten",), "dog"), Concept("cow"), Concept("monet", kind="style")
    deltas = [method.fit(tiny, EraseTask(order, preserve=("bird",))) for order in (concepts, concepts[::-1], concepts[1:] + concepts[:1])]
    for other, site in itertools.product(deltas[1:], deltas[0].sites()):
        torch.testing.assert_close(other.delta(site), deltas[0].delta(site), rtol=1e-3, atol=1e-6)


def test_rank_is_at_most_the_moved_rows_and_one_factor_is_shared(tiny):
    task = EraseTask((Concept("cat", ("kitten",), "dog"),), templates=("{}", "a {}"))
    edit = UCE(rows="last_subject").fit(tiny, task)
    assert len({id(down) for down in edit.down.values()}) == 1 and not edit.dense
    assert next(iter(edit.down.values())).shape[0] <= 4
    assert all(torch.linalg.matrix_rank(edit.delta(site)) <= 4 for site in edit.sites())


@pytest.mark.parametrize("method", [UCE, RECE])
@pytest.mark.parametrize("nothing", ["empty_prompt", "template"])
def test_the_example_changes_the_model_and_comes_off_again(tiny, method, nothing):
    before = layers(tiny)
    edit = method(nothing=nothing).fit(tiny, method.example_task(tiny))
    with tiny.attached(edit):
        assert all(not torch.equal(weight, before[site]) for site, weight in layers(tiny).items())
    assert all(torch.equal(weight, before[site]) for site, weight in layers(tiny).items())
    assert edit.info.method == method.name() and method.from_config(dict(edit.info.config)) == method(nothing=nothing)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (UCE(lamb=0.0), r"raise lamb \(now 0\)"),
        (RECE(uce_lamb=0.0), r"raise uce_lamb \(now 0\)"),
        (RECE(lamb=0.0, preserve_scale=0.0, again=False), r"raise lamb \(now 0\)"),
        (RECE(epochs=0), "epochs is 0"),
    ],
)
def test_options_without_a_solution_say_what_to_change(tiny, method, message):
    """The tiny encoder's last layer norm takes one direction from every row, so that no number of rows fills the system."""
    with pytest.raises(UserError, match=message):
        method.fit(tiny, CAT_TO_DOG)


def test_an_anchor_that_encodes_the_same_is_refused(tiny):
    with pytest.raises(UserError, match="changes nothing"):
        UCE().fit(tiny, EraseTask((Concept("cat", anchor=" cat "),)))


@pytest.mark.parametrize("method", [UCE, RECE])
def test_every_option_has_help(method):
    assert all(field.metadata["help"] for field in dataclasses.fields(method))
