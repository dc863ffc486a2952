from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from trainers.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (12, 12)])
def test_orthogonalise_keeps_directions_and_levels_singular_values(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    made = orthogonalise(matrix)
    values = torch.diagonal(u.T @ made @ v.T)
    assert torch.allclose(u @ torch.diag(values) @ v, made, atol=1e-4), "singular vectors stay"
    assert values.min() > 0.6 and values.max() < 1.25
    assert torch.allclose(orthogonalise(matrix * 1000), made, atol=1e-3), "the scale of the gradient does not matter"


def test_everything_that_is_no_hidden_matrix_takes_the_steps_of_adamw() -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4))
    theirs = copy.deepcopy(ours)
    muon = Muon(ours.named_parameters(), 1e-2, betas=(0.9, 0.99), weight_decay=0.1, outer=("0",))
    adamw = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    for _ in range(5):
        x = torch.randn(7, 5)
        for module, optimizer in ((ours, muon), (theirs, adamw)):
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_hidden_step_has_the_size_of_an_adamw_step_whatever_the_gradient() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 32, 3, bias=False)
    before = conv.weight.detach().clone()
    optimizer = Muon(conv.named_parameters(), lr=1e-2)
    conv.weight.grad = torch.randn_like(conv.weight) * 1e-5
    optimizer.step()
    step = (conv.weight - before).square().mean().sqrt()
    assert 0.15e-2 < step < 0.25e-2  # 0.2 lr, times singular values of about 1


def test_it_learns_a_linear_map_and_resumes() -> None:
    torch.manual_seed(0)
    target, layer = torch.randn(6, 6), nn.Linear(6, 6, bias=False)
    optimizer = Muon(layer.named_parameters(), lr=0.1)
    for step in range(300):
        if step == 150:  # a fresh optimizer that takes over the state
            state, optimizer = optimizer.state_dict(), Muon(layer.named_parameters(), lr=0.1)
            optimizer.load_state_dict(state)
            assert "momentum" in optimizer.state[layer.weight]
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / 300)
        loss = (layer.weight - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1e-3
