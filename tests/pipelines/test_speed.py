"""SPEED on a tiny Stable Diffusion: the paper's formula layer by layer, and what its null space promises."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from pipelines.closed_form.rows import Placed, TaskRows, encode_task
from pipelines.closed_form.speed import SPEED, centres
from pipelines.closed_form.uce import UCE
from toolkit.arch.flux import Flux
from toolkit.arch.sd3 import SD3
from toolkit.concepts import Concept, EraseTask
from toolkit.errors import UserError
from toolkit.model import Model

TASK = EraseTask((Concept("cat", ("kitten",), "dog"), Concept("monet", kind="style")), ("bird",), ("{}",))
PLAIN = {"prior_filter": False, "augmentations": 0}


def refine(weight: Tensor, erase: Tensor, retained: Tensor, times: int, prior_filter: bool, make: Generator) -> Tensor:
    """The retained rows [m, d] after influence-based prior filtering and directed prior augmentation, written out."""

    def above(rows: Tensor) -> Tensor:
        shift = (rows @ erase.T).norm(dim=1)
        return rows[shift > shift.mean()]

    if prior_filter:
        retained = above(retained)
    if not times:
        return retained
    v = torch.linalg.svd(weight, full_matrices=False).Vh[-1]
    v = v * v.sum().sign()
    noise = torch.randn(times, len(retained), generator=make, dtype=torch.float64)
    return torch.cat([retained, above(torch.cat([retained + n[:, None] * v for n in noise]))])


def official(method: SPEED, weight: Tensor, source: Tensor, target: Tensor, prompts: int, retained: Tensor, invariant: Tensor, make):
    """(Delta P [o, d] by the paper's formula with its inverses, the refined rows) of one layer."""
    one = torch.eye(weight.shape[1], dtype=torch.float64)
    s, g = source.T @ source / prompts, target.T @ source / prompts
    erase = weight @ (g - s) @ torch.linalg.inv(one + s)
    rows = refine(weight, erase, retained, method.augmentations, method.prior_filter, make)
    moment = rows.T @ rows / len(rows)
    u, sizes, _ = torch.linalg.svd(moment)
    u = u[:, sizes < method.threshold * moment.trace() / len(moment)]
    p, k = u @ u.T, invariant.T
    m = torch.linalg.inv(s @ p + method.retain_scale * one)
    inner = one - m @ k @ torch.linalg.inv(k.T @ p @ m @ k) @ k.T @ p
    return weight @ (g - s) @ p @ inner @ m, rows


def hidden(model: Model, *prompts: str) -> Tensor:
    return model.arch.encode(prompts).hidden.double()


def relative(given: Tensor, wanted: Tensor) -> float:
    return float((given - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    "method",
    [
        SPEED(),
        SPEED(augmentations=3, seed=5, retain_scale=0.05, threshold=0.02, invariants=2),
        SPEED(prior_filter=False),
        SPEED(augmentations=0, invariants=0),
        SPEED(layers="keys_and_values", **PLAIN),
    ],
)
def test_it_is_the_papers_formula(tiny: Model, method: SPEED) -> None:
    edit = method.fit(tiny, TASK)
    source, target = (rows.double() for rows in encode_task(tiny.arch, TASK, "empty_prompt")["hidden"].moved("all"))
    empty, bird = hidden(tiny, "", "bird")
    invariant = torch.cat([empty[:1], centres(empty[1:], method.invariants)])
    linears, make = tiny.arch.text_linears(), Generator().manual_seed(method.seed)
    chosen = linears if method.layers != "values" else tiny.arch.value_linears()
    assert set(edit.sites()) == {f"{site}.weight" for site in chosen}
    for site in (site for site in linears if site in chosen):
        weight = linears[site].weight.detach().double()
        wanted, rows = official(method, weight, source, target, 3, bird, invariant, make)
        assert relative(edit.delta(site).double(), wanted) <= 1e-6
        assert (len(rows) == 77) == (not method.prior_filter and not method.augmentations)


@pytest.mark.parametrize(("threshold", "prior_filter", "times"), [*product((1e-3, 1e-2, 0.1), (False, True), (0, 4))])
def test_retained_rows_change_less_than_the_threshold_implies(tiny: Model, threshold: float, prior_filter: bool, times: int) -> None:
    """1/m sum_j ||W D x_j||^2 <= threshold tr(R)/d ||W D||_F^2, which UCE does not keep where it says something."""
    method = SPEED(threshold=threshold, prior_filter=prior_filter, augmentations=times)
    edit, plain = method.fit(tiny, TASK), UCE(preserve_scale=0.0).fit(tiny, EraseTask(TASK.concepts, (), TASK.templates))
    source, target = (rows.double() for rows in encode_task(tiny.arch, TASK, "empty_prompt")["hidden"].moved("all"))
    empty, bird = hidden(tiny, "", "bird")
    linears, make = tiny.arch.text_linears(), Generator().manual_seed(0)
    values = tiny.arch.value_linears()
    for site in (site for site in linears if site in values):
        weight = linears[site].weight.detach().double()
        rows = official(method, weight, source, target, 3, bird, empty[:1], make)[1]
        allowed = threshold * rows.square().sum() / len(rows) / rows.shape[1]

        def share(delta: Tensor, rows: Tensor = rows) -> Tensor:
            return (rows @ delta.double().T).square().sum() / len(rows) / delta.double().square().sum()

        assert share(edit.delta(site)) <= allowed
        assert threshold == 0.1 or share(plain.delta(site)) > allowed


def test_in_the_exact_null_space_retained_words_answer_as_before(tiny: Model) -> None:
    task = EraseTask(TASK.concepts, ("bird", "cow"), ("{}", "a {}"))
    edit = SPEED(threshold=1e-9, preserve_rows="last_subject", **PLAIN).fit(tiny, task)
    text = tiny.arch.encode(["bird", "a bird", "cow", "a cow", "cat", ""])
    last = text.hidden[range(6), text.length - 2].double()
    for site in tiny.arch.value_linears():
        before = last @ tiny.arch.text_linears()[site].weight.double().T
        drift = (last @ edit.delta(site).double().T).norm(dim=1) / before.norm(dim=1)
        assert drift[:4].max() < 1e-6 and drift[5] < 1e-6, "the retained words, and BOS, which is the empty prompt's"
        assert drift[4] > 0.05, "the erased word"


def test_invariants_stay_even_where_nothing_else_of_them_is_retained(tiny: Model) -> None:
    edit = SPEED(threshold=0.5).fit(tiny, TASK)
    empty = hidden(tiny, "")[0]
    for site, linear in tiny.arch.value_linears().items():
        kept = torch.cat([empty[:1], centres(empty[1:], 3)])
        assert ((kept @ edit.delta(site).double().T).norm() / (kept @ linear.weight.double().T).norm()) < 1e-6
        assert (empty[1:] @ edit.delta(site).double().T).norm() > 1e-3


@pytest.mark.parametrize("family", [SD3, lambda: Flux.tiny(distilled=False)], ids=["sd3", "flux"])
def test_it_is_the_papers_formula_for_each_stream_of_a_transformer(family: Any) -> None:
    model, task = Model(family.tiny() if family is SD3 else family()), EraseTask(TASK.concepts, ("bird", "cow"), ("{}",))
    method, make = SPEED(augmentations=2, threshold=0.02), Generator().manual_seed(0)
    edit, texts = method.fit(model, task), encode_task(model.arch, task, "empty_prompt")
    for name, stream in model.arch.text_streams().items():
        source, target = (rows.double() for rows in texts[name].moved("all"))
        segments = stream.segments(model.arch.encode(["", "bird", "cow"]))
        kept = torch.cat([segment.rows[prompt] for segment in segments for prompt in (1, 2)]).double()
        bos = torch.cat([segment.rows[0, : segment.leading] for segment in segments]).double()
        blank = torch.cat([segment.rows[0, segment.leading :] for segment in segments]).double()
        for site, linear in stream.linears.items():
            weight, invariant = linear.weight.detach().double(), torch.cat([bos, centres(blank, 3)])
            wanted, _ = official(method, weight, source, target, 3, kept, invariant, make)
            assert relative(edit.delta(site).double(), wanted) <= 1e-6


def random_rows(width: int, prompts: int, kept: int, length: int = 9) -> TaskRows:
    """Random prompts of which the kept ones fill `kept` * `length` dimensions at most."""
    make = Generator().manual_seed(0)

    def prompt() -> Placed:
        return Placed(torch.randn(length, width, generator=make), 1, 3, (0, 1, 2, 3))

    return TaskRows(tuple((prompt(), prompt()) for _ in range(prompts)), tuple(prompt() for _ in range(kept)), (prompt(),))


def linears_of(width: int, outs: tuple[int, ...]) -> dict[str, nn.Linear]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return {f"layer{i}": nn.Linear(width, out, bias=False).requires_grad_(False) for i, out in enumerate(outs)}


def test_invariants_that_are_retained_rows_are_no_obstacle() -> None:
    """Nothing to preserve: the empty prompt's rows are retained, and the paper's K^T P M K is singular."""
    text, linears = random_rows(40, 3, 0), linears_of(40, (16,))
    d = SPEED(threshold=1e-9, **PLAIN).changes_of(text, linears, Generator())["layer0"].matrix() - torch.eye(40)
    blank = text.blank[0].hidden.double()
    assert (blank @ d.T).norm() <= 1e-9 * d.norm() * blank.norm() and d.norm() > 1


@pytest.mark.parametrize("r", [1.0, 1e-3])
def test_its_gradient_within_the_null_space_is_zero(r: float) -> None:
    text, linears, method = random_rows(40, 3, 2), linears_of(40, (16, 60)), SPEED(retain_scale=r, **PLAIN)
    changes = method.changes_of(text, linears, Generator())
    assert len({id(change) for change in changes.values()}) == 1, "without refinement all layers have the same null space"
    d = next(iter(changes.values())).matrix() - torch.eye(40)
    kept, blank = text.preserved("all").double(), text.blank[0].hidden.double()
    invariant = torch.cat([blank[:1], centres(blank[1:], 3)])
    null = torch.linalg.svd(torch.cat([kept, invariant])).Vh[len(kept) + 4 :]
    source, target = (rows.double() for rows in text.moved("all"))
    gradient = ((source @ d.T - (target - source)).T @ source / 3 + r * d) @ null.T
    assert gradient.norm() <= 1e-8 * ((target - source).T @ source / 3).norm()
    assert (d - d @ null.T @ null).norm() <= 1e-10 * d.norm()


@pytest.mark.parametrize(("width", "outs", "kept"), [(40, (16, 60), 3), pytest.param(768, (320, 1280), 40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("together", [False, True])
def test_random_layers_follow_the_papers_formula(width: int, outs: tuple[int, ...], kept: int, together: bool) -> None:
    text, linears = random_rows(width, 3, kept), linears_of(width, outs)
    method = SPEED(per_layer=not together, augmentations=2)
    changes = method.changes_of(text, linears, Generator().manual_seed(0))
    source, target = (rows.double() for rows in text.moved("all"))
    blank = text.blank[0].hidden.double()
    invariant, make = torch.cat([blank[:1], centres(blank[1:], 3)]), Generator().manual_seed(0)
    weights = {site: linear.weight.double() for site, linear in linears.items()}
    groups = [torch.cat(list(weights.values()))] if together else list(weights.values())
    wanted = torch.cat([official(method, w, source, target, 3, text.preserved("all").double(), invariant, make)[0] for w in groups])
    given = torch.cat([weight @ changes[site].u @ changes[site].v for site, weight in weights.items()])
    assert relative(given, wanted) <= 1e-6
    assert len({id(change) for change in changes.values()}) == (1 if together else 2)


def test_layers_as_stable_diffusion_has_them() -> None:
    """Without refinement the formula is linear in the weights, so that those of several layers can stand one below the other.

    The rows are random because the empty prompt's are nearly retained already among a few prompts', and the formula inverts
    what is left of them.
    """
    text, linears, method = random_rows(768, 3, 10), linears_of(768, (320, 640, 1280)), SPEED(**PLAIN)
    changes = method.changes_of(text, linears, Generator())
    source, target = (rows.double() for rows in text.moved("all"))
    blank = text.blank[0].hidden.double()
    invariant = torch.cat([blank[:1], centres(blank[1:], method.invariants)])
    weights = torch.cat([linear.weight.double() for linear in linears.values()])
    wanted = official(method, weights, source, target, 3, text.preserved("all").double(), invariant, Generator())[0]
    given = torch.cat([linear.weight.double() @ changes[site].u @ changes[site].v for site, linear in linears.items()])
    assert relative(given, wanted) <= 1e-6


def test_erased_words_answer_as_their_anchor_within_the_null_space(tiny: Model) -> None:
    """The less it holds back, the nearer to the anchor; what is left is outside the null space."""
    task, left = EraseTask((Concept("cat", anchor="dog"),), ("bird",), ("{}",)), []
    text = tiny.arch.encode(["cat", "dog"])
    cat, dog = text.hidden[[0, 1], text.length - 2].double()
    for scale in (100.0, 1.0, 1e-4):
        edit = SPEED(retain_scale=scale, rows="last_subject", preserve_rows="last_subject").fit(tiny, task)
        linears = tiny.arch.value_linears().items()
        left.append(sum(float((linear.weight.double() @ (cat - dog) + edit.delta(site).double() @ cat).norm()) for site, linear in linears))
    assert left == sorted(left, reverse=True) and left[-1] < 1e-3 * left[0]


def test_the_order_of_concepts_does_not_matter(tiny: Model) -> None:
    one, other = (SPEED().fit(tiny, EraseTask(order, TASK.preserve, TASK.templates)) for order in (TASK.concepts, TASK.concepts[::-1]))
    assert all(relative(one.delta(site), other.delta(site)) < 1e-4 for site in one.sites())


def test_layers_that_share_a_null_space_share_a_factor(tiny: Model) -> None:
    task = EraseTask((Concept("cat", anchor="dog"),), ("bird",), ("{}",))
    method = SPEED(rows="last_subject", per_layer=False)
    edit = method.fit(tiny, task)
    assert len({id(down) for down in edit.down.values()}) == 1 and not edit.dense
    assert {f"{site}.weight" for site in tiny.arch.value_linears()} == set(edit.sites())
    keys = SPEED(rows="last_subject", layers="keys_and_values").fit(tiny, task)
    assert {f"{site}.weight" for site in tiny.arch.text_linears()} == set(keys.sites())


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (SPEED(threshold=1e-12, **PLAIN), r"smallest singular value of the retained rows is \S+ of their mean, the threshold 1e-12,"),
        (SPEED(threshold=1e-12, **PLAIN), r"leaves [01] null directions, 0 for invariants, and nothing .*; raise threshold or preserve"),
        (SPEED(threshold=1e-4, invariants=9, prior_filter=False), r"leaves (\d+) null directions, \1 for invariants, and nothing of the"),
        (SPEED(augmentations=-1), "augmentations is -1.*give 0 for none"),
        (SPEED(invariants=-1), "invariants is -1.*give 0 for none"),
        (SPEED(retain_scale=0.0), r"raise retain_scale \(now 0\)"),
    ],
)
def test_options_without_a_solution_say_what_to_change(tiny: Model, method: SPEED, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        method.fit(tiny, EraseTask(TASK.concepts, ("bird", "cow"), ("{}",)))
    assert "\n" not in str(error.value)


def test_centres_are_those_of_the_clusters() -> None:
    make = Generator().manual_seed(0)
    wanted = torch.tensor([[9.0, 0.0], [0.0, 9.0], [-9.0, -9.0]], dtype=torch.float64)
    rows = wanted.repeat_interleave(torch.tensor([5, 1, 20]), 0)
    rows = rows + 0.1 * torch.randn(rows.shape, generator=make, dtype=torch.float64)
    clusters = torch.stack([part.mean(0) for part in rows.split([5, 1, 20])])
    found = centres(rows, 3)
    nearest = torch.cdist(found, clusters).argmin(1)
    assert sorted(nearest.tolist()) == [0, 1, 2]
    torch.testing.assert_close(found, clusters[nearest])
    assert len(centres(rows[:1].expand(4, 2), 3)) == 1, "equal rows are one cluster"
    assert centres(rows, 0).shape == (0, 2)
