"""Edit kinds: what they hold is what they say, in the smaller form, and sums and halves are sums and halves."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from toolkit.edits.base import Edit, EditInfo
from toolkit.edits.chain import Chain
from toolkit.edits.delta import Delta
from toolkit.edits.low_rank import LowRank
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError
from toolkit.model import Model

A, B, C = "denoiser.a.to_k", "denoiser.b.to_k", "text_encoder.c.q_proj"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(edit: Edit) -> int:
    """Numbers in the edit's file."""
    return sum(tensor.numel() for tensor in edit.tensors().values())


def again(edit: Edit) -> Edit:
    return type(edit).from_tensors(edit.tensors(), edit.info)


# --- low rank -------------------------------------------------------------------------------------------------------
def test_low_rank_shares_a_down_factor() -> None:
    down, ups = random(3, 32), {A: random(20, 3, seed=1), B: random(40, 3, seed=2)}
    edit = LowRank.from_factors({site: (up, down) for site, up in ups.items()})
    assert sorted(edit.tensors()) == ["down.0", f"up.0.{A}", f"up.0.{B}"] and stored(edit) == 3 * 32 + 3 * 60
    assert edit.sites() == [f"{A}.weight", f"{B}.weight"] and edit.shape(f"{B}.weight") == (40, 32)
    for site, up in ups.items():
        assert torch.equal(edit.delta(site), up @ down) and torch.equal(again(edit).delta(f"{site}.weight"), up @ down)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(1, 40))
def test_low_rank_takes_the_smaller_form(columns: int, rows: list[int], rank: int) -> None:
    down = random(rank, columns)
    factors = {f"denoiser.{i}": (random(out, rank, seed=i), down) for i, out in enumerate(rows)}
    edit = LowRank.from_factors(factors)
    assert stored(edit) == min(sum(rows) * columns, rank * (sum(rows) + columns))
    for site, (up, _) in factors.items():
        torch.testing.assert_close(edit.delta(site), up @ down)


def test_low_rank_finds_the_rank_of_a_change() -> None:
    change, full = random(30, 4) @ random(4, 50, seed=1), random(20, 20)
    edit = LowRank.from_deltas({A: change, B: full})
    assert edit.up[A].shape == (30, 4) and edit.down[A].shape == (4, 50)
    torch.testing.assert_close(edit.delta(A), change, atol=1e-5, rtol=1e-5)
    assert torch.equal(edit.delta(B), full) and sorted(edit.dense) == [B]
    best = LowRank.from_deltas({A: full}, rank=3)
    error = torch.linalg.matrix_norm(full - best.delta(A))
    torch.testing.assert_close(error, torch.linalg.svdvals(full)[3:].square().sum().sqrt())


def test_low_rank_is_a_copy_cut_off_from_training() -> None:
    up, down = torch.nn.Parameter(random(20, 2)), torch.nn.Parameter(random(2, 30))
    edit = LowRank.from_factors({A: (up, down)})
    before = edit.delta(A)
    with torch.no_grad():
        up.add_(1)
    assert torch.equal(edit.delta(A), before) and not edit.up[A].requires_grad


def test_low_rank_merge_is_the_sum() -> None:
    down = random(2, 32)
    one = LowRank.from_factors({A: (random(20, 2), down), B: (random(40, 2), down)})
    two = LowRank.from_factors({B: (random(40, 3, seed=3), random(3, 32, seed=4))})
    three = LowRank.from_deltas({A: random(20, 32, seed=5)})
    merged = LowRank.merge([one, two, three], [1.0, -0.5, 2.0])
    torch.testing.assert_close(merged.delta(A), one.delta(A) + 2 * three.delta(A))
    torch.testing.assert_close(merged.delta(B), one.delta(B) - 0.5 * two.delta(B))
    both = LowRank.merge([one, LowRank.from_factors({site: (one.up[site], one.down[A]) for site in (A, B)})])
    assert sorted(both.tensors()) == ["down.0", f"up.0.{A}", f"up.0.{B}"], "sites that shared a factor share the merged one"


@pytest.mark.parametrize("delta", [random(12, 12), random(12, 3) @ random(3, 40)], ids=["dense", "factors"])
def test_low_rank_factors_multiply_to_the_change(delta: Tensor) -> None:
    edit = LowRank.from_deltas({A: delta})
    up, down = edit.factors(f"{A}.weight")
    torch.testing.assert_close(up @ down, delta, atol=1e-5, rtol=1e-5)


