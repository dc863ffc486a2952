"""Words with rows for each layer: every layer reads the prompt with its own, other prompts are as before, nothing stays behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from toolkit.arch.flux import Flux
from toolkit.arch.sd import SD
from toolkit.arch.sdxl import SDXL
from toolkit.edits.base import EditInfo
from toolkit.edits.chain import Chain
from toolkit.edits.layer_token import LayerTokenEdit
from toolkit.edits.low_rank import LowRank
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError
from toolkit.io.export import export
from toolkit.io.files import load_edit, save_edit
from toolkit.model import Model
from toolkit.sample import sample

FAMILIES = pytest.mark.parametrize("family", [SD, SDXL])
PROMPTS, SEEDS = ["a <toy> in a room", "a cat", "<toy>"], [0, 1, 2]
DRAWN: dict[str, Any] = {"steps": 2, "guidance": 3.0}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layered(model: Model, token: str = "<toy>", *, seed: int = 1, vectors: int = 2, spread: float = 1.0) -> LayerTokenEdit:
    """A word whose rows differ from layer to layer by so much."""
    sites = list(model.arch.cross_attention_sites())
    rows = {}
    for part, table in model.arch.token_embeddings().items():
        shape, table_seed = (vectors, table.embedding_dim), 100 * seed
        rows[part] = {
            site: random(*shape, seed=table_seed) + spread * random(*shape, seed=table_seed + 1 + i) for i, site in enumerate(sites)
        }
    return LayerTokenEdit.from_rows({token: rows}, EditInfo("test", base=model.fingerprint, triggers=(token,)))


def at(edit: LayerTokenEdit, site: str) -> TokenEdit:
    """The words with the rows of one layer everywhere."""
    return TokenEdit.from_rows({token: {part: sites[site] for part, sites in parts.items()} for token, parts in edit.tokens.items()})


def read(model: Model, prompts: list[str]) -> dict[str, Tensor]:
    """What the layers that read text are given in a prediction."""
    found: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda module, given, output, site=site: found.__setitem__(site, given[0]))
        for site, layer in model.arch.text_linears().items()
    ]
    x = random(1, *model.arch.latent_shape(model.arch.image_size, model.arch.image_size)).repeat(len(prompts), 1, 1, 1)
    with torch.no_grad():
        model.arch.predict(x, torch.full((len(prompts),), 500), model.arch.encode(prompts))
    for handle in handles:
        handle.remove()
    return found


def state(model: Model) -> dict[str, Any]:
    parts = model.arch.components().items()
    hooks = {f"{part}.{name}": (*m._forward_hooks, *m._forward_pre_hooks) for part, whole in parts for name, m in whole.named_modules()}
    tables = {name: id(table) for name, table in model.arch.token_embeddings().items()}
    words = {name: id(tokenizer) for name, tokenizer in model.arch.tokenizers().items()}
    return {"hooks": hooks, "tables": tables, "words": words, "readers": list(model.arch.readers), "edits": model.edits}


@FAMILIES
def test_every_layer_reads_the_prompt_with_its_own_rows(family: type[SD]) -> None:
    """In a batch with other prompts, and as one prompt among several that are the same."""
    model = Model(family.tiny())
    edit, prompts = layered(model), [*PROMPTS, PROMPTS[0]]
    with model.attached(edit):
        found = read(model, prompts)
    for name, given in found.items():
        with model.attached(at(edit, name.rpartition(".")[0])):
            expected = model.arch.encode(prompts).hidden
        torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(given[1], model.arch.encode(prompts).hidden[1])
    assert len({tuple(given[0, 1, :3].tolist()) for given in found.values()}) == 1, "what comes before the word is the same"
    assert len({tuple(given[0, 3, :3].tolist()) for given in found.values()}) == len(model.arch.cross_attention_sites())


@FAMILIES
def test_the_pooled_encoding_is_that_of_the_mean(family: type[SD]) -> None:
    model = Model(family.tiny())
    edit = layered(model)
    with model.attached(edit):
        found = model.arch.encode(PROMPTS)
    with model.attached(edit.mean()):
        expected = model.arch.encode(PROMPTS)
    assert torch.equal(found.hidden, expected.hidden)
    assert found.pooled is expected.pooled is None or torch.equal(found.pooled, expected.pooled)  # type: ignore[arg-type]


@FAMILIES
def test_with_one_row_for_all_layers_it_is_a_token_edit(family: type[SD]) -> None:
    """Bit for bit, under guidance, and with the word in the negative prompt."""
    model = Model(family.tiny())
    edit = layered(model, spread=0.0)
    assert all(torch.equal(edit.mean().tokens["<toy>"][part], next(iter(sites.values()))) for part, sites in edit.tokens["<toy>"].items())
    for negative in ("", "a <toy>"):
        with model.attached(at(edit, next(iter(model.arch.cross_attention_sites())))):
            expected = sample(model, PROMPTS, SEEDS, negative=negative, **DRAWN)
        with model.attached(edit):
            torch.testing.assert_close(sample(model, PROMPTS, SEEDS, negative=negative, **DRAWN), expected, atol=1e-6, rtol=0)
        with model.attached(layered(model)):
            other = sample(model, PROMPTS, SEEDS, negative=negative, **DRAWN)
        assert (other - expected).abs().amax((1, 2, 3))[[0, 2]].min() > 1e-3


@FAMILIES
def test_prompts_without_the_word_are_as_without_the_edit(family: type[SD], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is encoded for them, and those that say it are encoded once for all steps."""
    model = Model(family.tiny())
    plain = sample(model, ["a cat", "a room"], [0, 1], **DRAWN)
    calls: list[int] = []
    encode = type(model.arch).encode_again
    monkeypatch.setattr(
        type(model.arch), "encode_again", lambda arch, text, **options: calls.append(len(text)) or encode(arch, text, **options)
    )
    with model.attached(layered(model)):
        assert torch.equal(sample(model, ["a cat", "a room"], [0, 1], **DRAWN), plain) and calls == []
        sample(model, ["a <toy>", "a cat", "a <toy>", "<toy> <toy>"], [0, 1, 2, 3], steps=4, guidance=3.0)
    assert calls == [2] * len(model.arch.cross_attention_sites()), "two different prompts, once for each layer"


