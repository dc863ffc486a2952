"""The closed-form solver against a naive one that does what the papers' equations say, layer by layer, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.toolkit.problems import Problem, naive, objective, problem, relative, solve
from toolkit.errors import UserError
from toolkit.solve import Sums, closed_form, exact, second_moment, shares

scale = st.floats(0.05, 20)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.integers(2, 20), st.integers(1, 30), st.integers(0, 30), scale, scale, scale)
def test_is_the_minimiser_and_agrees_with_the_naive_solution(seed, width, n, m, a, b, lamb):
    """Both systems (d x d and as wide as the rows) are reached: n + m lies on either side of the width."""
    p = problem(seed, width, n, m)
    change = solve(p, a, b, lamb)
    for weight in p.weights:
        edited = (weight @ change.matrix()).requires_grad_()
        (gradient,) = torch.autograd.grad(objective(edited, weight, p, a, b, lamb), edited)
        at_start = weight.clone().requires_grad_()
        (gradient_at_start,) = torch.autograd.grad(objective(at_start, weight, p, a, b, lamb), at_start)
        assert gradient.norm() <= 1e-8 * gradient_at_start.norm()
        assert relative(edited.detach() - weight, naive(weight, p, a, b, lamb) - weight) <= 1e-6


@pytest.mark.parametrize(("n", "m"), [(3, 60), (400, 500)])
def test_agrees_with_the_naive_solution_at_the_size_of_sd1(n, m):
    """768 wide rows whose norm is that of CLIP's (about 28), with a strong common direction as BOS and padding have."""
    p = problem(1, 768, n, m, outs=(96, 320))
    for rows in (p.source, p.target, p.keep):
        rows[:, 0] += 20
    change = solve(p)
    for weight in p.weights:
        assert relative(weight @ change.u @ change.v, naive(weight, p, 1.0, 1.0, 0.5) - weight) <= 1e-6


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.integers(2, 20), st.integers(1, 10), st.integers(0, 10), scale)
def test_a_prior_is_as_good_as_its_rows(seed, width, n, m, b):
    """Kept rows may come as their weighted second moment, whichever system the rows alone would have taken."""
    p = problem(seed, width, n, m)
    expected = solve(p, b=b).matrix()
    prior = b * second_moment(p.keep)
    given_moment = closed_form(p.source, p.target, p.keep[:0], lamb=0.5, prior=prior).matrix()
    assert relative(given_moment, expected) <= 1e-8
    assert torch.equal(prior, b * second_moment(p.keep)), "the caller's prior is not changed"


def test_float32_rows_are_solved_in_float64():
    p = problem(2, 12, 5, 9)
    rough = Problem(p.weights, p.source.float(), p.target.float(), p.keep.float())
    exact = Problem(p.weights, rough.source.double(), rough.target.double(), rough.keep.double())
    assert torch.equal(solve(rough).matrix(), solve(exact).matrix())


def test_many_kept_rows_are_summed_in_blocks(monkeypatch):
    p = problem(3, 6, 4, 50)
    whole = solve(p).matrix()
    monkeypatch.setattr("toolkit.solve._BLOCK", 7)
    torch.testing.assert_close(solve(p).matrix(), whole, rtol=1e-10, atol=1e-12)


def test_kept_rows_stay_as_their_weight_grows():
    p = problem(4, 16, 3, 5)
    drift = [float((p.keep @ (solve(p, b=b).matrix().T - torch.eye(16))).norm()) for b in (0.1, 1e2, 1e5, 1e8)]
    assert drift == sorted(drift, reverse=True) and drift[0] > 1e-2 and drift[-1] < 1e-7


def test_a_large_lamb_leaves_the_weights_alone():
    p = problem(5, 16, 3, 5)
    identity = torch.eye(16, dtype=torch.float64)
    sizes = [float((solve(p, lamb=lamb).matrix() - identity).norm()) for lamb in (1, 1e3, 1e6, 1e9)]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 1e-6


@pytest.mark.parametrize("lamb", [1e-9, 0.0])
def test_independent_rows_reach_their_target_as_lamb_goes_to_zero(lamb):
    p = problem(6, 16, 4, 6)
    matrix = solve(p, lamb=lamb).matrix()
    assert relative(p.source @ matrix.T, p.target) < 1e-7
    assert relative(p.keep @ matrix.T, p.keep) < 1e-7


@pytest.mark.parametrize(("n", "width"), [(3, 20), (20, 8)])
def test_rank_is_at_most_the_edited_rows(n, width):
    change = solve(problem(7, width, n, 40))
    assert torch.linalg.matrix_rank(change.u @ change.v) == min(n, width) >= change.compressed().rank


