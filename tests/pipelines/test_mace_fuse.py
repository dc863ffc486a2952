"""MACE's fusion of LoRAs against its equation, edit by edit, row by row and layer by layer."""

import pytest
import torch
from torch import Tensor

from pipelines.closed_form.mace_fuse import MACEFuse
from pipelines.closed_form.mace_refine import TEMPLATES
from pipelines.closed_form.prior import caption_moments
from tests.pipelines.reference import assert_follows, in_float64, layers
from toolkit.arch.sd import SD
from toolkit.arch.sdxl import SDXL
from toolkit.concepts import Concept, MergeTask
from toolkit.edits.base import EditInfo
from toolkit.edits.chain import Chain
from toolkit.edits.low_rank import LowRank
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError
from toolkit.model import Model


def low_rank(model: Model, seed: int, rank: int = 1, **info) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    return LowRank.from_factors(
        {
            site: (torch.randn(linear.out_features, rank, generator=draw), torch.randn(rank, linear.in_features, generator=draw))
            for site, linear in model.arch.text_linears().items()
        },
        EditInfo(base=model.fingerprint, **info),
    )


def rows(model: Model, concept: Concept) -> Tensor:
    prompts = [template.format(word) for template in TEMPLATES[concept.kind] for word in concept.words]
    return model.arch.encode(prompts).hidden[:, 1:].flatten(0, 1).double()


def naive(model: Model, task: MergeTask, prior: Tensor, lamb: float, p: float = 1.0) -> dict[str, Tensor]:
    """Each layer's change."""
    own = [rows(model, concept) for concept in task.concepts]
    empty = model.arch.encode([""]).hidden[0].double()
    changes = {}
    for site, w in layers(model).items():
        right = lamb * torch.eye(w.shape[1]) + prior + p * empty.T @ empty
        left = w @ right
        for edit, c in zip(task.edits, own, strict=True):
            v = c @ (w + edit.delta(f"{site}.weight").double()).T if f"{site}.weight" in edit.sites() else c @ w.T
            left, right = left + v.T @ c, right + c.T @ c
        changes[site] = left @ torch.linalg.inv(right) - w
    return changes


@pytest.mark.parametrize("family", [SD, SDXL, None])
def test_it_follows_its_equation(family: type[SD] | None, tmp_path, request: pytest.FixtureRequest) -> None:
    """On tiny models, and on layers as Stable Diffusion 1.4 has them."""
    model = in_float64(family.tiny()) if family else request.getfixturevalue("real64")
    captions = tmp_path / "captions.txt"
    captions.write_text("a boat\nmy dog\ntwo houses\n", encoding="utf-8")
    task = MergeTask((low_rank(model, 0), low_rank(model, 1, rank=2)), (Concept("cat", ("kitten",)), Concept("dog")))
    edit = MACEFuse(prior=str(captions), prior_scale=0.2, lamb=0.7, preserve_scale=0.4).fit(model, task)
    prior = 0.2 * caption_moments(model.arch, ["a boat", "two houses"], "all")["hidden"]
    wanted = naive(model, task, prior, 0.7, 0.4)
    assert_follows(edit, model, wanted)
    assert all(torch.linalg.matrix_rank(edit.delta(site)) <= 3 for site in wanted)
    assert edit.info.notes["prior"]["left_out"] == 1


def test_scales_dense_changes_other_sites_and_chains_of_them(tiny64: Model) -> None:
    """An edit of half the layers, one stored dense in one layer, and a chain of two with a scale."""
    first, second, third = low_rank(tiny64, 0), low_rank(tiny64, 1), low_rank(tiny64, 2)
    half = LowRank(first.info, dict(list(first.up.items())[::2]), dict(list(first.down.items())[::2]))
    site, delta = next((site, third.delta(site)) for site in third.up)
    rest = {name: factor for name, factor in third.up.items() if name != site}
    third = LowRank(third.info, rest, {name: third.down[name] for name in rest}, {site: delta})
    chain = Chain.of([second, third], (0.5, 1.0))
    concepts = Concept("cat"), Concept("dog")
    edit = MACEFuse(prior="", lamb=0.7).fit(tiny64, MergeTask((half, chain), concepts))
    summed = LowRank.merge([second, third], [0.5, 1.0])
    assert_follows(edit, tiny64, naive(tiny64, MergeTask((half, summed), concepts), torch.zeros(32, 32), 0.7))


