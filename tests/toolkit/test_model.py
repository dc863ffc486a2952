"""Attaching and detaching: what is promised bit for bit is tested bit for bit."""

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from toolkit.arch.sd import SD
from toolkit.edits.base import Edit, EditInfo
from toolkit.edits.chain import Chain
from toolkit.edits.delta import Delta
from toolkit.edits.low_rank import LowRank
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError
from toolkit.model import Model, load_model

EMBEDDING = "text_encoder.embeddings.token_embedding.weight"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(model: Model, seed: int = 0, rank: int = 2) -> LowRank:
    """An edit of every layer that reads text, with one shared down factor."""
    down = random(rank, 32, seed=seed)
    linears = model.arch.text_linears()
    return LowRank.from_factors({site: (random(linear.out_features, rank, seed=seed), down) for site, linear in linears.items()})


def delta(seed: int = 0) -> Delta:
    """A dense change of a convolution and a sparse one of the token embedding."""
    rows = torch.zeros(len(SD.tiny().tokenizers()["text_encoder"]), 32)
    rows[5 + seed] = random(32, seed=seed)
    return Delta.from_deltas({"denoiser.conv_in.weight": random(8, 4, 3, 3, seed=seed), EMBEDDING: rows})


def word(token: str, vectors: int = 1, seed: int = 0) -> TokenEdit:
    return TokenEdit.from_rows({token: {"text_encoder": random(vectors, 32, seed=seed)}})


@dataclass(frozen=True, eq=False)
class Broken(Edit):
    """Changes one parameter, and raises at its second one or when it enters."""

    where: str = "weight"
    mergeable = False
    scalable = True
    exports = ()

    def tensors(self) -> dict[str, Tensor]:
        return {}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], info: EditInfo) -> "Broken":
        return cls(info)

    def sites(self) -> list[str]:
        return self.parameter_names()

    def parameter_names(self) -> list[str]:
        return ["denoiser.conv_in.weight", "denoiser.conv_in.bias"]

    def delta(self, site: str) -> Tensor:
        return torch.ones(8, 4, 3, 3) if site.endswith("weight") else torch.ones(8)

    def weight(self, name: str, current: Tensor, scale: float) -> Tensor:
        if self.where == "weight" and name.endswith("bias"):
            raise RuntimeError("broken weight")
        return super().weight(name, current, scale)

    def enter(self, model: Model, scale: float = 1.0) -> Any:
        if self.where == "enter":
            raise RuntimeError("broken enter")

    @property
    def reads(self) -> frozenset[str]:
        return frozenset()

    writes = reads


def state(model: Model) -> dict[str, Any]:
    """Everything that must be restored: values, the storage they lie in, embedding and tokenizer objects and their words."""
    modules = model.arch.components()
    parameters = {f"{part}.{name}": p for part, module in modules.items() for name, p in module.named_parameters()}
    return {
        "values": {name: p.detach().clone() for name, p in parameters.items()},
        "places": {name: (id(p), p.data_ptr()) for name, p in parameters.items()},
        "embeddings": {part: id(module) for part, module in model.arch.token_embeddings().items()},
        "tokenizers": {part: (id(tokenizer), tokenizer.get_vocab()) for part, tokenizer in model.arch.tokenizers().items()},
        "vocabulary": model.arch.pipe.text_encoder.config.vocab_size,
    }


def assert_same(one: dict[str, Any], other: dict[str, Any], *, places: bool = True) -> None:
    assert one["values"].keys() == other["values"].keys()
    for name, value in one["values"].items():
        assert torch.equal(value, other["values"][name]), name
    if places:
        assert {key: one[key] for key in one if key != "values"} == {key: other[key] for key in other if key != "values"}


