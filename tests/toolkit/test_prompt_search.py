"""Prompt search: gradients reach every new row and nothing else, and the model is afterwards what it was."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from toolkit.edits.base import EditInfo
from toolkit.edits.low_rank import LowRank
from toolkit.edits.token import TokenEdit
from toolkit.errors import PalimpsestError, UserError
from toolkit.model import Model
from toolkit.prompt_search import TokenRows, search

PART = "text_encoder"


def state(model: Model) -> dict[str, Tensor]:
    return {f"{part}.{name}": p.clone() for part, module in model.arch.components().items() for name, p in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def towards(rows: TokenRows, prompt: str, goal: Tensor) -> Callable[[int], Tensor]:
    """How far a prompt is from a goal [77, d]."""
    return lambda step: (rows([prompt]).hidden[0] - goal).square().mean()


def test_every_row_receives_gradient_and_nothing_else_does(tiny: Model) -> None:
    with TokenRows(tiny, {"<a>": "cat", "<b>": "dog"}, vectors=3) as rows:
        rows(["a <a> and", "a photo of <b>"]).hidden.square().sum().backward()
        parameters = list(rows.parameters())
        assert [tuple(p.shape) for p in parameters] == [(3, 32), (3, 32)]
        for parameter in parameters:
            assert parameter.grad is not None and (parameter.grad.abs().sum(1) > 0).all()
        others = [p for module in tiny.arch.components().values() for p in module.parameters() if not any(p is row for row in parameters)]
        assert others and all(p.grad is None and not p.requires_grad for p in others)


def test_a_word_that_is_not_in_the_prompt_gets_no_gradient(tiny: Model) -> None:
    with TokenRows(tiny, {"<a>": None, "<b>": None}) as rows:
        rows(["a <a>"]).hidden.square().sum().backward()
        a, b = rows.parameters()
        assert a.grad is not None and a.grad.any() and (b.grad is None or not b.grad.any())


@pytest.mark.parametrize("raises", [False, True])
def test_the_model_is_afterwards_what_it_was(tiny: Model, raises: bool) -> None:
    before, embedding, tokenizer = state(tiny), tiny.arch.token_embeddings()[PART], tiny.arch.tokenizers()[PART]
    size, plain = len(tokenizer), tiny.arch.encode(["a <a> cat"])
    try:
        with TokenRows(tiny, {"<a>": "cat"}) as rows:
            search(rows, towards(rows, "a <a> cat", random(77, 32)), steps=3)
            if raises:
                raise RuntimeError
    except RuntimeError:
        assert raises
    assert same(state(tiny), before) and tiny.edits == ()
    assert tiny.arch.token_embeddings()[PART] is embedding and tiny.arch.tokenizers()[PART] is tokenizer and len(tokenizer) == size
    assert torch.equal(tiny.arch.encode(["a <a> cat"]).hidden, plain.hidden)


def test_the_edit_encodes_like_the_rows_did(tiny: Model) -> None:
    prompts = ["a <a> on a <b>", "<b><a>", "nothing new"]
    with TokenRows(tiny, {"<a>": "cat", "<b>": random(1, 32)}, vectors=2) as rows:
        search(rows, towards(rows, prompts[0], random(77, 32)), steps=3, lr=0.1)
        inside = rows(prompts).hidden.detach()
        edit = rows.edit(EditInfo("search", triggers=("<a>", "<b>")))
    assert edit.sites() == [f"{PART}:<a>", f"{PART}:<b>"] and edit.info.method == "search"
    assert [tuple(edit.delta(site).shape) for site in edit.sites()] == [(2, 32), (1, 32)]
    with tiny.attached(edit):
        assert torch.equal(tiny.arch.encode(prompts).hidden, inside)


def test_unlisted_words_are_in_the_model_but_not_among_its_edits(tiny: Model) -> None:
    before, rows = state(tiny), TokenRows(tiny, {"<a>": "cat"}, vectors=2)
    with pytest.raises(RuntimeError), rows.unlisted():
        assert tiny.edits == ()
        inside = rows(["a <a>"]).hidden
        raise RuntimeError
    assert same(state(tiny), before)
    with rows:
        assert torch.equal(rows(["a <a>"]).hidden, inside)


def test_only_the_new_rows_change(tiny: Model) -> None:
    table = tiny.arch.token_embeddings()[PART].weight.clone()
    with TokenRows(tiny, {"<a>": "cat"}, vectors=2) as rows:
        start = rows.edit().delta(f"{PART}:<a>")
        search(rows, towards(rows, "a <a>", random(77, 32)), steps=5, lr=0.1)
        extended = tiny.arch.token_embeddings()[PART].weight.detach()
        assert torch.equal(extended[: len(table)], table)
        assert torch.equal(extended[len(table) :], rows.edit().delta(f"{PART}:<a>"))
        assert (extended[len(table) :] != start).any(1).all()


def test_rows_start_where_they_are_told(tiny: Model) -> None:
    table, tokenizer = tiny.arch.token_embeddings()[PART].weight, tiny.arch.tokenizers()[PART]
    ids = tokenizer("plain cat", add_special_tokens=False).input_ids
    given = random(2, 32)

    def start(init: str | Tensor | None, vectors: int = 1, seed: int = 0) -> Tensor:
        return TokenRows(tiny, {"<a>": init}, vectors=vectors, seed=seed).edit().delta(f"{PART}:<a>")

    torch.testing.assert_close(start("plain cat"), table[ids].mean(0, keepdim=True))
    torch.testing.assert_close(start(None), table.mean(0, keepdim=True))
    assert torch.equal(start(given), given) and torch.equal(start(given[0], 5), given[:1])
    several = start("plain cat", len(ids) + 1)
    near = torch.stack([*table[ids], table[ids[0]]])
    distance = (several - near).std() / table.std()
    assert 0.05 < distance < 0.2, "the word's rows in turn, with a little noise"
    assert torch.equal(several, start("plain cat", len(ids) + 1)) and not torch.equal(several, start("plain cat", len(ids) + 1, 1))


def test_search_finds_known_rows_and_is_determined_by_its_seed(tiny: Model) -> None:
    with TokenRows(tiny, {"<a>": "dog"}) as rows:
        goal = rows(["a <a>"]).hidden[0].detach()

    def run(seed: int) -> tuple[list[float], Tensor]:
        with TokenRows(tiny, {"<a>": "cat"}) as rows:
            fixed = towards(rows, "a <a>", goal)
            losses = search(rows, lambda step: fixed(step) + 1e-4 * torch.randn(()), steps=40, seed=seed)
            return losses, rows.edit().delta(f"{PART}:<a>")

    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    (losses, found), (again, found_again), (other, _) = run(0), run(0), run(1)
    assert torch.equal(torch.randn(3), expected), "the global random state is not touched"
    assert len(losses) == 40 and losses[-1] < 0.2 * losses[0]
    assert losses == again and torch.equal(found, found_again) and losses != other


def test_search_can_keep_the_best_rows(tiny: Model) -> None:
    with TokenRows(tiny, {"<a>": "dog"}) as rows:
        goal, start = rows(["a <a>"]).hidden[0].detach(), rows.edit().delta(f"{PART}:<a>") + 1e-4
    for keep in (True, False):
        with TokenRows(tiny, {"<a>": start}) as rows:
            loss = towards(rows, "a <a>", goal)
            losses = search(rows, loss, steps=3, lr=1.0, keep_best=keep)  # a step that is far too long
            assert losses[0] == min(losses) < losses[-1] and (loss(0).item() == losses[0]) is keep


def test_search_stops_at_a_loss_that_is_not_finite(tiny: Model) -> None:
    with TokenRows(tiny, {"<a>": "cat"}) as rows, pytest.raises(PalimpsestError, match="nan at step 1; lower lr"):
        search(rows, lambda step: rows(["<a>"]).hidden.sum() * (float("nan") if step else 1.0), steps=3)


def test_rows_on_top_of_other_edits(tiny: Model) -> None:
    toy = TokenEdit.from_rows({"<toy>": {PART: random(2, 32)}})
    site, linear = next(iter(tiny.arch.text_linears().items()))
    low_rank = LowRank.from_deltas({site: random(*linear.weight.shape)})
    tiny.attach(toy)
    with TokenRows(tiny, {"<a>": "cat"}) as rows:
        expected = rows(["a <toy> and a <a>"]).hidden
        with tiny.attached(low_rank):
            hidden = rows(["a <toy> and a <a>"]).hidden
            assert torch.equal(hidden, expected)
            hidden.sum().backward()
            (row,) = rows.parameters()
            assert row.grad is not None and row.grad.any()
    assert [edit for edit, _ in tiny.edits] == [toy]


@pytest.mark.parametrize(
    ("tokens", "vectors", "message"),
    [
        ({"<a>": "cat"}, 0, "0 vectors"),
        ({"<a>": " "}, 1, "has no tokens"),
        ({"<A>": "cat"}, 1, "not one lower-case word"),
        ({"<a>": torch.zeros(2, 31)}, 1, r"\[2, 31\], this model needs \[2, 32\]"),
        ({"a</w>": "cat"}, 1, "already a word"),
    ],
)
def test_mistakes_are_told_and_leave_the_model(tiny: Model, tokens: dict, vectors: int, message: str) -> None:
    embedding = tiny.arch.token_embeddings()[PART]
    with pytest.raises(UserError, match=message), TokenRows(tiny, tokens, vectors=vectors):
        pass
    assert tiny.arch.token_embeddings()[PART] is embedding and tiny.edits == ()


def test_an_offloaded_model_is_refused(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(tiny.arch), "device", torch.device("meta"))  # where its parts would visit in turn
    with pytest.raises(UserError, match="without --offload"):
        TokenRows(tiny, {"<a>": "cat"})