def test_low_rank_rejects_what_does_not_belong_together() -> None:
    up, down = random(20, 3), random(3, 32)
    for tensors, what in [
        ({f"up.0.{A}": up}, "lacks tensor down.0"),
        ({"down.0": down}, "'down.0' that belongs to no layer"),
        ({f"up.0.{A}": up, "down.0": random(4, 32)}, r"up \(20, 3\) and down \(4, 32\)"),
        ({f"dense.{A}": random(3)}, r"\(3,\), need one \[out, in\]"),
        ({"other": up}, "belongs to no layer"),
    ]:
        with pytest.raises(UserError, match=what):
            LowRank.from_tensors(tensors, EditInfo())
    with pytest.raises(UserError, match="one factor of two"):
        LowRank(EditInfo(), {A: up}, {})
    with pytest.raises(UserError, match=r"unknown site 'denoiser\.a\.to_v'; did you mean"):
        LowRank.from_factors({A: (up, down)}).delta("denoiser.a.to_v")


# --- delta ----------------------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 60), st.integers(0, 10_000))
def test_delta_takes_the_smaller_form(entries: int, seed: int) -> None:
    change = torch.zeros(60)
    change[torch.randperm(60, generator=torch.Generator().manual_seed(seed))[:entries]] = random(entries, seed=seed)
    change = change.view(3, 4, 5)
    edit = Delta.from_deltas({"denoiser.conv": change})
    if not entries:
        assert edit.sites() == []
        return
    assert (edit.sparse != {}) == (2 * entries < 60)
    assert torch.equal(edit.delta("denoiser.conv"), change) and torch.equal(again(edit).delta("denoiser.conv"), change)
    assert edit.shape("denoiser.conv") == (3, 4, 5)


def test_delta_merge_is_the_sum() -> None:
    sparse = torch.zeros(10)
    sparse[3] = 1.5
    one, two = Delta.from_deltas({"denoiser.x": random(10)}), Delta.from_deltas({"denoiser.x": sparse, "denoiser.y": sparse})
    merged = Delta.merge([one, two], [1.0, 2.0])
    assert torch.equal(merged.delta("denoiser.x"), random(10) + 2 * sparse)
    assert torch.equal(merged.delta("denoiser.y"), 2 * sparse) and list(merged.sparse) == ["denoiser.y"]


def test_delta_rejects_damaged_entries() -> None:
    good = {"sparse.x|indices": torch.tensor([0, 3]), "sparse.x|values": random(2), "sparse.x|size": torch.tensor([2, 2])}
    assert Delta.from_tensors(good, EditInfo()).delta("x").shape == (2, 2)
    for bad, what in [
        ({**good, "sparse.x|indices": torch.tensor([0, 4])}, "outside its shape"),
        ({**good, "sparse.x|values": random(3)}, "outside its shape"),
        ({key: value for key, value in good.items() if "size" not in key}, "lacks one of"),
        ({"x": random(2)}, "belongs to no parameter"),
    ]:
        with pytest.raises(UserError, match=what):
            Delta.from_tensors(bad, EditInfo())


# --- tokens ---------------------------------------------------------------------------------------------------------
def test_token_spells_all_its_vectors(tiny: Model) -> None:
    rows = {"<toy>": random(3, 32), "<pet>": random(1, 32, seed=1)}
    plain = tiny.arch.encode(["a cat", "a photo of a <toy>"])
    embedding = tiny.arch.token_embeddings()["text_encoder"]
    edit = TokenEdit.from_rows({token: {"text_encoder": vectors} for token, vectors in rows.items()})
    assert edit.info.triggers == ("<toy>", "<pet>") and edit.sites() == ["text_encoder:<toy>", "text_encoder:<pet>"]
    assert torch.equal(again(edit).delta("text_encoder:<toy>"), rows["<toy>"])
    with tiny.attached(edit):
        text = tiny.arch.encode(["a cat", "a <pet> and <toy>, <pet>", "A <TOY>"])
        size = embedding.num_embeddings
        assert torch.equal(text.hidden[0], plain.hidden[0]), "prompts without the new words are encoded as before"
        new = [i - size for i in text.ids[1].tolist() if i >= size]
        assert new == [3, 0, 1, 2, 3] and [i - size for i in text.ids[2].tolist() if i >= size] == [0, 1, 2]
        table = tiny.arch.token_embeddings()["text_encoder"].weight
        assert torch.equal(table[:size], embedding.weight) and torch.equal(table[size:], torch.cat([*rows.values()]))
        eos = tiny.arch.pipe.tokenizer.eos_token_id
        assert text.ids[2][text.length[2] - 1] == eos and text.ids[2][text.length[2] - 2] == size + 2
    assert torch.equal(tiny.arch.encode(["a photo of a <toy>"]).ids, plain.ids[1:])


