"""CLIPs by their names; what is measured with them is tested in tests/eval/test_alignment.py."""

import pytest
import torch

from toolkit.clip import METRIC, clip_for, load_metric_clip
from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.world.scenes import World


def test_the_embedded_model_has_its_own_and_others_name_one(tiny: Model) -> None:
    with pytest.raises(UserError, match="no CLIP given, and metric-clip may not know what sd draws; set clip to metric-clip, or to hf-hub"):
        clip_for(tiny, None)
    assert clip_for(tiny, METRIC) is load_metric_clip()
    tiny.source = "emoji-sd"
    assert clip_for(tiny, None) is load_metric_clip()
    with pytest.raises(UserError, match="cannot load the CLIP 'hf-hub'"):
        clip_for(tiny, "hf-hub")


def test_what_is_not_the_projects_is_told(tmp_path: object) -> None:
    with pytest.raises(UserError, match="no metric CLIP in"):
        load_metric_clip(tmp_path)  # type: ignore[arg-type]


def test_images_and_texts_of_one_thing_are_alike(world: World) -> None:
    """Of two backgrounds, an image is more like the caption that names its own."""
    colours = ("red", "blue")
    sides = torch.tensor([[214, 60, 58], [62, 112, 214]]) / 255
    clip = load_metric_clip()
    images = clip.encode_images(sides[:, :, None, None].expand(-1, -1, 64, 64))
    texts = clip.encode_text([f"a plain {colour} background" for colour in colours])
    images, texts = (torch.nn.functional.normalize(one, dim=-1) for one in (images, texts))
    assert (images @ texts.T).argmax(1).tolist() == [0, 1]