def test_an_image_is_the_same_in_any_batch(tiny: Model) -> None:
    with tiny.attached(layered(tiny)):
        together = sample(tiny, PROMPTS, SEEDS, **DRAWN)
        torch.testing.assert_close(sample(tiny, PROMPTS, SEEDS, batch_size=1, **DRAWN), together, atol=1e-5, rtol=0)
        sample(tiny, ["a <toy>"], [0], **DRAWN)
        torch.testing.assert_close(sample(tiny, PROMPTS, SEEDS, **DRAWN), together, atol=1e-5, rtol=0)


def test_a_changed_encoder_is_seen(tiny: Model) -> None:
    """Also by who has encoded the same prompt before."""
    edit = layered(tiny)
    name = next(name for name in tiny.arch.encoder_parameters() if name.endswith("mlp.fc1.weight"))
    with tiny.attached(edit):
        before = read(tiny, PROMPTS)
        parameter = tiny.arch.parameter(name)
        kept = parameter.data.clone()
        parameter.data += random(*parameter.shape)
        after = read(tiny, PROMPTS)
        with tiny.attached(LowRank.from_factors({})):
            again = read(tiny, PROMPTS)
        parameter.data = kept
    for site in before:
        assert (before[site][0] - after[site][0]).abs().max() > 1e-3
        torch.testing.assert_close(again[site], after[site])


@FAMILIES
def test_several_words_of_several_edits_in_one_prompt(family: type[SD]) -> None:
    """Those of two such edits, with a token edit on top and a change of the layers below."""
    model = Model(family.tiny())
    one, two = layered(model), layered(model, "<pal>", seed=2, vectors=1)
    widths = {part: table.embedding_dim for part, table in model.arch.token_embeddings().items()}
    plain = TokenEdit.from_rows({"<hat>": {part: random(1, width, seed=9) for part, width in widths.items()}})
    change = LowRank.from_factors(
        {site: (random(layer.out_features, 1), random(1, layer.in_features, seed=1)) for site, layer in model.arch.text_linears().items()}
    )
    prompts = ["<pal> with a <toy> and a <hat>", "a <hat>"]
    for edits in ([change, one, two, plain], [plain, two, change, one], [Chain.of([two, plain, one])]):
        with model.attached(*edits):
            found = read(model, prompts)
        for name, given in found.items():
            site = name.rpartition(".")[0]
            with model.attached(at(one, site), at(two, site), plain):
                torch.testing.assert_close(given, model.arch.encode(prompts).hidden, atol=1e-5, rtol=1e-5)
    assert model.arch.readers == []


