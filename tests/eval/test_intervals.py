from __future__ import annotations

import math

import numpy as np
import pytest

from eval.intervals import NOTHING, jackknife, mean, rate, ratio, student, wilson

REPEATS = 400


def clustered(rng: np.random.Generator, share: float, alike: float, clusters: int, size: int) -> tuple[list[bool], list[int]]:
    """Outcomes whose clusters have beta-distributed rates: mean `share`, intraclass correlation `alike`."""
    total = 1 / alike - 1
    rates = rng.beta(share * total, (1 - share) * total, clusters)
    outcomes = rng.random((clusters, size)) < rates[:, None]
    return outcomes.ravel().tolist(), np.repeat(np.arange(clusters), size).tolist()


def test_wilson_agrees_with_the_published_example() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263 and 0 of 20.
    assert wilson(81, 263, 1.959964) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20, 1.959964) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_student_approaches_the_tables() -> None:
    assert student(1.959964, 5) == pytest.approx(2.5706, rel=2e-3)
    assert student(1.959964, 30) == pytest.approx(2.0423, rel=1e-4)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_rates_cover_the_truth_when_images_are_independent(share: float) -> None:
    rng = np.random.default_rng(0)
    found = [rate((rng.random(64) < share).tolist()) for _ in range(REPEATS)]
    assert 0.92 <= np.mean([e.low <= share <= e.high for e in found]) <= 0.985


@pytest.mark.parametrize(("clusters", "size"), [(16, 4), (40, 8)])
def test_rates_cover_the_truth_when_images_of_a_prompt_are_alike(clusters: int, size: int) -> None:
    rng = np.random.default_rng(1)
    drawn = [clustered(rng, 0.6, 0.4, clusters, size) for _ in range(REPEATS)]
    aware = np.mean([e.low <= 0.6 <= e.high for e in (rate(o, c) for o, c in drawn)])
    unaware = np.mean([e.low <= 0.6 <= e.high for e in (rate(o) for o, _ in drawn)])
    assert aware >= 0.925
    assert unaware < 0.9  # what clustering is there for


def test_clusters_of_one_image_are_independent_images() -> None:
    outcomes = [True] * 20 + [False] * 12
    assert rate(outcomes, list(range(32))) == rate(outcomes)


def test_clusters_never_narrow_an_interval() -> None:
    outcomes, prompts = [True, False] * 16, [i // 2 for i in range(32)]
    assert rate(outcomes, prompts).high >= rate(outcomes).high


def test_extreme_rates_have_an_interval() -> None:
    none = rate([False] * 64, [i // 4 for i in range(64)])
    assert (none.value, none.low) == (0.0, 0.0)
    assert 0.03 < none.high < 0.08


def test_nothing_measured_is_said() -> None:
    assert rate([]) is NOTHING
    assert mean([]) is NOTHING
    assert NOTHING.as_json() == {"value": None, "low": None, "high": None, "n": 0}
    assert str(NOTHING) == "not measured"


def test_means_cover_the_truth_and_are_seeded() -> None:
    rng = np.random.default_rng(2)
    prompts = np.repeat(np.arange(30), 4).tolist()
    hits = 0
    for _ in range(200):
        values = (rng.normal(0, 1, 30).repeat(4) + rng.normal(0, 0.3, 120) + 5).tolist()
        estimate = mean(values, prompts)
        hits += estimate.low <= 5 <= estimate.high
    assert hits / 200 >= 0.89
    assert mean([1.0, 2.0, 4.0]) == mean([1.0, 2.0, 4.0])


def test_ratios_cover_the_truth() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(200):
        before = rng.random(200) < 0.9
        after = before & (rng.random(200) < 0.8)
        estimate = ratio(after.tolist(), before.tolist())
        hits += estimate.low <= 0.8 <= estimate.high
    assert hits / 200 >= 0.9


def test_a_ratio_pairs_its_outcomes() -> None:
    before = [True] * 50 + [False] * 50
    paired = ratio([*before[:-1], True], before)
    shuffled = ratio(before[::-1], before)
    assert paired.high - paired.low < (shuffled.high - shuffled.low) / 3


def test_a_ratio_of_equal_outcomes_still_has_an_interval() -> None:
    estimate = ratio([True] * 64, [True] * 64)
    assert estimate.value == 1
    assert 0.9 < estimate.low < 1 < estimate.high < 1.1
    assert math.isnan(ratio([True], [False]).value)


def test_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(4).normal(size=50)
    left_out = (values.sum() - values) / 49
    estimate = jackknife(values.mean(), left_out.tolist())
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * values.std(ddof=1) / math.sqrt(50), rel=1e-3)
