"""UCE on projections of the text encoders and on values alone, against its equation written out for each layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import pytest
import torch
from torch import Tensor

from pipelines.closed_form.uce import UCE
from tests.pipelines.reference import in_float64
from toolkit.arch.sd import SD
from toolkit.arch.sd3 import SD3
from toolkit.arch.sdxl import SDXL
from toolkit.concepts import Concept, EraseTask
from toolkit.errors import UserError
from toolkit.model import Model

POOLED = "text_encoder_2.text_projection"
CAT_TO_DOG = EraseTask((Concept("cat", anchor="dog"),), ("cow", "fox"), ("a {}", "{}"))


@pytest.fixture(scope="module", params=[SD, SDXL])
def model(request: pytest.FixtureRequest) -> Model:
    return in_float64(request.param.tiny())


@contextmanager
def listening(model: Model) -> Iterator[dict[str, Tensor]]:
    """Site -> what each layer read last."""
    read: dict[str, Tensor] = {}
    linears = {site: linear for reader in model.arch.encoder_readers().values() for site, linear in reader.items()}
    handles = [
        linear.register_forward_hook(lambda _, given, out, site=site: read.update({site: given[0][0].detach().double()}))
        for site, linear in linears.items()
    ]
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()


def rows(model: Model, prompt: str, first: int = 0) -> dict[str, Tensor]:
    """Site -> the rows that it reads of a prompt from the first on; a pooled projection's one row."""
    with listening(model) as read:
        model.arch.encode([prompt])
        return {site: torch.atleast_2d(row) if row.ndim == 1 else row[first:] for site, row in read.items()}


def test_every_projection_gets_the_least_squares_change_of_what_it_reads(model: Model) -> None:
    edit = UCE(layers="encoder", erase_scale=2.0, preserve_scale=0.3, lamb=0.7).fit(model, CAT_TO_DOG)
    pairs = [(rows(model, text.format("cat"), 1), rows(model, text.format("dog"), 1)) for text in ("a {}", "{}")]
    kept = [rows(model, text) for text in ("", "a cow", "cow", "a fox", "fox")]
    sites = kept[0].keys()
    assert {f"{site}.weight" for site in sites} == set(edit.sites())
    assert (POOLED in sites) == isinstance(model.arch, SDXL)
    for site in sites:
        c, g = (torch.cat([pair[side][site] for pair in pairs]) for side in (0, 1))
        k = torch.cat([each[site] for each in kept])
        system = 0.7 * torch.eye(c.shape[1], dtype=c.dtype) + 2.0 * c.T @ c + 0.3 * k.T @ k
        weight = model.arch.parameter(f"{site}.weight").detach()
        wanted = weight @ (2.0 * (g - c).T @ c) @ system.inverse()
        assert (edit.delta(f"{site}.weight").double() - wanted).norm() <= 1e-6 * wanted.norm() > 0


def test_prompts_in_many_parts_are_solved_as_one(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = UCE(layers="encoder").fit(model, CAT_TO_DOG)
    monkeypatch.setattr("pipelines.closed_form.encoder._JOBS", 1)
    parts = UCE(layers="encoder").fit(model, CAT_TO_DOG)
    for site in whole.sites():
        assert (whole.delta(site) - parts.delta(site)).norm() <= 1e-6 * whole.delta(site).norm()


@pytest.mark.parametrize("family", [SD, SDXL])
def test_what_text_encoders_make_of_a_concept_comes_nearer_to_its_anchor(family: type[SD]) -> None:
    """Each projection says of the concept what it said of the anchor; what layers make of that together differs between random encoders,
    and a single one may move its pooled encoding away. So the median over some of them counts."""
    hidden, pooled = [], []
    for seed in range(5):
        model = in_float64(family.tiny(seed=seed))
        cat, dog = (model.arch.encode([f"a {word}"]) for word in ("cat", "dog"))
        with model.attached(UCE(layers="encoder", lamb=1e-3).fit(model, CAT_TO_DOG)):
            edited = model.arch.encode(["a cat"])
        hidden.append(float((edited.hidden - dog.hidden)[:, -1].norm() / (cat.hidden - dog.hidden)[:, -1].norm()))
        if edited.pooled is not None and cat.pooled is not None and dog.pooled is not None:
            pooled.append(float((edited.pooled - dog.pooled).norm() / (cat.pooled - dog.pooled).norm()))
    assert max(hidden) < 0.8
    assert median(hidden) < 0.6
    assert not pooled or median(pooled) < 0.6


def test_values_alone_change_as_with_the_keys_which_stay(model: Model) -> None:
    both, values = (UCE(layers=layers).fit(model, CAT_TO_DOG) for layers in ("text", "values"))
    assert set(values.sites()) == {site for site in both.sites() if site.endswith("to_v.weight")} != set()
    for site in values.sites():
        assert torch.equal(values.delta(site), both.delta(site))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (UCE(layers="encoder"), "works on models with a UNet"),
        (UCE(layers="values"), "one layer gives keys and values both"),
        (UCE(layers="encoder", prior="built-in"), "prior, prior_rows and prior_scale have no effect on layers encoder"),
        (UCE(layers="values", capture_steps=2), "have no effect on layers values"),
    ],
)
def test_layers_that_a_model_does_not_have_and_options_without_effect_are_refused(method: UCE, message: str) -> None:
    with pytest.raises(UserError, match=message):
        method.fit(Model(SD3.tiny()), CAT_TO_DOG)