def test_token_that_prompts_cannot_name() -> None:
    for token in ("<Toy>", "my toy", ""):
        with pytest.raises(UserError, match="not one lower-case word"):
            TokenEdit.from_rows({token: {"text_encoder": random(32)}})
    with pytest.raises(UserError, match="need \\[vectors, d\\]"):
        TokenEdit.from_rows({"<toy>": {"text_encoder": random(0, 32)}})


def test_two_edits_with_one_word(tiny: Model) -> None:
    one, two = (TokenEdit.from_rows({"<toy>": {"text_encoder": random(32, seed=i)}}) for i in range(2))
    tiny.attach(one)
    with pytest.raises(UserError, match="'<toy>' is already a word"):
        tiny.attach(two)
    assert [pair[0] for pair in tiny.edits] == [one]
    assert tiny.arch.encode(["<toy>"]).length.tolist() == [3]


# --- chains ---------------------------------------------------------------------------------------------------------
def test_chain_is_its_parts_in_order() -> None:
    low_rank = LowRank.from_factors({A: (random(20, 2), random(2, 32))}, EditInfo(method="uce"))
    delta = Delta.from_deltas({f"{A}.weight": random(20, 32, seed=1), f"{C}.bias": random(7)})
    token = TokenEdit.from_rows({"<toy>": {"text_encoder": random(2, 32)}})
    chain = Chain.of([token, Chain.of([low_rank, delta], [0.5, 1.0])])
    assert chain.parts(2.0) == [(token, 2.0), (low_rank, 1.0), (delta, 2.0)]
    assert chain.sites() == ["text_encoder:<toy>", f"{A}.weight", f"{C}.bias"]
    assert chain.parameter_names() == [f"{A}.weight", f"{C}.bias"] and chain.info.triggers == ("<toy>",)
    expected = 0.5 * low_rank.delta(A) + delta.delta(f"{A}.weight")
    torch.testing.assert_close(chain.delta(f"{A}.weight"), expected)
    torch.testing.assert_close(chain.weight(f"{A}.weight", torch.ones(20, 32), 2.0), 1 + 2 * expected)
    assert chain.writes == {"tokens", "denoiser", "text_encoder"} and "text_encoder" in chain.reads
    assert [part["kind"] for part in chain.info.notes["parts"]] == ["token", "chain"]
    assert not chain.scalable and Chain.of([low_rank, delta]).scalable and chain.mergeable


def test_chain_errors() -> None:
    token = TokenEdit.from_rows({"<toy>": {"text_encoder": random(32)}})
    with pytest.raises(UserError, match="at least one edit"):
        Chain.of([])
    with pytest.raises(UserError, match="1 edits and 2 scales"):
        Chain.of([token], [1.0, 2.0])
    with pytest.raises(UserError, match="token edit cannot be scaled"):
        Chain.of([token], [0.5])
    chain = Chain.of([token])
    with pytest.raises(UserError, match="belongs to none"):
        Chain.from_tensors({"1.x": random(1)}, chain.info)


def test_edits_are_frozen() -> None:
    edit = LowRank.from_factors({A: (random(20, 2), random(2, 32))})
    with pytest.raises(dataclasses.FrozenInstanceError):
        edit.up = {}  # type: ignore[misc]


def test_info_survives_json() -> None:
    info = EditInfo("uce", {"lamb": 0.5}, {"dtype": "float32"}, ("esd",), ("<toy>",), {"x": 1})
    as_json = {**dataclasses.asdict(info), "on": ["esd"], "triggers": ["<toy>"]}
    assert EditInfo.from_json(as_json) == info
    for bad in ([], {"unknown": 1}):
        with pytest.raises(UserError, match="need an object with keys"):
            EditInfo.from_json(bad)
