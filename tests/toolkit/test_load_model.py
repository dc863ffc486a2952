"""Loading models, and telling one base from another."""

import json
import warnings

import pytest
import torch

from toolkit.arch.sd import SD
from toolkit.edits.base import EditInfo
from toolkit.edits.low_rank import LowRank
from toolkit.errors import UserError
from toolkit.fingerprint import same_base
from toolkit.model import Model, load_model


def test_fingerprint(tiny: Model) -> None:
    same, other, half = Model(SD.tiny()), Model(SD.tiny(seed=1)), Model(SD.tiny())
    half.arch.pipe.to(torch.float16)
    half = Model(half.arch)
    before = tiny.fingerprint
    site, linear = next(iter(tiny.arch.text_linears().items()))
    tiny.attach(LowRank.from_deltas({site: torch.ones_like(linear.weight)}))
    assert tiny.fingerprint == before == same.fingerprint == json.loads(json.dumps(before))
    assert not same_base(before, other.fingerprint) and before["shapes"] == other.fingerprint["shapes"]
    assert before["weights"] != half.fingerprint["weights"] and same_base(before, half.fingerprint)
    assert not same_base(half.fingerprint, other.fingerprint)
    tiny.merge()
    assert not same_base(before, tiny.fingerprint)


def test_another_base_is_a_warning_and_an_error_when_strict(tiny: Model) -> None:
    other = Model(SD.tiny(seed=1))
    edit = LowRank.from_deltas({site: torch.ones_like(linear.weight) for site, linear in other.arch.text_linears().items()})
    edit = LowRank(EditInfo(method="uce", base=other.fingerprint), edit.up, edit.down, edit.dense)
    with pytest.warns(UserWarning, match="uce edit was fitted on another base"):
        tiny.attach(edit)
    with pytest.raises(UserError, match="another base"):
        Model(SD.tiny(), strict=True).attach(edit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.attach(edit)


def test_load_model(tiny: Model, tmp_path, monkeypatch) -> None:
    folder = tiny.save(tmp_path / "model")
    model = load_model(str(folder), dtype="bfloat16", strict=True)
    assert model.arch.dtype == torch.bfloat16 and model.strict and same_base(model.fingerprint, model.fingerprint)
    monkeypatch.setattr("toolkit.model.EMBEDDED", folder)
    assert load_model().fingerprint == tiny.fingerprint and load_model().source == "emoji-sd"
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "StableDiffusionPipelin"))
    with pytest.raises(UserError, match="did you mean StableDiffusionPipeline"):
        load_model(str(folder))


@pytest.mark.parametrize("source", ["/no/such/folder", "./nothing", "model.safetensors/x/y", "", "."])
def test_load_model_without_a_folder(source: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no model folder") as error:
        load_model(source)
    assert "\n" not in str(error.value)


def test_load_model_that_cannot_be_reached(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot load") as error:
        load_model("palimpsest/no-such-model")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="did you mean bfloat16"):
        load_model(str(tmp_path), dtype="bfloat")
