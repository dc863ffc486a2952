from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from eval.attacks.base import LABELS, Attack, Scenario
from eval.attacks.closed_form_preimage import ClosedFormPreimage, ReplaceText
from eval.attacks.concept_inversion import ConceptInversion
from eval.attacks.paraphrase import LANGUAGES, Paraphrase, misspelt
from eval.prompts import Prompt, resolve
from eval.rates import Painter
from tests.eval.images import Renderer, reading
from toolkit import registry
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.sample import sample
from toolkit.world.oracle import Oracle, Reading
from toolkit.world.scenes import World


def by_name(prompt: Prompt) -> Reading | None:
    """An edit that erases the name only."""
    return reading({}, background=prompt.scene.background) if "pistol" in prompt.words else None


def scenario(world: World, painter: Painter, model: Model, concept: str = "pistol") -> Scenario:
    return Scenario(world, painter, model, model.reference(), resolve(world, concept), n=8)


@pytest.mark.parametrize("name", registry.names("attack"))
def test_an_attack_says_what_it_is_and_keeps_its_options(name: str) -> None:
    attack = registry.load("attack", name)
    assert issubclass(attack, Attack) and attack.name() == name
    assert attack.label in LABELS
    assert attack.from_config(attack().config()) == attack()
    assert not attack.paper or attack.paper.removeprefix("arXiv:") in (attack.__doc__ or "")
    with pytest.raises(UserError, match="option"):
        attack.from_config({"nonsense": 1})


def test_attacks_are_found() -> None:
    assert {"closed_form_preimage", "concept_inversion", "paraphrase"} <= set(registry.names("attack"))


def test_paraphrase_finds_what_was_erased_by_name_only(world: World, untrained: Oracle, edited: Model) -> None:
    found = Paraphrase().run(scenario(world, Renderer(untrained, spoil=by_name), edited))
    assert found.attack_success_rate.value == 1
    assert found.clean_rate.value == 0
    words = world.things["pistol"].held_back
    assert all(any(word in prompt for word in words) for prompt in found.prompts)


def test_paraphrase_is_relative_to_what_the_base_draws(world: World, untrained: Oracle, edited: Model) -> None:
    def half(prompt: Prompt) -> Reading | None:
        blind = "pistol" not in prompt.words and prompt.scene.style == ""
        return reading({}, background=prompt.scene.background) if blind else None

    found = Paraphrase().run(scenario(world, Renderer(untrained, spoil=half, always=True), edited))
    assert found.relative
    assert found.attack_success_rate.value == 1
    assert 0 < found.attack_success_rate.n < 8


def test_an_attack_needs_a_concept_that_the_base_draws(world: World, untrained: Oracle, edited: Model) -> None:
    with pytest.raises(UserError, match="does not draw pistol well"):
        Paraphrase().run(scenario(world, Renderer(untrained, spoil=by_name, always=True), edited))


def test_an_attack_needs_an_edit_or_is_told_that_there_is_none(world: World, untrained: Oracle, edited: Model) -> None:
    with pytest.raises(UserError, match="is to be attacked as unedited"):
        replace(scenario(world, Renderer(untrained), edited), unedited=True)
    edited.detach_all()
    with pytest.raises(UserError, match="no edit is attached"):
        scenario(world, Renderer(untrained), edited)
    bare = Scenario(world, Renderer(untrained), edited, edited, resolve(world, "pistol"), n=8, unedited=True)
    before, after = bare.by_name()
    assert before == after and len(after) == 8


def test_the_preimage_undoes_an_invertible_change(tiny: Model) -> None:
    # Every layer W0 becomes W0 (I + D): then c (I + D)^-T is answered as c was, exactly.
    torch.manual_seed(0)
    base = tiny.reference()
    width = next(iter(tiny.arch.text_linears().values())).in_features
    change = torch.eye(width) + 0.1 * torch.randn(width, width)
    for layer in tiny.arch.text_linears().values():
        layer.weight.data = layer.weight.data @ change
    inverse = ClosedFormPreimage(reg=0.0).inverse(tiny, base).float()
    rows = torch.randn(5, width)
    for new, old in zip(tiny.arch.text_linears().values(), base.arch.text_linears().values(), strict=True):
        assert torch.allclose(new(rows @ inverse), old(rows), atol=1e-3)


def test_the_preimage_brings_the_base_images_back(tiny: Model) -> None:
    torch.manual_seed(0)
    base = tiny.reference()
    width = next(iter(tiny.arch.text_linears().values())).in_features
    change = torch.eye(width)
    change[:, 0] += 0.5 * torch.randn(width)
    for layer in tiny.arch.text_linears().values():
        layer.weight.data = layer.weight.data @ change
    hook = ReplaceText(base, ClosedFormPreimage(reg=1e-9).inverse(tiny, base))
    prompts, seeds = ["a picture", "a photo"], [0, 1]
    wanted = sample(base, prompts, seeds, steps=2, guidance=1.0)
    plain = sample(tiny, prompts, seeds, steps=2, guidance=1.0)
    attacked = sample(tiny, prompts, seeds, steps=2, guidance=1.0, hooks=[hook])
    assert (attacked - wanted).abs().max() < 0.5 * (plain - wanted).abs().max()  # BOS alone is not replaced


def test_the_preimage_attack_runs_and_leaves_the_models_alone(world: World, untrained: Oracle, edited: Model) -> None:
    before = {name: p.clone() for name, p in edited.arch.components()["denoiser"].named_parameters()}
    found = ClosedFormPreimage().run(scenario(world, Renderer(untrained, spoil=by_name), edited))
    assert found.clean_rate.value == 0
    assert found.attack_success_rate.value == 1  # the renderer draws the truth under hooks
    assert all(torch.equal(p, before[name]) for name, p in edited.arch.components()["denoiser"].named_parameters())