def by_hand(base: dict[str, Tensor], edits: tuple[tuple[Edit, float], ...]) -> dict[str, Tensor]:
    """The values that attached edits must give, without the model's own code."""
    values = {name: value.clone() for name, value in base.items()}
    rows = []
    for edit, scale in edits:
        for part, own in zip(edit.edits, edit.scales, strict=True) if isinstance(edit, Chain) else [(edit, scale)]:
            if isinstance(part, TokenEdit):
                rows += [vectors["text_encoder"] for vectors in part.tokens.values()]
            for name in part.parameter_names():
                values[name] = values[name] + own * part.delta(name)
    values[EMBEDDING] = torch.cat([values[EMBEDDING], *rows])
    return values


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, 7), st.sampled_from([1.0, 0.5, -2.0])), max_size=12))
def test_any_order_of_attaching_and_detaching(steps: list[tuple[int, float]]) -> None:
    model = Model(SD.tiny())
    base = state(model)
    chain = Chain.of([word("<chained>", 2, seed=5), low_rank(model, 6), delta(7)], [1.0, 0.5, 1.0])
    edits = [low_rank(model), low_rank(model, 1), delta(), delta(1), word("<toy>"), word("<pet>", 3), chain, Broken(EditInfo())]
    attached: list[tuple[Edit, float]] = []
    for number, scale in steps:
        edit = edits[number]
        if any(edit is other for other, _ in attached):
            model.detach(edit)
            attached = [pair for pair in attached if pair[0] is not edit]
        elif isinstance(edit, Broken):
            with pytest.raises(RuntimeError, match="broken"):
                model.attach(edit)
        else:
            scale = 1.0 if isinstance(edit, TokenEdit | Chain) else scale
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.attach(edit, scale)
            attached.append((edit, scale))
        assert model.edits == tuple(attached)
        expected = by_hand(base["values"], model.edits)
        for name, value in state(model)["values"].items():
            assert torch.equal(value, expected[name]), name
    model.detach_all()
    assert model.edits == ()
    assert_same(base, state(model))


@pytest.mark.parametrize("where", ["weight", "enter"])
def test_an_exception_while_attaching_leaves_the_model_as_before(tiny: Model, where: str) -> None:
    edit, token = low_rank(tiny), word("<toy>")
    base = state(tiny)
    tiny.attach(edit)
    tiny.attach(token)
    before = state(tiny)
    with pytest.raises(RuntimeError, match="broken"):
        tiny.attach(Broken(EditInfo(), where))
    assert_same(before, state(tiny), places=False)
    assert [pair[0] for pair in tiny.edits] == [edit, token]
    with pytest.raises(RuntimeError, match="broken"):
        tiny.attach(Chain.of([low_rank(tiny, 1), word("<pet>"), Broken(EditInfo(), where)]))
    assert_same(before, state(tiny), places=False)
    tiny.detach_all()
    assert_same(base, state(tiny))


def test_the_context_manager_restores_also_on_exceptions(tiny: Model) -> None:
    kept = low_rank(tiny)
    tiny.attach(kept)
    before = state(tiny)
    with pytest.raises(ZeroDivisionError), tiny.attached(delta(), word("<toy>")) as inside:
        assert inside is tiny and len(tiny.edits) == 3
        tiny.detach(kept)
        raise ZeroDivisionError
    assert_same(before, state(tiny), places=False)
    with pytest.raises(RuntimeError, match="broken"), tiny.attached(delta(), Broken(EditInfo())):
        pass
    assert tiny.edits == ((kept, 1.0),)
    with tiny.attached(delta(), scale=0.5):
        assert tiny.edits[1][1] == 0.5


def test_half_precision_is_computed_in_float32_and_rounded_once(tiny: Model) -> None:
    base = {site: linear.weight.detach().clone() for site, linear in tiny.arch.text_linears().items()}
    one, two = low_rank(tiny), low_rank(tiny, 1)
    tiny.to(dtype=torch.bfloat16)
    rounded = state(tiny)
    tiny.attach(one)
    tiny.attach(two, 0.5)
    for site, linear in tiny.arch.text_linears().items():
        expected = base[site].bfloat16().float() + one.delta(site) + 0.5 * two.delta(site)
        assert torch.equal(linear.weight, expected.bfloat16())
    tiny.detach(one)
    tiny.detach(two)
    assert_same(rounded, state(tiny))


def test_moving_a_model_keeps_its_edits(tiny: Model) -> None:
    edit, token = low_rank(tiny), word("<toy>")
    tiny.attach(edit)
    tiny.attach(token)
    other = Model(SD.tiny()).to(dtype=torch.float64)
    other.attach(edit)
    other.attach(token)
    assert tiny.to(dtype=torch.float64) is tiny and tiny.arch.dtype == torch.float64
    assert_same(state(other), state(tiny), places=False)
    with pytest.raises(UserError, match="cannot move the model to nowhere"):
        tiny.to("nowhere")
    assert_same(state(other), state(tiny), places=False)


