"""RealEra's closed form on a tiny Stable Diffusion: its random embeddings are what they should be, and are erased and kept."""

from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from pipelines.closed_form.realera_embedding import RealEraEmbedding, around
from pipelines.closed_form.rows import Placed, TaskRows, encode_task
from pipelines.closed_form.uce import UCE
from toolkit.arch.flux import Flux
from toolkit.arch.sd3 import SD3
from toolkit.concepts import Concept, EraseTask
from toolkit.errors import UserError
from toolkit.model import Model

TASK = EraseTask((Concept("cat", ("kitten",), "dog"), Concept("monet", kind="style")), ("bird",), ("a {}",))


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def random_rows(width: int = 32, prompts: int = 3, length: int = 5) -> TaskRows:
    make = seeded()

    def prompt() -> Placed:
        return Placed(torch.randn(length, width, generator=make), 1, 3, (0, 1, 2, 3))

    return TaskRows(tuple((prompt(), prompt()) for _ in range(prompts)), (prompt(),), (prompt(),))


@pytest.mark.parametrize("width", [32, 768])
@pytest.mark.parametrize(("distance", "similarity"), [((0.0, 1.0), (0.5, 0.9)), ((1.0, 1.6), (-1.0, 0.5)), ((0.2, 0.4), (0.9, 1.0))])
def test_embeddings_are_within_the_radius_and_the_similarity(width: int, distance: tuple, similarity: tuple) -> None:
    rows = torch.randn(4, width, generator=seeded()) * torch.tensor([0.01, 1.0, 7.0, 300.0])[:, None]
    found = around(rows, 50, distance, similarity, seeded(1)).view(4, 50, width)
    own = rows.double()[:, None]
    away = (found - own).norm(dim=-1) / own.norm(dim=-1)
    cosine = torch.cosine_similarity(found, own, dim=-1)
    assert distance[0] - 1e-9 <= away.min() and away.max() <= distance[1] + 1e-9
    assert similarity[0] <= cosine.min() and cosine.max() <= similarity[1]
    norms = found.norm(dim=-1) / own.norm(dim=-1)
    assert norms.min() > 0.5 and norms.max() < 1.6, "about as long as the row"
    assert len(found.reshape(-1, width).unique(dim=0)) == 200


