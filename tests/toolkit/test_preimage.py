"""What edited layers still answer as the original ones did, against least squares written out in float64."""

import pytest
import torch

from tests.toolkit.problems import problem, relative, solve
from toolkit.errors import UserError
from toolkit.solve import closed_form, joint_weight, moment_of, preimage, preimage_under, second_moment


@pytest.mark.parametrize("reg", [1e-6, 0.1, 3.0])
def test_preimage_is_the_ridge_least_squares_solution(reg):
    """Against lstsq on the stacked system [W; sqrt(reg) I] c' = [W0 c; 0], and by its gradient."""
    p = problem(16, 10, 4, 3, outs=(7, 12, 5))
    edited = [weight @ solve(p).matrix() for weight in p.weights]
    found = preimage(edited, p.weights, p.source, reg)
    stacked = torch.cat([*edited, reg**0.5 * torch.eye(10, dtype=torch.float64)])
    right = torch.cat([torch.cat(p.weights) @ p.source.T, torch.zeros(10, 4, dtype=torch.float64)])
    assert relative(found, torch.linalg.lstsq(stacked, right).solution.T) <= 1e-9
    residual = sum((found @ w.T - p.source @ w0.T) @ w for w, w0 in zip(edited, p.weights, strict=True))
    assert (residual + reg * found).norm() <= 1e-8 * sum((p.source @ w0.T @ w).norm() for w, w0 in zip(edited, p.weights, strict=True))


def test_preimage_under_unchanged_weights_is_the_row_itself():
    p = problem(17, 10, 4, 3)
    torch.testing.assert_close(preimage(p.weights, p.weights, p.source, 0.0), p.source, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("outs", [(7, 12, 5), (4, 3)])
def test_one_joint_weight_stands_for_all_layers(outs):
    p = problem(18, 10, 4, 3, outs=outs)
    joint, matrix = joint_weight(p.weights), solve(p).matrix()
    torch.testing.assert_close(joint.T @ joint, sum(w.T @ w for w in p.weights), rtol=1e-10, atol=1e-10)
    layers = preimage([weight @ matrix for weight in p.weights], p.weights, p.source, 0.1)
    torch.testing.assert_close(preimage([joint @ matrix], [joint], p.source, 0.1), layers, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("reg", [1e-6, 0.1])
@pytest.mark.parametrize(("width", "n"), [(10, 4), (10, 30), (300, 7)])
def test_preimage_under_one_change_is_that_of_all_layers(width, n, reg):
    """Twice: after a change, and after the next one, whose rows are partly the same."""
    p = problem(26, width, n, 3, outs=(width + 7, 12))
    moment, change = moment_of(p.weights), solve(p)
    for _ in range(2):
        found = preimage_under(change, moment, p.source, reg)
        wanted = preimage([weight @ change.matrix() for weight in p.weights], p.weights, p.source, reg)
        assert relative(found, wanted) <= 1e-7
        change = change.then(closed_form(torch.cat([p.source, wanted]), torch.cat([p.target, p.target]), p.keep))


def test_moment_of_parts_is_that_of_all_their_rows():
    parts = [torch.randn(n, 300, generator=torch.Generator().manual_seed(n)) for n in (5, 600, 1)]
    rows = torch.cat(parts).double()
    for found in (moment_of(parts), second_moment(torch.cat(parts))):
        torch.testing.assert_close(found, rows.T @ rows, rtol=1e-12, atol=1e-11)


def test_preimage_without_ridge_of_a_narrow_model_says_the_cure():
    p = problem(19, 10, 4, 3, outs=(4,))
    with pytest.raises(UserError, match=r"singular.*raise reg \(now 0\)"):
        preimage(p.weights, p.weights, p.source, 0.0)