@FAMILIES
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_detached_it_leaves_nothing(family: type[SD], order: tuple[int, ...]) -> None:
    model = Model(family.tiny())
    plain, before = sample(model, ["a cat", "<toy>"], [0, 1], **DRAWN), state(model)
    edits = (layered(model), layered(model, "<pal>", seed=2), layered(model, "<hat>").mean())
    for edit in edits:
        model.attach(edit)
    sample(model, ["a <toy>", "<pal>"], [0, 1], **DRAWN)
    for index in order:
        model.detach(edits[index])
    assert state(model) == before and torch.equal(sample(model, ["a cat", "<toy>"], [0, 1], **DRAWN), plain)


def test_saved_and_loaded_it_is_the_same(tiny: Model, tmp_path: Path) -> None:
    edit = layered(tiny)
    loaded = load_edit(save_edit(edit, tmp_path / "edit.safetensors"))
    assert isinstance(loaded, LayerTokenEdit) and loaded.info == edit.info and set(loaded.sites()) == set(edit.sites())
    assert all(torch.equal(loaded.delta(site), edit.delta(site)) and edit.delta(site).shape == (2, 32) for site in edit.sites())
    with tiny.attached(edit):
        expected = sample(tiny, PROMPTS, SEEDS, **DRAWN)
    for again in (loaded, Chain.of([loaded])):
        with tiny.attached(again):
            assert torch.equal(sample(tiny, PROMPTS, SEEDS, **DRAWN), expected)
    with tiny.reference([loaded]).attached() as other:
        assert torch.equal(sample(other, PROMPTS, SEEDS, **DRAWN), expected)


def test_drawing_in_bf16_encodes_as_always(tiny: Model) -> None:
    """Prompts are encoded outside the denoiser's autocast."""
    edit = layered(tiny, spread=0.0)
    with tiny.attached(at(edit, next(iter(tiny.arch.cross_attention_sites())))):
        expected = sample(tiny, PROMPTS, SEEDS, amp=True, **DRAWN)
    with tiny.attached(edit):
        torch.testing.assert_close(sample(tiny, PROMPTS, SEEDS, amp=True, **DRAWN), expected, atol=1e-6, rtol=0)


def test_what_cannot_be_is_refused(tiny: Model, tmp_path: Path) -> None:
    edit, before = layered(tiny), state(tiny)
    for format in ("embedding", "checkpoint"):
        with pytest.raises(UserError, match=f"a layer_token edit cannot be written as {format}; no other tool reads it"):
            export(edit, format, tmp_path / "out", tiny)
    with tiny.attached(edit), pytest.raises(UserError, match="cannot be written into a checkpoint"):
        tiny.merge()
    with pytest.raises(UserError, match="cannot be scaled"):
        tiny.attach(edit, 0.5)
    with pytest.raises(UserError, match="unknown site"):
        edit.delta("nowhere")
    parts = edit.tokens["<toy>"]
    sites = dict(parts["text_encoder"])
    short = LayerTokenEdit.from_rows({"<toy>": {"text_encoder": dict(list(sites.items())[1:])}})
    wide = LayerTokenEdit.from_rows({"<toy>": {"text_encoder": {site: random(1, 33) for site in sites}}})
    for wrong, model, message in (
        (short, tiny, r"are for 6 layers, 6 of which are among the 7 cross-attentions"),
        (wide, tiny, r"\[1, 33\], this model needs \[1, 32\]"),
        (edit, Model(Flux.tiny()), "among the 0 cross-attentions"),
    ):
        with pytest.raises(UserError, match=message):
            model.attach(wrong)
    tiny.attach(edit)
    with pytest.raises(UserError, match="already a word"):
        tiny.attach(layered(tiny))
    tiny.detach_all()
    assert state(tiny) == before
    with pytest.raises(UserError, match="have the shapes"):
        LayerTokenEdit.from_rows({"<toy>": {"text_encoder": {"a": random(1, 32), "b": random(2, 32)}}})
    for key in ("text_encoder:<toy>", "<toy>|a"):
        with pytest.raises(UserError, match="names no token and layer"):
            LayerTokenEdit.from_tensors({key: random(1, 32)}, EditInfo())
