"""concept_express: clusters and concepts against pictures with known parts, the transport, both losses, and what is trained when."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from toolkit.attention import attention_maps, self_attention_sites, token_mask
from toolkit.cli import main
from toolkit.concepts import CustomizeTask, Subject
from toolkit.edits.token import TokenEdit
from toolkit.errors import PalimpsestError, UserError
from toolkit.io.files import load_edit
from toolkit.model import Model
from toolkit.runs import TrainingRun
from trainers.clusters import agglomerate, touching
from trainers.customize import concept_express
from trainers.customize.concept_express import ConceptExpress, SplitRows, numbered, supervised_contrast
from trainers.customize.textual_inversion import TextualInversion
from trainers.found_concepts import Attended, Found, attended, find
from trainers.loop import Batch
from trainers.transport import transport

GRID = (8, 8)
OPTIONS: dict[str, Any] = {"regions": 8, "foreground": "spread", "limit": 0.2, "least": 0.03}


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    Image.new("RGB", (16, 16), "red").save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> Found:
    """Finding is played: a concept at the left, and one above at the right."""
    masks = torch.zeros(2, *GRID)
    masks[0, :, :4], masks[1, :4, 4:] = 1, 1
    found = Found(masks, (masks + 0.01) / (masks + 0.01).sum((1, 2), keepdim=True))
    monkeypatch.setattr(concept_express, "find", lambda *given, **options: found)
    return found


def task(scene: Path, class_name: str = "") -> CustomizeTask:
    return CustomizeTask((Subject("<asset>", class_name, (scene,)),))


def picture(parts: dict[str, list[tuple[int, int]]]) -> tuple[Attended, dict[str, np.ndarray]]:
    """Attention in a picture whose parts (some places of the grid) attend to themselves, and whose other places to all of these."""
    where = {name: np.zeros(GRID, bool) for name in parts}
    for name, places in parts.items():
        for place in places:
            where[name][place] = True
    background = ~np.any(list(where.values()), 0)
    rows = np.zeros((64, 64))
    for mask in (*where.values(), background):
        rows[mask.flatten()] = mask.flatten() / mask.sum()
    rows = 0.9 * rows + 0.1 / 64
    entropy = -(rows * np.log(rows)).sum(1)
    words = torch.from_numpy(np.any(list(where.values()), 0).flatten()).float()
    return Attended(torch.from_numpy(rows), words, torch.from_numpy(entropy), GRID), where


def box(top: int, left: int, bottom: int, right: int) -> list[tuple[int, int]]:
    return list(itertools.product(range(top, bottom), range(left, right)))


# --- clusters ---------------------------------------------------------------------------------------------------------
def test_that_pair_merges_first_by_which_least_is_lost() -> None:
    """Against mutual information computed anew for each pair of neighbours."""
    rng = np.random.default_rng(0)
    rows, sizes, grid = rng.dirichlet(np.ones(5), 9), rng.integers(1, 5, 9), np.arange(9).reshape(3, 3)

    def known(clusters: list[set[int]]) -> float:
        weight = sizes / sizes.sum()
        joint = np.stack([sum(weight[i] * rows[i] for i in own) for own in clusters])
        return float((joint * np.log(joint / (joint.sum(1, keepdims=True) * joint.sum(0)))).sum())

    beside = {(a, b) for a in range(9) for b in range(9) if abs(a // 3 - b // 3) + abs(a % 3 - b % 3) == 1}
    clusters = [{i} for i in range(9)]
    for left in range(8, 0, -1):
        pairs = [(a, b) for a, b in itertools.combinations(clusters, 2) if any((i, j) in beside for i in a for j in b)]
        a, b = max(pairs, key=lambda pair: known([*(one for one in clusters if one not in pair), pair[0] | pair[1]]))
        clusters = [*(one for one in clusters if one not in (a, b)), a | b]
        labels = agglomerate(rows, sizes.tolist(), touching(grid), until=left)
        assert {frozenset(np.flatnonzero(labels == i).tolist()) for i in range(left)} == set(map(frozenset, clusters))


def test_merging_ends_at_the_limit_and_where_nothing_touches() -> None:
    same, other = [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]
    labels = np.array([[0, 1, -1], [2, 2, 3]])
    rows = np.array([same, same, other, other])
    assert touching(labels) == [{1, 2}, {0, 2}, {0, 1, 3}, {2}]
    assert agglomerate(rows, [1, 9, 1, 1], touching(labels), limit=0.69, evenly=True).tolist() == [0, 0, 1, 1]
    assert agglomerate(rows, [1, 9, 1, 1], touching(labels), limit=math.log(2) + 1e-9, evenly=True).tolist() == [0] * 4
    assert agglomerate(rows, [1] * 4, [set(), set(), {3}, {2}]).tolist() == [0, 1, 2, 2]


# --- concepts ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("foreground", ["spread", "end_of_text"])
def test_parts_that_attend_to_themselves_are_found(foreground: Any) -> None:
    seen, where = picture({"left": box(1, 0, 7, 3), "touching": box(1, 3, 4, 6), "small": box(6, 5, 7, 6)})
    found = find(seen, **{**OPTIONS, "foreground": foreground})
    assert np.array_equal(found.masks.numpy() > 0, [where["left"], where["touching"]]), "the largest first, without the smallest"
    torch.testing.assert_close(found.features.sum((1, 2)), torch.ones(2))
    inside = [float(one[torch.from_numpy(mask)].sum()) for one, mask in zip(found.features, where.values(), strict=False)]
    assert min(inside) > 0.9, "what a concept attends to is itself"
    assert len(find(seen, **{**OPTIONS, "least": 0.01}).masks) == 3
    assert len(find(seen, **{**OPTIONS, "limit": 0.69}).masks) == 1, "neighbours become one"
    assert np.array_equal(find(seen, **OPTIONS, most=1).masks[0].numpy() > 0, where["left"])


def test_nothing_is_found_where_all_is_alike() -> None:
    even = torch.full((64, 64), 1 / 64, dtype=torch.float64)
    assert find(Attended(even, torch.ones(64), torch.ones(64), GRID), **OPTIONS).masks.shape == (0, 8, 8)


def test_attention_is_that_of_all_layers(tiny: Model) -> None:
    """Against the definition, place by place."""
    latent = torch.randn(1, *tiny.arch.latent_shape(16, 16), generator=torch.Generator().manual_seed(0))
    seen = attended(tiny.arch, latent, 0.0, 1, 0)
    sites = self_attention_sites(tiny.arch)
    with torch.no_grad(), attention_maps(tiny.arch, [*sites, *tiny.arch.cross_attention_sites()]) as maps:
        tiny.arch.predict(latent, torch.tensor([0]), tiny.arch.encode([""]))
    total, fine = torch.zeros(64, 64), []
    for site in sites:
        own = maps.probabilities(site)[0].mean(0)
        side = int(len(own) ** 0.5)
        for y, x in itertools.product(range(8), range(8)):
            row = own[(y * side // 8) * side + x * side // 8].view(1, 1, side, side)
            row = torch.nn.functional.interpolate(row, (8, 8), mode="bilinear").flatten()
            total[8 * y + x] += side * row / row.sum()
        fine += [own] if side == 8 else []
    torch.testing.assert_close(seen.among, total / total.sum(1, keepdim=True), atol=1e-6, rtol=1e-4)
    row = torch.stack(fine).mean(0)
    torch.testing.assert_close(seen.spread, -(row * row.log()).sum(1), atol=1e-5, rtol=1e-4)
    cross = [maps.probabilities(site)[0].mean(0) for site in tiny.arch.cross_attention_sites()]
    torch.testing.assert_close(seen.words, torch.stack([one[:, 1] for one in cross if len(one) == 64]).mean(0), atol=1e-6, rtol=1e-4)
    once, twice = (attended(tiny.arch, latent, 0.3, draws, 0).among for draws in (1, 2))
    assert not torch.equal(once, twice) and not torch.equal(once, seen.among)


# --- losses -----------------------------------------------------------------------------------------------------------
def test_transport_is_the_earth_movers_distance() -> None:
    draw = torch.Generator().manual_seed(0)
    line = torch.rand(3, 12, generator=draw), torch.rand(3, 12, generator=draw)
    have, want = (one / one.sum(1, keepdim=True) for one in line)
    exact = (have.cumsum(1) - want.cumsum(1)).abs().sum(1)  # along a line what passes each place is known
    cost, above = transport(*line, (1, 12)), transport(*line, (1, 12)) - exact
    assert (above > 0).all() and (above < 0.3 * math.log(12)).all(), "by no more than the smoothing says"
    p, q = (one.double() for one in (have, want))
    distance = (torch.arange(12.0)[:, None] - torch.arange(12.0)).abs().double()
    kernel, u, v = (-distance / 0.3).exp(), torch.ones_like(p), torch.ones_like(q)
    for _ in range(20_000):
        u = 1 / ((v * q) @ kernel)
        v = 1 / ((u * p) @ kernel)
    plan = (u * p)[:, :, None] * kernel * (v * q)[:, None]
    entropy = (plan * (plan / (p[:, :, None] * q[:, None])).log()).sum((1, 2))
    torch.testing.assert_close(cost.double(), (plan * distance).sum((1, 2)) + 0.3 * entropy, atol=0.01, rtol=0)
    moved = torch.zeros(2, 5, 5)
    moved[0, 0, 0] = moved[1, 3, 4] = 1
    assert transport(moved[:1].flatten(1), moved[1:].flatten(1), (5, 5)).item() == pytest.approx(5, rel=1e-3), "3 down and 4 across"


def test_the_gradient_of_transport_is_its_slope() -> None:
    draw = torch.Generator().manual_seed(1)
    have, want = torch.rand(1, 12, generator=draw) + 0.1, (torch.rand(1, 12, generator=draw) + 0.1).requires_grad_()
    transport(have, want, (3, 4), smoothing=0.3).sum().backward()
    assert want.grad is not None
    for i in range(12):
        step = torch.zeros(1, 12)
        step[0, i] = 0.01
        up, down = (transport(have, want.detach() + sign * step, (3, 4), smoothing=0.3) for sign in (1, -1))
        assert want.grad[0, i].item() == pytest.approx(float(up - down) / 0.02, abs=0.004)


def test_supervised_contrast() -> None:
    rows = torch.nn.functional.normalize(torch.randn(2, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=-1)
    every, terms = rows.flatten(0, 1), []
    for a in range(6):
        below = sum(math.exp(float(every[a] @ every[c]) / 0.07) for c in range(6) if c != a)
        alike = [b for b in range(6) if b != a and b // 3 == a // 3]
        terms.append(-sum(math.log(math.exp(float(every[a] @ every[b]) / 0.07) / below) for b in alike) / len(alike))
    assert supervised_contrast(rows, 0.07).item() == pytest.approx(sum(terms) / 6)


@pytest.mark.parametrize("step", [1, 5])
def test_the_loss_is_the_masked_error_the_transport_and_the_contrast(tiny: Model, scene: Path, halves: Found, step: int) -> None:
    method = ConceptExpress(
        split_steps=2, num_split_tokens=2, train_batch_size=4, attention_weight=0.1, contrast_weight=0.2, mask_normalization="image"
    )
    with method.objective(tiny, task(scene)) as (made, _):
        expressing: Any = made
        assert expressing.turns == 2, "steps are of each concept: the first four are those with split words"
        value, shown = expressing.loss(Batch(step))
        samples = expressing.samples(Batch(step))
        alpha, sigma = tiny.arch.signal_and_noise(samples.t)
        with torch.no_grad(), attention_maps(tiny.arch) as maps:
            output = tiny.arch.predict(alpha * samples.latents + sigma * samples.noise, samples.t, tiny.arch.encode(samples.prompts))
        sites = [site for site in maps.sites if maps.probabilities(site).shape[2] == 64]
        errors, moved = [], []
        for row, prompt in enumerate(samples.prompts):
            words = prompt.removeprefix("a photo of ").split(" and ")
            numbers = [int(word[len("<asset")]) for word in words]
            assert all(("/" in word) == (step == 1) for word in words)
            mask = halves.masks[numbers].amax(0)
            errors.append((mask * (output[row] - samples.noise[row]) ** 2).mean())
            for word, number in zip(words, numbers, strict=True):
                token = token_mask(tiny.arch, [prompt], [word])[0]
                seen = torch.stack([maps.probabilities(site)[row].mean(0)[:, token].sum(-1) for site in sites]).mean(0)
                moved.append(transport(halves.features[number].flatten()[None], seen[None], GRID))
        rows = expressing.module.rows["text_encoder"].each.detach()
        expected = sum(errors) / 4 + 0.1 * torch.cat(moved).sum() / 4
        if step == 1:
            apart = supervised_contrast(torch.nn.functional.normalize(rows, dim=-1), 0.07)
            expected = expected + 0.2 * apart
        assert ("contrast" in shown) == (step == 1) and shown["moved"] > 0.1
        assert value.item() == pytest.approx(float(expected), rel=1e-3)
        value.backward()
        gradient = expressing.module.rows["text_encoder"].each.grad
        assert gradient.shape == (2, 2, 32) and (gradient.abs().amax(-1) > 0).all(), "every embedding of every concept"


# --- training ---------------------------------------------------------------------------------------------------------
def test_words_are_means_of_what_they_are_split_into(tiny: Model, scene: Path, halves: Found) -> None:
    rows = SplitRows(tiny, ("<a>", "<b>"), 3, None, seed=0)
    each: Any = rows.rows["text_encoder"]
    table = {tuple(row.tolist()) for row in tiny.arch.token_embeddings()["text_encoder"].weight}
    assert all(tuple(row.tolist()) in table for row in each.each.flatten(0, 1)), "they start from rows of the vocabulary"
    with rows.unlisted():
        ids = tiny.arch.tokenizers()["text_encoder"]("<a> <b> <a/0> <b/2>", add_special_tokens=False).input_ids
        found = tiny.arch.token_embeddings()["text_encoder"](torch.tensor(ids))
    torch.testing.assert_close(found, torch.stack([each.each[0].mean(0), each.each[1].mean(0), each.each[0, 0], each.each[1, 2]]))
    named = SplitRows(tiny, ("<a>", "<b>"), 3, "photo", seed=0).rows["text_encoder"]
    assert 0 < (named.each[0] - named.each[1]).abs().max() < 0.2 * named.each.abs().max()  # type: ignore[operator, index]


def test_it_gives_the_words_it_found(tiny: Model, scene: Path, halves: Found, tmp_path: Path) -> None:
    before = [parameter.detach().clone() for module in tiny.arch.components().values() for parameter in module.parameters()]
    method = ConceptExpress(max_train_steps=3, split_steps=1, learning_rate=0.01)
    edit = method.fit(tiny, task(scene), run=TrainingRun(tmp_path / "run"))
    after = [parameter for module in tiny.arch.components().values() for parameter in module.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) and tiny.edits == ()
    assert isinstance(edit, TokenEdit) and edit.sites() == ["text_encoder:<asset0>", "text_encoder:<asset1>"]
    assert edit.info.triggers == ("<asset0>", "<asset1>") and edit.info.notes["steps"] == 6
    assert all(edit.delta(site).shape == (1, 32) for site in edit.sites())
    start = SplitRows(tiny, ("<asset0>", "<asset1>"), 5, None, seed=0).edit(edit.info)
    assert all((edit.delta(site) - start.delta(site)).abs().max() > 0.005 for site in edit.sites())
    shown = np.asarray(Image.open(tmp_path / "run" / "concepts" / "1.png"))
    assert shown.shape == (16, 16) and np.array_equal(shown[::2, ::2] > 0, halves.masks[1].numpy() > 0)


@pytest.mark.parametrize("at", [1, 3])
def test_resumed_before_and_after_the_split_it_goes_on_the_same(tiny: Model, scene: Path, halves: Found, tmp_path: Path, at: int) -> None:
    def fit(steps: int, run: TrainingRun | None = None) -> TokenEdit:
        edit = ConceptExpress(max_train_steps=steps, split_steps=2, train_batch_size=2).fit(tiny, task(scene), run=run)
        assert isinstance(edit, TokenEdit)
        return edit

    fit(at, TrainingRun(tmp_path, 2 * at))
    again, once = fit(4, TrainingRun(tmp_path, 2 * at)), fit(4)
    assert all(torch.equal(again.delta(site), once.delta(site)) for site in once.sites())


def test_the_command_line_needs_no_class_name(tiny: Model, scene: Path, halves: Found, tmp_path: Path) -> None:
    model, folder = tiny.save(tmp_path / "model"), tmp_path / "photos"
    folder.mkdir()
    scene.rename(folder / "scene.png")
    words = ["customize", "--model", str(model), "--images", str(folder), "--token", "<thing>"]
    words += ["--set", "max_train_steps=1", "--out", str(tmp_path / "out")]
    assert main([*words, "--method", "concept_express"]) == 0
    assert load_edit(tmp_path / "out").info.triggers == ("<thing0>", "<thing1>")
    assert main([*words, "--method", "textual_inversion"]) == 2


def test_what_it_cannot_do_is_told(tiny: Model, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert numbered("<asset>", 3) == "<asset3>" and numbered("thing", 3) == "thing3"
    fit = ConceptExpress(max_train_steps=1).fit
    one = task(scene).subjects[0]
    for subjects, message in (
        ((one, Subject("<other>", "", one.images)), "2 subjects with 2 images"),
        ((Subject("<a>", "", (scene, scene)),), "1 subjects with 2 images"),
        ((Subject("<a>", "", (scene,), masks=(scene,)),), "masks given for <a>"),
        ((Subject("<a>", "", (scene,), captions=("a <a>",)),), "captions given for <a>"),
    ):
        with pytest.raises(UserError, match=message):
            fit(tiny, CustomizeTask(subjects))
    monkeypatch.setattr(concept_express, "find", lambda *given, **options: Found(torch.zeros(0, 8, 8), torch.zeros(0, 8, 8)))
    with pytest.raises(PalimpsestError, match=r"nothing is found in .*scene.png"):
        fit(tiny, task(scene))
    with pytest.raises(UserError, match="no class name given for <asset>"):
        TextualInversion(max_train_steps=1).fit(tiny, task(scene))
    options: list[tuple[dict[str, Any], str]] = [
        ({"noise_level": 1.0}, "noise_level is 1.0"),
        ({"noise_level": 0.0, "noise_draws": 2}, "has no effect at noise_level 0"),
        ({"split_steps": 0, "temperature": 0.1}, "temperature given with split_steps 0"),
        ({"num_split_tokens": 1}, "num_split_tokens is 1"),
        ({"num_concepts": 0}, "num_concepts is 0"),
    ]
    for given, message in options:
        with pytest.raises(UserError, match=message):
            ConceptExpress(**given)