def test_reference_is_independent(tiny: Model) -> None:
    first, second, token = low_rank(tiny), delta(), word("<toy>")
    base = state(tiny)
    tiny.attach(first, 0.5)
    tiny.attach(token)
    before = state(tiny)
    plain, same, mixed = tiny.reference(), tiny.reference(tiny.edits), tiny.reference([second])
    assert_same(before, state(tiny), places=False)
    assert_same(base, state(plain), places=False)
    assert_same(before, state(same), places=False)
    assert [pair[0] for pair in mixed.edits] == [second] and mixed.fingerprint == tiny.fingerprint
    assert plain.arch.components()["vae"] is tiny.arch.components()["vae"]
    with torch.no_grad():
        for parameter in tiny.arch.components()["denoiser"].parameters():
            parameter.add_(1)
        tiny.arch.token_embeddings()["text_encoder"].weight.zero_()
    assert_same(base, state(plain), places=False)
    assert not any(p.requires_grad for part in plain.arch.components().values() for p in part.parameters())


def test_edits_that_do_not_fit(tiny: Model) -> None:
    before = state(tiny)
    site = next(iter(tiny.arch.text_linears()))
    with pytest.raises(UserError, match=r"attn2.to_k.weight is \[7, 32\], the parameter of sd is \[8, 32\]"):
        tiny.attach(LowRank.from_deltas({site: random(7, 32)}))
    with pytest.raises(UserError, match=r"denoiser\.nothing\.weight, which sd"):
        tiny.attach(LowRank.from_deltas({"denoiser.nothing": random(7, 32)}))
    with pytest.raises(UserError, match=r"text_encoder:<toy> are \[1, 16\], this model needs \[1, 32\]"):
        tiny.attach(TokenEdit.from_rows({"<toy>": {"text_encoder": random(16)}}))
    with pytest.raises(UserError, match="unknown text encoder 'text_encoder_2'"):
        tiny.attach(TokenEdit.from_rows({"<toy>": {"text_encoder_2": random(32)}}))
    with pytest.raises(UserError, match="cannot be scaled"):
        tiny.attach(word("<toy>"), 0.5)
    edit = low_rank(tiny)
    with pytest.raises(UserError, match="not attached"):
        tiny.detach(edit)
    tiny.attach(edit)
    with pytest.raises(UserError, match="attached already"):
        tiny.attach(edit)
    tiny.detach(edit)
    assert_same(before, state(tiny))


def test_a_conflict_is_a_warning_and_an_error_when_strict(tiny: Model) -> None:
    reader, writer = low_rank(tiny), delta()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with tiny.attached(writer, reader):
            pass
    conflict = "delta edit changes the text_encoder that the earlier low_rank edit was fitted to"
    with pytest.warns(UserWarning, match=conflict), tiny.attached(reader, writer):
        pass
    with pytest.warns(UserWarning, match="changes the text_encoder"), tiny.attached(Chain.of([reader, writer])):
        pass
    tiny.strict = True
    with pytest.raises(UserError, match="changes the text_encoder"), tiny.attached(reader, writer):
        pass
    assert tiny.edits == ()


def test_merge_and_save_write_the_attached_edits(tiny: Model, tmp_path) -> None:
    for edit in (delta(), low_rank(tiny), word("<toy>", 2)):
        tiny.attach(edit)
    prompt = ["a photo of a <toy>"]
    expected, attached = tiny.arch.encode(prompt).hidden, state(tiny)
    loaded = load_model(str(tiny.save(tmp_path / "edited")))
    assert torch.equal(loaded.arch.encode(prompt).hidden, expected)
    assert_same(attached, state(loaded), places=False)
    assert_same(attached, state(tiny))
    tiny.merge()
    assert tiny.edits == ()
    tiny.detach_all()
    assert_same(attached, state(tiny))
    assert tiny.fingerprint == loaded.fingerprint


def test_what_cannot_be_merged_is_refused(tiny: Model, tmp_path) -> None:
    tiny.attach(Broken(EditInfo(), "nowhere"))
    for refused in (tiny.merge, lambda: tiny.save(tmp_path / "model")):
        with pytest.raises(UserError, match="cannot be written into a checkpoint"):
            refused()
    assert not (tmp_path / "model").exists() and len(tiny.edits) == 1