def test_no_mixture_of_the_edits_keeps_each_better_on_its_concept(tiny: Model) -> None:
    """Not their sum, which is what attaching all of them does, nor their mean, nor one of them."""
    task = MergeTask((low_rank(tiny, 0), low_rank(tiny, 1)), (Concept("cat"), Concept("dog")))
    cats, dogs = (rows(tiny, concept) for concept in task.concepts)
    fused = MACEFuse(prior="", preserve_scale=0.0, lamb=1e-6).fit(tiny, task)
    for site in fused.sites():
        one, two, both = (edit.delta(site).double() for edit in (*task.edits, fused))
        given, *others = (
            ((change - one) @ cats.T).square().sum() + ((change - two) @ dogs.T).square().sum()
            for change in (both, one + two, (one + two) / 2, one, two)
        )
        assert given < 0.99 * min(others)


def test_the_weights_stay_as_lamb_grows(tiny: Model) -> None:
    task = MACEFuse.example_task(tiny)
    sizes = [
        float(sum(edit.delta(site).norm() for site in edit.sites())) for edit in (MACEFuse(lamb=x).fit(tiny, task) for x in (1, 1e3, 1e6))
    ]
    assert sizes[0] > sizes[1] > sizes[2] and sizes[2] < 0.1 * sizes[0]


def test_layers_that_share_a_factor_share_the_fused_one(tiny: Model) -> None:
    """Closed-form edits share V among all layers: so does their fusion, and its file."""
    linears = tiny.arch.text_linears()
    edits = []
    for seed in range(2):
        down = torch.randn(1, 32, generator=torch.Generator().manual_seed(seed))
        edits.append(LowRank.from_factors({site: (torch.ones(linear.out_features, 1), down) for site, linear in linears.items()}))
    fused = MACEFuse(prior="").fit(tiny, MergeTask(tuple(edits), (Concept("cat"), Concept("dog"))))
    assert fused.up.keys() == linears.keys() and len({id(down) for down in fused.down.values()}) == 1


def self_attention(model: Model) -> str:
    return next(site for site in model.arch.lora_targets() if site not in model.arch.text_linears())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: MergeTask((low_rank(m, 0),), (Concept("cat"),)), "given 1 edits, merging needs two or more"),
        (lambda m: MergeTask((low_rank(m, 0), low_rank(m, 1, method="lora"))), "edit brings no new words that say what it is about"),
        (
            lambda m: MergeTask((low_rank(m, 0), TokenEdit.from_rows({"<a>": {"text_encoder": torch.ones(32)}})), (Concept("a"),) * 2),
            "token edit has a token part, merging in closed form needs low_rank",
        ),
        (
            lambda m: MergeTask((low_rank(m, 0), LowRank.from_deltas({self_attention(m): torch.ones(8, 8)})), (Concept("a"),) * 2),
            "low_rank edit changes denoiser.*, which reads no text",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_fused_is_refused(tiny: Model, make, message: str) -> None:
    with pytest.raises(UserError, match=message):
        MACEFuse(prior="").fit(tiny, make(tiny))
    assert tiny.edits == ()


def test_the_task_counts_its_concepts(tiny: Model) -> None:
    with pytest.raises(UserError, match="number of concepts is 1, of edits 2; give one for each edit"):
        MergeTask((low_rank(tiny, 0), low_rank(tiny, 1)), (Concept("cat"),))
    learnt = MergeTask((low_rank(tiny, 0, triggers=("<a>", "<b>")),))
    assert learnt.about == (Concept("<a>", ("<b>",)),)


def test_bad_weights_are_refused(tiny: Model) -> None:
    task = MACEFuse.example_task(tiny)
    with pytest.raises(UserError, match=r"preserve_scale is -1\.0"):
        MACEFuse(prior="", preserve_scale=-1.0).fit(tiny, task)
    with pytest.raises(UserError, match=r"raise lamb \(now 0\)"):
        MACEFuse(prior="", lamb=0.0).fit(tiny, task)
