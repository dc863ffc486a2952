"""UCE's debiasing with something that counts attributes as images would, linearly in the edit."""

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from pipelines.closed_form.uce_debias import UCEDebias
from tests.pipelines.reference import assert_follows, layers
from toolkit.concepts import Concept, DebiasTask, EraseTask
from toolkit.errors import UserError
from toolkit.model import Model

DOCTOR, NURSE = Concept("doctor"), Concept("nurse", ("carer",))
ATTRIBUTES = ("woman", "man")


def hidden(model: Model, prompt: str) -> Tensor:
    return model.arch.encode([prompt]).hidden[0, 1:].double()


def last(model: Model, prompt: str) -> Tensor:
    """The row of the last token before EOT."""
    return hidden(model, prompt)[int(model.arch.encode([prompt]).length) - 3]


def beside(model: Model, word: str, other: str) -> Tensor:
    """For each row of a word's prompt the row of the other's: words of unequal length go to the last token, EOT to EOT."""
    tokens, others = (int(model.arch.encode([prompt]).length) - 2 for prompt in (word, other))
    rows = hidden(model, other)
    subject = list(range(others)) if tokens == others else [others - 1] * tokens
    return rows[subject + [min(others + i, 75) for i in range(76 - tokens)]]


class Counter:
    """Counts attributes in images that it does not draw: the first one's part grows with the change of a layer's answer to the
    concept along what tells the attributes apart. A change of the weights all the way gives `gain` more."""

    def __init__(self, model: Model, start: dict[str, float], gain: float = 1.0) -> None:
        self.start, self.gain, self.seen = start, gain, []
        self.site = next(iter(model.arch.text_linears()))
        self.before = model.arch.text_linears()[self.site].weight.detach().double().clone()
        self.way = (last(model, "woman") - last(model, "man")) @ self.before.T

    def __call__(self, model: Model, concept: Concept) -> Sequence[float]:
        moved = last(model, concept.name) @ (model.arch.text_linears()[self.site].weight.double() - self.before).T
        part = self.start[concept.name] + self.gain * float(moved @ self.way / self.way.square().sum())
        self.seen.append((concept.name, part))
        return min(max(part, 0.0), 1.0), min(max(1 - part, 0.0), 1.0)


def task(classify: Callable, *concepts: Concept, **others) -> DebiasTask:
    return DebiasTask(concepts, ATTRIBUTES, classify, templates=("{}",), **others)


@pytest.mark.parametrize("ratios", [(), (0.7, 0.3)])
def test_the_ratios_become_the_wanted_ones_and_it_stops(tiny: Model, ratios: tuple[float, ...]) -> None:
    counter = Counter(tiny, {"doctor": 0.1})
    before = {site: linear.weight.clone() for site, linear in tiny.arch.text_linears().items()}
    edit = UCEDebias(tolerance=0.01, max_iterations=100).fit(tiny, task(counter, DOCTOR, ratios=ratios))
    wanted, steps = (ratios or (0.5, 0.5))[0], edit.info.notes["iterations"]
    assert tiny.edits == () and all(torch.equal(linear.weight, before[site]) for site, linear in tiny.arch.text_linears().items())
    assert len(counter.seen) == steps + 1 < 100
    assert abs(counter.seen[-1][1] - wanted) < 0.01 <= abs(counter.seen[-2][1] - wanted)
    with tiny.attached(edit):
        assert counter(tiny, DOCTOR) == pytest.approx(edit.info.notes["ratios"]["doctor"])
        assert counter(tiny, DOCTOR)[0] == pytest.approx(wanted, abs=0.01)


def test_errors_shrink_by_the_same_factor_which_the_step_size_sets(tiny: Model) -> None:
    """The edit is linear in the steps, so an error e becomes (1 - step_size gain) e: nothing is added twice, no step is lost."""
    factors = []
    for step_size in (0.2, 0.4):
        counter = Counter(tiny, {"doctor": 0.1})
        UCEDebias(tolerance=0.005, step_size=step_size, max_iterations=100).fit(tiny, task(counter, DOCTOR))
        errors = [0.5 - part for _, part in counter.seen]
        ratios = [after / before for before, after in itertools.pairwise(errors)]
        assert len(ratios) > 5 and ratios == pytest.approx([ratios[0]] * len(ratios), rel=1e-3)
        factors.append(1 - ratios[0])
    assert factors[1] == pytest.approx(2 * factors[0], rel=1e-3)