def test_compressing_drops_only_what_is_zero():
    p = problem(8, 20, 6, 4)
    p.target[1] = p.source[1]  # a row that stays
    p.source[3], p.target[3] = p.source[2], p.target[2]  # a row given twice
    change = solve(p)
    small = change.compressed()
    assert (change.rank, small.rank) == (6, 4)
    torch.testing.assert_close(small.matrix(), change.matrix(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(small.u.T @ small.u, small.v @ small.v.T, rtol=1e-9, atol=1e-9)


def test_order_of_rows_does_not_matter():
    p = problem(9, 10, 6, 8)
    other = Problem(p.weights, p.source.flip(0), p.target.flip(0), p.keep.flip(0))
    torch.testing.assert_close(solve(p).matrix(), solve(other).matrix(), rtol=1e-10, atol=1e-12)


def test_weighing_a_row_twice_is_giving_it_twice():
    p = problem(10, 10, 3, 4)
    twice = Problem(p.weights, torch.cat([p.source] * 2), torch.cat([p.target] * 2), torch.cat([p.keep] * 2))
    torch.testing.assert_close(solve(twice).matrix(), solve(p, a=2, b=2).matrix(), rtol=1e-10, atol=1e-12)


def test_then_composes_exactly():
    p, q = problem(11, 9, 3, 2), problem(12, 9, 4, 2)
    first, second = solve(p), solve(q)
    both = first.then(second)
    torch.testing.assert_close(both.matrix(), first.matrix() @ second.matrix(), rtol=1e-12, atol=1e-12)
    assert both.rank == first.rank + second.rank
    again = Problem(p.weights, torch.cat([p.source, q.source]), torch.cat([p.target, q.target]), p.keep)
    twice = first.then(solve(again))
    torch.testing.assert_close(twice.matrix(), first.matrix() @ solve(again).matrix(), rtol=1e-12, atol=1e-12)
    assert twice.rank == 3 + 4, "the same rows were moved to the same targets, so their columns are held once"


@pytest.mark.parametrize("width", [4, 30])
def test_a_singular_system_says_its_condition_and_the_cure(width):
    p = problem(13, width, 2, 3)
    p.source[1] = p.source[0]
    p.keep[:] = p.keep[0]
    with pytest.raises(UserError, match=r"condition number (inf|[1-9.]+e\+\d\d)\); raise uce_lamb \(now 0\)$"):
        closed_form(p.source, p.target, p.keep, lamb=0.0, option="uce_lamb")
    closed_form(p.source, p.target, p.keep, lamb=1e-3)


@pytest.mark.parametrize(
    "scales", [{"erase_scale": 0.0}, {"erase_scale": -1.0}, {"preserve_scale": -0.1}, {"lamb": -1.0}, {"lamb": float("nan")}]
)
def test_bad_weights_are_refused_by_name(scales):
    p = problem(14, 6, 2, 3)
    with pytest.raises(UserError, match=f"^{next(iter(scales))} is "):
        closed_form(p.source, p.target, p.keep, **scales)


def test_rows_that_are_not_finite_are_refused():
    p = problem(15, 6, 2, 3)
    p.keep[1, 2] = float("inf")
    with pytest.raises(UserError, match="not finite"):
        solve(p)


def fused(p: Problem, count: int = 3, r: int = 2) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Changes dW_k of every layer, and the rows C_k [n, d] on which each should hold."""
    make = torch.Generator().manual_seed(20)
    width = p.source.shape[1]
    changes = [
        [torch.randn(len(w), r, generator=make).double() @ torch.randn(r, width, generator=make).double() for w in p.weights]
        for _ in range(count)
    ]
    return changes, [torch.randn(6, width, generator=make, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize(("width", "outs"), [(12, (7, 24)), (768, (320,))])
def test_shares_of_changes_fuse_them_as_one_solve_for_each_layer_would(width, outs):
    p = problem(20, width, 1, 30, outs=outs)
    changes, rows = fused(p)
    keep, lamb = second_moment(p.keep), 0.3
    found = shares([second_moment(own) for own in rows], keep, lamb)
    for layer, w in enumerate(p.weights):
        left, right = lamb * w + w @ keep, lamb * torch.eye(width, dtype=torch.float64) + keep
        for change, own in zip(changes, rows, strict=True):
            for c in own:
                left.addr_((w + change[layer]) @ c, c)
                right.addr_(c, c)
        edited = w + sum(change[layer] @ share for change, share in zip(changes, found, strict=True))
        assert relative(edited - w, left @ torch.linalg.inv(right) - w) <= 1e-6

        free = edited.clone().requires_grad_()
        terms = [((free - w - change[layer]) @ own.T).square().sum() for change, own in zip(changes, rows, strict=True)]
        total = sum(terms) + ((free - w) @ p.keep.T).square().sum() + lamb * (free - w).square().sum()
        scale = sum((change[layer] @ own.T @ own).norm() for change, own in zip(changes, rows, strict=True))
        assert torch.autograd.grad(total, free)[0].norm() <= 1e-8 * scale


def test_one_change_with_nothing_to_keep_is_itself():
    p = problem(21, 6, 1, 0)
    _, rows = fused(p, 1)
    (share,) = shares([second_moment(rows[0])], torch.zeros(6, 6, dtype=torch.float64), 0.0)
    torch.testing.assert_close(share, torch.eye(6, dtype=torch.float64), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("width", "n"), [(12, 5), (768, 40)])
def test_exact_values_at_the_rows_and_the_least_change_elsewhere(width, n):
    """Against the Lagrange conditions solved as one linear system."""
    p = problem(22, width, n, 30, outs=(9,))
    lamb, value = 0.4, torch.randn(9, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    change = value @ exact(p.source, second_moment(p.keep), lamb, 1e-9)
    assert relative(change @ p.source.T, value) <= 1e-9
    a = lamb * torch.eye(width, dtype=torch.float64) + p.keep.T @ p.keep
    system = torch.cat([torch.cat([a, p.source.T], 1), torch.cat([p.source, torch.zeros(n, n)], 1)])
    solved = torch.linalg.solve(system, torch.cat([torch.zeros(width, 9), value.T]).double())
    assert relative(change, solved[:width].T) <= 1e-8


def test_exact_values_at_rows_given_twice_and_almost_twice():
    p = problem(23, 12, 4, 30)
    keep, value = second_moment(p.keep), torch.ones(3, 4, dtype=torch.float64)
    once = value @ exact(p.source, keep, 0.4, 1e-6)
    near = p.source + 1e-9 * torch.randn(4, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for other in (p.source, near):
        twice = torch.cat([value, value], 1) @ exact(torch.cat([p.source, other]), keep, 0.4, 1e-6)
        assert relative(twice, once) <= 1e-6


@pytest.mark.parametrize(
    ("given", "message"),
    [((0.0, 1e-6), r"singular .* raise lamb \(now 0\)"), ((-1.0, 1e-6), "lamb is -1.0"), ((0.1, 0.0), "tolerance is 0.0")],
)
def test_exact_values_need_a_metric_and_a_tolerance(given, message):
    p = problem(24, 12, 4, 5)
    with pytest.raises(UserError, match=message):
        exact(p.source, second_moment(p.keep), *given)


@pytest.mark.parametrize(("lamb", "message"), [(0.0, r"singular .* raise lamb \(now 0\)"), (float("nan"), "lamb is nan")])
def test_shares_need_a_metric(lamb, message):
    p = problem(25, 12, 4, 5)
    with pytest.raises(UserError, match=message):
        shares([second_moment(p.source)], second_moment(p.keep), lamb)


@pytest.mark.parametrize(("width", "n", "m"), [(20, 3, 50), (20, 60, 5), (300, 5000, 40)])
def test_rows_that_come_a_few_at_a_time_have_the_same_solution(width, n, m):
    p = problem(3, width, n, m)
    sums = Sums(width, torch.device("cpu"))
    for source, target in zip(p.source.split(7), p.target.split(7), strict=True):
        sums.move(source, target, 2.0)
    for keep in p.keep.split(3):
        sums.keep(keep, 0.3)
    change, again = sums.change(0.7), sums.change(0.7)
    one = torch.eye(width)
    assert relative(change.matrix() - one, solve(p, 2.0, 0.3, 0.7).matrix() - one) <= 1e-10
    assert torch.equal(change.matrix(), again.matrix()) and change.rank == min(width, n)


def test_sums_of_rows_that_stay_change_nothing():
    p, sums = problem(4, 12, 5, 9), Sums(12, torch.device("cpu"))
    sums.move(p.source, p.source, 1.0)
    sums.keep(p.keep, 1.0)
    assert sums.change(0.5).compressed().rank == 0
    with pytest.raises(UserError, match=r"raise lamb \(now 0\)"):
        Sums(12, torch.device("cpu")).change(0.0)