def test_embeddings_depend_on_the_seed_alone() -> None:
    rows = torch.randn(3, 16, generator=seeded())
    one, two, other = (around(rows, 4, (0.0, 1.0), (0.5, 0.9), seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert around(rows, 0, (0.0, 1.0), (0.5, 0.9), seeded()).shape == (0, 16)


def test_an_embedding_that_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match=r"found no embedding 0 to 0\.1 norms away with a similarity of 0\.5 to 0\.9 .*widen"):
        around(torch.ones(2, 8), 3, (0.0, 0.1), (0.5, 0.9), seeded())


def naive(weight: Tensor, moves: list[tuple[Tensor, Tensor]], keep: list[Tensor], a: float, p: float, lamb: float) -> Tensor:
    """The edited weight of one layer, row by row."""
    left, right = lamb * weight, lamb * torch.eye(weight.shape[1], dtype=torch.float64)
    for source, target in moves:
        left = left + a * torch.outer(weight @ target, source)
        right = right + a * torch.outer(source, source)
    for row in keep:
        left = left + p * torch.outer(weight @ row, row)
        right = right + p * torch.outer(row, row)
    return left @ torch.linalg.inv(right)


def test_it_is_uce_with_two_kinds_of_rows_more(tiny: Model) -> None:
    """The concept's last token is the row before EOT in these prompts; "monet" goes to the EOT of the empty prompt."""
    method = RealEraEmbedding(neighbours=2, beyond=3, seed=4, erase_scale=1.5, preserve_scale=0.3, lamb=0.4)
    edit = method.fit(tiny, TASK)
    text = tiny.arch.encode(["a cat", "a kitten", "a monet", "a dog", "", "a bird"])
    hidden, length = text.hidden.double(), text.length.tolist()
    concept = torch.stack([hidden[i, length[i] - 2] for i in range(3)])
    goals = [hidden[3, length[3] - 2], hidden[3, length[3] - 2], hidden[4, 1]]
    make = seeded(4)
    neighbours = around(concept, 2, (0.0, 1.0), (0.5, 0.9), make)
    beyond = around(concept, 3, (1.0, 1.6), (-1.0, 0.5), make)
    source, target = encode_task(tiny.arch, TASK, "empty_prompt")["hidden"].moved("all")
    moves = list(zip(source.double(), target.double(), strict=True))
    moves += [(neighbours[2 * i + k], goals[i]) for i in range(3) for k in range(2)]
    keep = [*hidden[4], *hidden[5], *beyond]
    for site, linear in tiny.arch.text_linears().items():
        weight = linear.weight.detach().double()
        wanted = naive(weight, moves, keep, 1.5, 0.3, 0.4) - weight
        assert (edit.delta(site).double() - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("family", [SD3, Flux])
def test_every_encoding_of_a_transformer_has_embeddings_of_its_own(family: Any) -> None:
    model, method, make = Model(family.tiny()), RealEraEmbedding(neighbours=2, beyond=3, seed=4), seeded(4)
    edit, texts = method.fit(model, TASK), encode_task(model.arch, TASK, "empty_prompt")
    for name, stream in model.arch.text_streams().items():
        concept, goals, keep = [], [], []
        for segment in stream.segments(model.arch.encode(["a cat", "a kitten", "a monet", "a dog", "", "a bird"])):
            rows, last = segment.rows.double(), [0] * 6 if segment.ids is None else (segment.length - 2).tolist()
            concept += [rows[i, last[i]] for i in range(3)]
            goals += [rows[3, last[3]], rows[3, last[3]], rows[4, segment.leading]]
            keep += [*rows[4], *rows[5]]
        neighbours = around(torch.stack(concept), 2, (0.0, 1.0), (0.5, 0.9), make)
        beyond = around(torch.stack(concept), 3, (1.0, 1.6), (-1.0, 0.5), make)
        source, target = texts[name].moved("all")
        moves = list(zip(source.double(), target.double(), strict=True))
        moves += [(neighbours[2 * i + k], goals[i]) for i in range(len(goals)) for k in range(2)]
        for site, linear in stream.linears.items():
            weight = linear.weight.detach().double()
            wanted = naive(weight, moves, [*keep, *beyond], 1.0, 0.1, 0.5) - weight
            assert (edit.delta(site).double() - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("rows", ["last_subject", "tail_aligned", "all"])
def test_without_random_embeddings_it_is_uce(tiny: Model, rows: str) -> None:
    edit = RealEraEmbedding(rows=rows, neighbours=0, beyond=0).fit(tiny, TASK)  # type: ignore[arg-type]
    wanted = UCE(rows=rows).fit(tiny, TASK)  # type: ignore[arg-type]
    assert edit.sites() == wanted.sites()
    assert all(torch.equal(edit.delta(site), wanted.delta(site)) for site in edit.sites())


def left_over(text: TaskRows, method: RealEraEmbedding) -> float:
    """How far new neighbours, from another seed, are from their target, of how far they were."""
    concept, goal = text.subjects("all")
    fresh = around(concept, 200, (0.0, 1.0), (0.5, 0.9), seeded(99))
    goals = goal.double().repeat_interleave(200, 0)
    return float((fresh @ method.change_of(text, seeded()).matrix().T - goals).norm() / (fresh - goals).norm())


def test_embeddings_that_it_never_saw_go_with_their_neighbours() -> None:
    text = random_rows()
    residuals = [left_over(text, RealEraEmbedding(neighbours=count, beyond=0, preserve_scale=0.0)) for count in (0, 50, 200)]
    assert residuals == sorted(residuals, reverse=True) and residuals[2] < 0.75 * residuals[0]


def test_embeddings_further_away_stay_better_with_rows_beyond() -> None:
    text, drift = random_rows(), []
    for count in (0, 3, 100):
        method = RealEraEmbedding(neighbours=20, beyond=count, preserve_scale=1.0)
        fresh = around(text.subjects("all")[0], 200, (1.0, 1.6), (-1.0, 0.5), seeded(99))
        drift.append(float((fresh @ method.change_of(text, seeded()).matrix().T - fresh).norm()))
    assert drift == sorted(drift, reverse=True) and drift[2] < 0.5 * drift[0]


def test_its_gradient_is_zero() -> None:
    text, method = random_rows(), RealEraEmbedding()
    d = method.change_of(text, seeded()).matrix() - torch.eye(32)
    make, (concept, goal), (source, target) = seeded(), text.subjects("all"), text.moved("all")
    rows = torch.cat([source, around(concept, 5, (0, 1.0), (0.5, 0.9), make)])
    goals = torch.cat([target, goal.repeat_interleave(5, 0)]).double()
    keep = torch.cat([text.keep("all"), around(concept, 3, (1.0, 1.6), (-1, 0.5), make)])
    rest = 0.1 * d @ keep.T @ keep + 0.5 * d
    assert ((rows @ d.T - (goals - rows)).T @ rows + rest).norm() <= 1e-8 * rest.norm()


@pytest.mark.parametrize("out", [320, 640, 1280])
def test_layers_as_wide_as_stable_diffusions(out: int) -> None:
    text, weight = random_rows(768, 20, 77), torch.randn(out, 768, generator=seeded(1)).double()
    make, (concept, goal), (source, target) = seeded(), text.subjects("all"), text.moved("all")
    c = torch.cat([source, around(concept, 5, (0.0, 1.0), (0.5, 0.9), make)])
    g = torch.cat([target, goal.repeat_interleave(5, 0)]).double()
    k = torch.cat([text.keep("all"), around(concept, 3, (1.0, 1.6), (-1.0, 0.5), make)])
    rest = 0.1 * k.T @ k + 0.5 * torch.eye(768, dtype=torch.float64)
    wanted = weight @ (g.T @ c + rest) @ torch.linalg.inv(c.T @ c + rest)
    changed = weight @ RealEraEmbedding().change_of(text, seeded()).matrix()
    assert (changed - wanted).norm() <= 1e-6 * (wanted - weight).norm()


def test_the_seed_and_nothing_else_is_random(tiny: Model) -> None:
    one, two, other = (RealEraEmbedding(seed=seed).fit(tiny, TASK) for seed in (0, 0, 1))
    site = one.sites()[0]
    assert torch.equal(one.delta(site), two.delta(site)) and not torch.equal(one.delta(site), other.delta(site))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (RealEraEmbedding(radius=0.0), "radius is 0 and beyond_radius 1.6.*set both"),
        (RealEraEmbedding(radius=2.0), "radius is 2 and beyond_radius 1.6.*set both"),
        (RealEraEmbedding(min_similarity=0.95), "min_similarity is 0.95 and max_similarity 0.9.*set both"),
        (RealEraEmbedding(neighbours=-1), "neighbours is -1.*give 0 for none"),
        (RealEraEmbedding(beyond=-2), "beyond is -2.*give 0 for none"),
        (RealEraEmbedding(radius=0.1), "found no embedding 0 to 0.1 norms away"),
    ],
)
def test_options_that_cannot_be_say_what_to_change(tiny: Model, method: RealEraEmbedding, message: str) -> None:
    with pytest.raises(UserError, match=message):
        method.fit(tiny, TASK)