def test_the_edit_is_the_solution_for_the_sum_of_all_steps(tiny64: Model) -> None:
    """Of two concepts one is right at first, and takes no step until the other has moved it. Each layer's normal equations."""
    counter = Counter(tiny64, {"doctor": 0.1, "nurse": 0.49})
    method = UCEDebias(tolerance=0.05, step_size=0.3, preserve_scale=0.2, lamb=0.7, max_iterations=100)
    edit = method.fit(tiny64, task(counter, DOCTOR, NURSE, preserve=("cat",)))
    errors = {name: [0.5 - part for other, part in counter.seen if other == name] for name in ("doctor", "nurse")}
    assert abs(errors["nurse"][0]) < 0.05 <= max(map(abs, errors["nurse"])) and all(abs(each[-1]) < 0.05 for each in errors.values())
    # The steps towards one attribute, and as far away from the other; what the last edit gave needs none.
    x = {name: sum(0.3 * error for error in each[:-1] if abs(error) >= 0.05) for name, each in errors.items()}
    words = (("doctor", "doctor"), ("nurse", "nurse"), ("carer", "nurse"))
    source = torch.cat([hidden(tiny64, word) for word, _ in words])
    ways = [x[name] * (beside(tiny64, word, "woman") - beside(tiny64, word, "man")) for word, name in words]
    target = source + torch.cat(ways)
    keep = torch.cat([tiny64.arch.encode([prompt]).hidden[0].double() for prompt in ("", "cat")])
    right = 0.7 * torch.eye(32) + source.T @ source + 0.2 * keep.T @ keep
    inverse = torch.linalg.inv(right)
    assert_follows(edit, tiny64, {site: w @ (target - source).T @ source @ inverse for site, w in layers(tiny64).items()})


def test_layers_as_stable_diffusion_has_them(real64: Model) -> None:
    """One step, as the second count is right."""
    counts = iter(((0.1, 0.9), (0.5, 0.5)))
    method = UCEDebias(step_size=0.3, preserve_scale=0.2, lamb=0.7)
    edit = method.fit(real64, task(lambda model, concept: next(counts), DOCTOR, preserve=("cat",)))
    source = hidden(real64, "doctor")
    way = 0.3 * 0.4 * (beside(real64, "doctor", "woman") - beside(real64, "doctor", "man"))
    keep = torch.cat([real64.arch.encode([prompt]).hidden[0] for prompt in ("", "cat")])
    inverse = torch.linalg.inv(0.7 * torch.eye(768) + source.T @ source + 0.2 * keep.T @ keep)
    assert_follows(edit, real64, {site: w @ way.T @ source @ inverse for site, w in layers(real64).items()})


def test_when_it_does_not_get_there_the_best_step_is_given_with_a_warning(tiny: Model) -> None:
    """A step so long that it overshoots further every time: the first is the best."""
    counter = Counter(tiny, {"doctor": 0.4})
    fine = UCEDebias(tolerance=0.01, step_size=0.2, max_iterations=100)
    fine.fit(tiny, task(counter, DOCTOR))
    (_, first), (_, second) = counter.seen[:2]
    gain = (second - first) / (0.2 * (0.5 - first))
    counter.seen.clear()
    with pytest.warns(UserWarning, match="after 4 steps a ratio is still .* give more max_iterations"):
        edit = UCEDebias(tolerance=0.01, step_size=2.2 / gain, max_iterations=4).fit(tiny, task(counter, DOCTOR))
    misses = [abs(0.5 - part) for _, part in counter.seen[1:]]
    assert len(misses) == 4 and misses == sorted(misses) and misses[0] < misses[-1]
    assert edit.info.notes["iterations"] == 4 and edit.info.notes["error"] == pytest.approx(misses[0])
    with tiny.attached(edit):
        assert abs(0.5 - counter(tiny, DOCTOR)[0]) == pytest.approx(misses[0])


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((0.52, 0.48), "every ratio is within 0.05 of the wanted one already"),
        ((0.9,), "classify gave 0.9 for 'doctor', needs 2 parts from 0 to 1"),
        ((1.5, 0.0), "classify gave 1.5, 0.0 for 'doctor'"),
        ((float("nan"), 0.0), "classify gave nan"),
    ],
)
def test_counts_that_need_nothing_or_are_none_are_refused(tiny: Model, counts: tuple[float, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        UCEDebias().fit(tiny, task(lambda model, concept: counts, DOCTOR))
    assert tiny.edits == ()


def test_bad_tasks_and_options_are_refused(tiny: Model) -> None:
    def count(model: Model, concept: Concept) -> Sequence[float]:
        return 1.0, 0.0

    for given, message in (
        (lambda: DebiasTask((), ATTRIBUTES, count), "no concept given"),
        (lambda: DebiasTask((DOCTOR,), ("woman",), count), "attributes are woman, needs two or more"),
        (lambda: DebiasTask((DOCTOR,), ("a", "b", "a"), count), "attributes are a, b, a, needs two or more different"),
        (lambda: DebiasTask((DOCTOR,), ATTRIBUTES, count, (1.0,)), "1 ratios for 2 attributes"),
        (lambda: DebiasTask((DOCTOR,), ATTRIBUTES, count, (0.5, 0.6)), "ratios are 0.5, 0.6, need parts that add up to 1"),
        (lambda: UCEDebias(step_size=0.0), "step_size is 0.0"),
        (lambda: UCEDebias(max_iterations=0), "max_iterations is 0"),
        (lambda: UCEDebias().fit(tiny, EraseTask((DOCTOR,))), "kind EraseTask, this method needs DebiasTask"),
        (lambda: UCEDebias().fit(tiny, task(count, Concept("man"))), "the anchor of 'man' is 'man' itself"),
    ):
        with pytest.raises(UserError, match=message):
            given()
