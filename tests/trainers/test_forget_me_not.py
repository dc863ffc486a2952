"""Forget-Me-Not against its equation, what it trains, and what is attended to before and after."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image

from toolkit.arch.sd import SD
from toolkit.arch.sdxl import SDXL
from toolkit.attention import attention_maps, token_mask
from toolkit.concepts import Concept, EraseTask
from toolkit.edits.delta import Delta
from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.prompt_search import TokenRows
from toolkit.runs import seeded
from toolkit.sample import trajectory
from trainers.erase.forget_me_not import ForgetMeNot, Resteering, invert
from trainers.erase.pictures import Pictures
from trainers.loop import Batch

QUICK: dict[str, Any] = {"n_images": 2, "sampling_steps": 2, "max_train_steps": 3}
TASK = EraseTask((Concept("red cat", ("kitty",)), Concept("bird")), templates=("a {}", "{} here"))
WORD = EraseTask((Concept("cat"),), templates=("a {}",))


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(SD.tiny(prediction_type="v_prediction"))


def test_the_loss_is_the_norm_of_what_attends_to_the_concept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the equation written out, with diffusers' own probabilities, and cross-attention that has moved."""
    model = Model(SD.tiny())
    method = ForgetMeNot(**QUICK, guidance=2.0, seed=7, train_batch_size=3)
    objective = Resteering(model, method, TASK)
    asked = [[(1, "red cat"), (1, "kitty"), (0, "red cat"), (0, "kitty")], [(1, "bird"), (0, "bird")]]  # words before, and the concept's
    drawn = trajectory(model, ["a red cat", "a kitty", "a bird", "bird here"], [7, 8, 9, 10], steps=2, guidance=2.0)
    alpha_squared = model.arch.pipe.scheduler.alphas_cumprod
    own: list[torch.Tensor] = []
    attentions: list[Any] = list(model.arch.cross_attention_sites().values())
    with objective.weights:
        with torch.no_grad():
            for parameter in objective.weights.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=seeded("moved"))
        value = objective.loss(Batch(5, 1, 2))[0]
        for attention in attentions:
            attention.set_processor(AttnProcessor())  # which computes probabilities in a method that can be watched
            given = attention.get_attention_scores
            monkeypatch.setattr(attention, "get_attention_scores", lambda *a, given=given: own.append(given(*a)) or own[-1])
        wanted = 0.0
        for place in (3, 4, 5):
            turn, index = divmod(5 * 6 + place, 4)
            picture = int(torch.randperm(4, generator=seeded("forget_me_not round", 7, turn))[index])
            draw = seeded("forget_me_not", 7, 5, place)
            some = asked[picture // 2]
            before, word = some[int(torch.randint(len(some), (), generator=draw))]
            t = torch.randint(1000, (), generator=draw)
            z = alpha_squared[t].sqrt() * drawn[picture]
            z += (1 - alpha_squared[t]).sqrt() * torch.randn(drawn.shape[1:], generator=draw)
            text = model.arch.encode([f"a {word}" if before else f"{word} here"])
            first, count = 1 + before, len(model.arch.pipe.tokenizer(word, add_special_tokens=False).input_ids)
            places = [*range(first, first + count), int(text.length[0]) - 1]
            own.clear()
            model.arch.pipe.unet(z[None], t[None], text.hidden)
            assert len(own) == len(attentions)
            wanted += sum(scores[..., places].square().sum().item() for scores in own) ** 0.5 / 3
    assert value.item() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("family", [SD, SDXL])
def test_tokens_of_the_concept_of_the_end_and_of_the_padding(family: type[SD]) -> None:
    model = Model(family.tiny())
    masks = {tokens: Resteering(model, ForgetMeNot(**QUICK, tokens=tokens), WORD).asked.tokens for tokens in ("concept", "end", "padding")}
    [length] = model.arch.encode(["a cat"]).length.tolist()
    concept = [False, False, *[True] * (length - 3), False]
    rest = masks["concept"].shape[1] - length
    assert masks["concept"].tolist() == [[*concept, *[False] * rest]]
    assert masks["end"].tolist() == [[*concept[:-1], True, *[False] * rest]]
    assert masks["padding"].tolist() == [[*concept[:-1], True, *[True] * rest]]


def attended(model: Model, word: str) -> float:
    """The mean probability of a word's tokens, on the way from noise."""
    shape = model.arch.latent_shape(model.arch.image_size, model.arch.image_size)
    latents, t = torch.randn(4, *shape, generator=seeded("attended")), torch.tensor([100, 300, 600, 900])
    prompts = [f"a {word}"] * 4
    tokens = token_mask(model.arch, prompts, [word] * 4)
    with attention_maps(model.arch) as maps, torch.no_grad():
        model.arch.predict(latents, t, model.arch.encode(prompts))
    return maps.of_tokens(tokens, (shape[1], shape[2])).mean().item()


def test_the_concept_is_looked_away_from_and_other_words_less(model: Model) -> None:
    """The random text encoder hardly tells words apart, so that others are compared by their mean."""
    edit = ForgetMeNot(**{**QUICK, "max_train_steps": 20}, tokens="concept", learning_rate=3e-3).fit(model, WORD)
    others = ["dog", "bird", "house", "tree", "red box on a plain background"]
    before = {word: attended(model, word) for word in ["cat", *others]}
    with model.attached(edit):
        left = {word: attended(model, word) / before[word] for word in before}
    assert left["cat"] < 0.5 and left["cat"] + 0.02 < sum(left[word] for word in others) / len(others)
    assert edit.info.notes["loss"]["last"] < edit.info.notes["loss"]["first"]


@pytest.mark.parametrize("which", ["x", "x_strict", "u", "all"])
def test_only_the_chosen_parameters_change(model: Model, which: str) -> None:
    edit = ForgetMeNot.from_config({**QUICK, "parameters": which, "learning_rate": 1e-2}).fit(model, TASK)
    assert isinstance(edit, Delta)
    names = {name for name in edit.sites() if edit.delta(name).any()}
    cross = tuple(f"{site}." for site in model.arch.cross_attention_sites())
    inside = {name for name in names if name.startswith(cross)}
    keys = {f"{site}.weight" for site in model.arch.text_linears()}
    assert names and {"x": names == inside, "x_strict": names <= keys, "u": not inside, "all": inside < names}[which]
    assert not any(p.requires_grad for part in model.arch.components().values() for p in part.parameters())


def test_a_batch_in_parts_is_the_same(model: Model) -> None:
    whole, parts = (Resteering(model, ForgetMeNot(**QUICK, train_batch_size=size), TASK) for size in (4, 2))
    halves = [parts.loss(Batch(3, part, 2))[0].item() for part in (0, 1)]
    assert whole.loss(Batch(3))[0].item() == pytest.approx(sum(halves) / 2, rel=1e-5)


def test_with_gradient_checkpointing_it_is_the_same(model: Model) -> None:
    plain, again = (ForgetMeNot(**QUICK, learning_rate=1e-3, gradient_checkpointing=on).fit(model, TASK) for on in (False, True))
    assert all(torch.allclose(plain.delta(site), again.delta(site), atol=1e-5) for site in plain.sites())


@pytest.mark.parametrize("family", [SD, SDXL])
def test_an_inverted_word_stands_for_the_concept(family: type[SD]) -> None:
    model = Model(family.tiny())
    words = {part: len(tokenizer) for part, tokenizer in model.arch.tokenizers().items()}
    method = ForgetMeNot(**QUICK, inversion_steps=3, inversion_vectors=3, inversion_learning_rate=0.1, tokens="concept")
    found = Resteering(model, method, WORD).asked
    assert list(found.place) == ["a <forgotten-0>"] and found.tokens.tolist()[0][:6] == [False, False, True, True, True, False]
    start = Resteering(model, ForgetMeNot(**QUICK, inversion_steps=1, inversion_vectors=3, tokens="concept"), WORD).asked
    assert not torch.equal(found.text.hidden, start.text.hidden)
    assert {part: len(tokenizer) for part, tokenizer in model.arch.tokenizers().items()} == words
    inverted, plain = (way.fit(model, WORD) for way in (method, ForgetMeNot(**QUICK, tokens="concept")))
    assert inverted.sites() == plain.sites() and not all(torch.equal(inverted.delta(site), plain.delta(site)) for site in plain.sites())


def test_inversion_lowers_what_diffusion_training_lowers(model: Model) -> None:
    """On the very samples that it was found on."""
    method = ForgetMeNot(**QUICK, inversion_steps=20, inversion_learning_rate=0.03, train_batch_size=4)
    pictures = replace(Pictures.of(model, method, WORD), prompts=[["a <new>"]])
    with TokenRows(model, {"<new>": "house"}, vectors=2) as rows:

        def error() -> float:
            seen = [pictures.noised("inversion", method.seed, Batch(step), 4) for step in range(20)]
            outputs = [model.arch.predict(s.latents, s.t, model.arch.encode(["a <new>"] * 4)) for s in seen]
            return sum((output - s.target).square().mean().item() for output, s in zip(outputs, seen, strict=True))

        before = error()
        losses = invert(rows, pictures, method)
        assert len(losses) == 20 and error() < before


def test_what_would_have_no_effect_is_said(model: Model, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    with pytest.raises(UserError, match="n_images given beside images"):
        ForgetMeNot(images=str(tmp_path), n_images=5)
    with pytest.raises(UserError, match="inversion_vectors given without inversion_steps"):
        ForgetMeNot(inversion_vectors=2)
    with pytest.raises(UserError, match="inversion_steps is -1"):
        ForgetMeNot(inversion_steps=-1)
    with pytest.raises(UserError, match="sampling_steps is 0"):
        ForgetMeNot(sampling_steps=0)
    with pytest.raises(UserError, match="the task has 2"):
        ForgetMeNot(images=str(tmp_path)).fit(model, TASK)
    with pytest.warns(UserWarning, match="this method keeps nothing"):
        ForgetMeNot(**QUICK).fit(model, EraseTask((Concept("cat"),), preserve=("dog",)))
    with pytest.warns(UserWarning, match="anchor 'dog' has no effect"):
        ForgetMeNot(**QUICK).fit(model, EraseTask((Concept("cat", anchor="dog"),)))
    with pytest.warns(UserWarning, match="its synonyms have no effect"):
        ForgetMeNot(images=str(tmp_path), max_train_steps=1, inversion_steps=1).fit(model, EraseTask((Concept("cat", ("kitty",)),)))