def test_the_preimage_attack_needs_edited_layers(tiny: Model) -> None:
    width = tiny.arch.token_embeddings()["text_encoder"].embedding_dim
    base = tiny.reference()
    tiny.attach(TokenEdit.from_rows({"<toy>": {"text_encoder": torch.randn(1, width)}}))
    with pytest.raises(UserError, match="do not change the layers"):
        ClosedFormPreimage().inverse(tiny, base)


def test_concept_inversion_learns_a_word_on_the_erased_model(world: World, untrained: Oracle, edited: Model) -> None:
    def without(prompt: Prompt) -> Reading | None:
        return reading({}, background=prompt.scene.background) if "pistol" in prompt.words else None

    attack = ConceptInversion(max_train_steps=3, images=2, train_batch_size=2, num_vectors=3)
    attacked = scenario(world, Renderer(untrained, spoil=without), edited)
    before = [parameter.clone() for parameter in edited.arch.components()["text_encoder"].parameters()]
    found = attack.run(attacked)
    assert found.clean_rate.value == 0
    assert found.attack_success_rate.value == 1, "what is drawn of the word is read as it is asked for"
    assert all("<found>" in prompt and "pistol" not in prompt for prompt in found.prompts)
    assert isinstance(found.edit, TokenEdit) and found.edit.delta("text_encoder:<found>").shape[0] == 3
    assert len(edited.edits) == 1
    after = edited.arch.components()["text_encoder"].parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_concept_inversion_learns_a_word_for_each_object_of_a_group_and_for_a_style(world: World, untrained: Oracle, edited: Model) -> None:
    attack = ConceptInversion(max_train_steps=1, images=1, train_batch_size=1)
    found = attack.run(scenario(world, Renderer(untrained), edited, "weapon"))
    assert isinstance(found.edit, TokenEdit) and len(found.edit.tokens) == len(world.group("weapon"))
    assert found.spent.steps == len(found.edit.tokens) and found.attack_success_rate.value == 1
    asked = {prompt.split("<found-")[1][0] for prompt in found.prompts}
    assert len(asked) == len(found.edit.tokens), "each word is asked for"
    found = attack.run(scenario(world, Renderer(untrained), edited, "noto"))
    assert all("<found>" in prompt and "noto" not in prompt for prompt in found.prompts)
    assert found.attack_success_rate.value == 1


def test_concept_inversion_lowers_the_error_on_the_pictures(world: World, untrained: Oracle, edited: Model) -> None:
    attack = ConceptInversion(max_train_steps=40, images=2, train_batch_size=2, learning_rate=0.05)
    pictures = scenario(world, Renderer(untrained), edited, "dog").pictures("dog", 2)

    def error(edit: TokenEdit) -> float:
        draw = torch.Generator().manual_seed(0)
        z, t = pictures.latents[torch.arange(32) % 2], torch.linspace(100, 900, 32).long()
        noise = torch.randn(z.shape, generator=draw)
        with edited.attached(edit), torch.no_grad():
            text = edited.arch.encode([pictures.captions[i % 2].format("<found>") for i in range(32)])
            output = edited.arch.predict(edited.arch.add_noise(z, noise, t), t, text)
        return float((output - edited.arch.target(z, noise, t)).square().mean())

    start = ConceptInversion(max_train_steps=1, images=2, train_batch_size=2, learning_rate=1e-9)
    assert error(attack.found(edited, pictures)) < error(start.found(edited, pictures))


def test_misspellings_have_one_slip_and_are_always_the_same() -> None:
    typos = misspelt("pistol")
    assert typos == misspelt("pistol") and len(typos) == len(set(typos)) == 8
    assert all(typo[0] == "p" and typo != "pistol" and abs(len(typo) - 6) <= 1 for typo in typos)
    assert set(misspelt("ox")) == {"oxx", "o"}


@pytest.mark.parametrize("words", ["typos", "languages"])
def test_words_that_the_base_does_not_understand_do_not_count(world: World, untrained: Oracle, edited: Model, words: str) -> None:
    attack = Paraphrase.from_config({"words": words})
    own = attack.others(scenario(world, Renderer(untrained), edited), "pistol")
    assert len(own) >= 6

    def first_only(prompt: Prompt) -> Reading | None:
        understood = prompt.words[0] in (*own[:2], "pistol")
        return None if understood else reading({}, background=prompt.scene.background)

    found = attack.run(scenario(world, Renderer(untrained, spoil=first_only, always=True), edited))
    assert set(found.notes["words"]) <= set(own[:2]) and set(found.notes["words_not_understood"]) <= set(own[2:])
    assert found.attack_success_rate.value == 1 and found.attack_success_rate.n == len(found.shown) < 8
    with pytest.raises(UserError, match="understands none of"):
        blind = Renderer(untrained, spoil=lambda p: None if "pistol" in p.words else reading({}), always=True)
        attack.run(scenario(world, blind, edited))


def test_names_in_other_languages_are_of_the_worlds_objects(world: World) -> None:
    names = json.loads(LANGUAGES.read_text(encoding="utf-8"))
    assert set(names) == set(world.names("scored", "held_out"))
    english = {word for thing in world.things.values() for word in (thing.name, *thing.synonyms)}
    assert all(word == word.lower() and word not in english for own in names.values() for word in own.values())
    assert sum(len(own) for own in names.values()) > 500
