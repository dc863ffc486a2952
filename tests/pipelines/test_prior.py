"""The captions' second moment against one computed caption by caption, and when it is computed again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.closed_form.prior import BUILT_IN, PriorRows, caption_prior
from pipelines.closed_form.uce import UCE
from tests.pipelines.reference import assert_follows, layers
from toolkit.arch.sd import SD
from toolkit.arch.sdxl import SDXL
from toolkit.captions import load_captions
from toolkit.concepts import Concept, EraseTask
from toolkit.edits.delta import Delta
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError
from toolkit.model import Model

CAPTIONS = ("a boat on a lake", "two dogs", "A DOG in a hotdog hat", "my dogged friend", "cows", "two dogs")
CAT_TO_DOG = EraseTask((Concept("cat", anchor="dog"),), templates=("{}",))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for each test."""
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prior"


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "captions.txt"
    path.write_text("\n".join(CAPTIONS), encoding="utf-8")
    return str(path)


@pytest.fixture
def encoded(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The batches that the tiny model encodes from here on."""
    batches: list[list[str]] = []
    encode = tiny.arch.encode

    def spy(prompts: Any, *, grad: bool = False) -> Any:
        batches.append(list(prompts))
        return encode(prompts, grad=grad)

    monkeypatch.setattr(tiny.arch, "encode", spy)
    return batches


def rows_of(model: Model, caption: str, rows: PriorRows) -> Tensor:
    text = model.arch.encode([caption])
    return text.hidden[0, slice(None) if rows == "all" else slice(1, int(text.length))].double()


def naive(model: Model, captions: tuple[str, ...], rows: PriorRows) -> Tensor:
    """Row by row."""
    width = next(iter(model.arch.text_linears().values())).weight.shape[1]
    total = torch.zeros(width, width, dtype=torch.float64)
    for caption in captions:
        for row in rows_of(model, caption, rows):
            total += torch.outer(row, row)
    return total


@pytest.mark.parametrize("family", [SD, SDXL])
@pytest.mark.parametrize("rows", ["all", "words"])
def test_it_is_the_sum_over_all_rows(family: type[SD], rows: PriorRows, file: str) -> None:
    model = Model(family.tiny())
    prior = caption_prior(model.arch, file, rows, 0.5)
    assert set(prior.moments) == set(model.arch.text_streams())
    moment, wanted = prior.moments["hidden"], 0.5 * naive(model, CAPTIONS, rows)
    assert moment.dtype == torch.float64 and (moment - wanted).norm() <= 1e-6 * wanted.norm()  # batches round float32 differently
    assert prior.notes == {"prior": {"captions": 6, "column": "line", "left_out": 0}}


def test_no_more_than_a_batch_is_encoded_at_once(tiny: Model, encoded: list[list[str]]) -> None:
    caption_prior(tiny.arch, "built-in", "words", 1.0)
    assert [caption for batch in encoded for caption in batch] == BUILT_IN.read_text(encoding="utf-8").splitlines()
    assert [len(batch) for batch in encoded] == [64, 36]


def test_the_built_in_captions_are_a_hundred_different_ones() -> None:
    assert len(set(load_captions(BUILT_IN).texts)) == 100


def test_captions_that_name_what_is_erased_are_left_out(tiny: Model, file: str) -> None:
    prior = caption_prior(tiny.arch, file, "words", 1.0, (Concept("cat", ("dog",)), Concept("(odd")))
    kept = ("a boat on a lake", "my dogged friend", "cows")
    wanted = naive(tiny, kept, "words")
    assert (prior.moments["hidden"] - wanted).norm() <= 1e-6 * wanted.norm()
    assert prior.notes["prior"] == {"captions": 3, "column": "line", "left_out": 3}


def test_the_second_time_nothing_is_encoded(tiny: Model, file: str, encoded: list[list[str]], folder: Path) -> None:
    first = caption_prior(tiny.arch, file, "all", 1.0)
    encoded.clear()
    second = caption_prior(tiny.arch, file, "all", 1.0)
    assert encoded == [] and torch.equal(first.moments["hidden"], second.moments["hidden"])
    assert [path.suffix for path in folder.iterdir()] == [".safetensors"]


def test_a_second_solve_encodes_its_own_prompts_only(tiny: Model, file: str, encoded: list[list[str]]) -> None:
    first = UCE(prior=file).fit(tiny, CAT_TO_DOG)
    encoded.clear()
    second = UCE(prior=file).fit(tiny, CAT_TO_DOG)
    assert {prompt for batch in encoded for prompt in batch} == {"", "cat", "dog"}
    assert all(torch.equal(first.delta(site), second.delta(site)) for site in first.sites())


def one_value(model: Model) -> Delta:
    """One value of the text encoder, not one of those that `fingerprint` looks at."""
    name, parameter = next(
        (f"text_encoder.{name}", p) for name, p in model.arch.components()["text_encoder"].named_parameters() if p.numel() > 1024
    )
    change = torch.zeros_like(parameter)
    change.view(-1)[1] = 1.0
    return Delta.from_deltas({name: change})


@pytest.mark.parametrize("edit", [one_value, lambda model: TokenEdit.from_rows({"<toy>": {"text_encoder": torch.ones(32)}})])
def test_another_text_encoder_is_another_prior(
    tiny: Model, file: str, encoded: list[list[str]], edit: Callable[[Model], Any], folder: Path
) -> None:
    caption_prior(tiny.arch, file, "all", 1.0)
    encoded.clear()
    with tiny.attached(edit(tiny)):
        caption_prior(tiny.arch, file, "all", 1.0)
    assert encoded and len(list(folder.iterdir())) == 2
    encoded.clear()
    caption_prior(tiny.arch, file, "all", 1.0)
    assert encoded == []


def test_other_captions_rows_and_weights_are_another_prior(tiny: Model, file: str, encoded: list[list[str]]) -> None:
    caption_prior(tiny.arch, file, "all", 1.0)
    for change in (lambda: caption_prior(tiny.arch, file, "words", 1.0), lambda: Path(file).write_text("a boat", encoding="utf-8")):
        encoded.clear()
        change()
        caption_prior(tiny.arch, file, "all", 1.0)
        assert encoded
    encoded.clear()
    other = Model(SD.tiny(seed=1))
    assert not torch.equal(
        caption_prior(other.arch, file, "all", 1.0).moments["hidden"], caption_prior(tiny.arch, file, "all", 1.0).moments["hidden"]
    )


def test_it_can_be_kept_nowhere(tiny: Model, file: str, encoded: list[list[str]], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALIMPSEST_CACHE", "off")
    for _ in range(2):
        encoded.clear()
        caption_prior(tiny.arch, file, "all", 1.0)
        assert encoded
    assert not folder.exists()


def test_it_is_kept_where_caches_are(tiny: Model, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PALIMPSEST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    caption_prior(tiny.arch, file, "all", 1.0)
    assert len(list((tmp_path / "xdg" / "palimpsest" / "prior").iterdir())) == 1


def test_a_damaged_file_is_computed_again(tiny: Model, file: str, folder: Path) -> None:
    first = caption_prior(tiny.arch, file, "all", 1.0)
    (kept,) = folder.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2])
    assert torch.equal(caption_prior(tiny.arch, file, "all", 1.0).moments["hidden"], first.moments["hidden"])
    assert kept.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_a_warning(tiny: Model, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALIMPSEST_CACHE", file)
    with pytest.warns(UserWarning, match="cannot keep the prior in"):
        caption_prior(tiny.arch, file, "all", 1.0)


def test_uce_keeps_the_captions_like_any_other_rows(tiny64: Model, file: str) -> None:
    """Against the normal equations of each layer with every caption's row written out."""
    edit = UCE(prior=file, prior_scale=0.3, preserve_scale=0.2, lamb=0.7).fit(tiny64, CAT_TO_DOG)
    source, target, empty = (rows_of(tiny64, prompt, "all") for prompt in ("cat", "dog", ""))
    source, target = source[1:], target[1:]
    right = 0.7 * torch.eye(32) + source.T @ source + 0.2 * empty.T @ empty + 0.3 * naive(tiny64, CAPTIONS, "all")
    inverse = torch.linalg.inv(right)
    assert_follows(edit, tiny64, {site: w @ (target - source).T @ source @ inverse for site, w in layers(tiny64).items()})
    assert edit.info.notes["prior"]["captions"] == 6


def test_captions_stay_as_their_weight_grows(tiny: Model, file: str) -> None:
    rows = torch.cat([rows_of(tiny, caption, "words") for caption in CAPTIONS])
    drift = []
    for scale in (1e-3, 1.0, 1e2, 1e4):
        edit = UCE(prior=file, prior_scale=scale, lamb=1e-3).fit(tiny, CAT_TO_DOG)
        drift.append(float(sum((rows @ edit.delta(site).double().T).norm() for site in edit.sites())))
    assert drift == sorted(drift, reverse=True) and drift[-1] < 1e-3 * drift[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior_scale": 0.5}, "prior_rows and prior_scale have no effect without prior"),
        ({"prior_rows": "words"}, "prior_rows and prior_scale have no effect without prior"),
        ({"prior": "built-in", "prior_scale": 0.0}, "prior_scale is 0.0, needs a number above 0"),
        ({"prior": "nowhere.txt"}, "cannot read captions from nowhere.txt"),
    ],
)
def test_bad_options_are_refused(tiny: Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        UCE(**options).fit(tiny, CAT_TO_DOG)


def test_captions_that_all_name_what_is_erased_are_refused(tiny: Model, tmp_path: Path) -> None:
    path = tmp_path / "cats.txt"
    path.write_text("a cat\ncats", encoding="utf-8")
    with pytest.raises(UserError, match=r"every caption of .* names what is erased"):
        UCE(prior=str(path)).fit(tiny, CAT_TO_DOG)
