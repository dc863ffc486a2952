"""Forged calls of the tabs that take pictures: each is refused in one line, the server stays up, and nothing is written."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import httpx
import pytest
from PIL import Image
from test_hostile import EDIT, call, http, kept  # noqa: F401 (a fixture)

from tabs.base import App


def png(side: int = 64, mode: str = "RGB", colour: Any = "red") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (side, side), colour).save(file, "PNG")
    return file.getvalue()


def bomb() -> bytes:
    """A PNG whose header says a gigapixel."""
    header = struct.pack(">IIBBBBB", 32_000, 32_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(header)) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + chunk + png()[33:]


FILES = {
    "good": png(),
    "clear": png(mode="RGBA", colour=(0, 0, 0, 0)),
    "red": png(mode="RGBA", colour=(225, 29, 72, 255)),
    "bomb": bomb(),
    "cut short": png(512, colour="blue")[:200],
    "text": b"root:x:0:0",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
}


class Given(str):
    """Stands for an uploaded file of this name."""


def gallery(*names: str, caption: str | None = None) -> list[Any]:
    return [{"image": Given(name), "caption": caption} for name in names]


def outside(path: str) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def canvas(layer: Any) -> dict[str, Any]:
    return {"background": None, "layers": [layer], "composite": None}


LEARN: dict[str, Any] = {
    "pictures": gallery("good"),
    "masks": None,
    "token": "<x>",
    "class_name": "dog",
    "captions": "",
    "model": "emoji-sd",
    "method": "textual_inversion",
    "options": '{"max_train_steps": 1}',
    "prompts": "a {}",
    "images": 1,
    "steps": 2,
    "every": 0,
    "goes_on": True,
}
COMPOSE: dict[str, Any] = {
    "edits": [EDIT, EDIT],
    "strengths": "{}",
    "model": "emoji-sd",
    "method": "",
    "options": "{}",
    "concepts": "",
    "prompts": "",
    "steps": 2,
}
REGIONS: dict[str, Any] = {
    "canvas": canvas(Given("red")),
    "shape": "mask",
    "prompt": "",
    **{
        f"{colour}{what}": "a cat" if colour + what == "red" else ""
        for colour in ("red", "blue", "green", "yellow")
        for what in ("", "_edit")
    },
    "model": "emoji-sd",
    "seed": 0,
    "count": 1,
    "steps": 2,
}
CALLS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *(
        ("customize", LEARN, forged)
        for forged in (
            {"pictures": None},
            {"pictures": []},
            {"pictures": "all"},
            {"pictures": [{"image": outside("/etc/passwd"), "caption": None}]},
            {"pictures": [{"image": outside("../../../etc/passwd"), "caption": None}]},
            {"pictures": [{"image": outside("http://127.0.0.1:1/x.png"), "caption": None}]},
            {"pictures": [{"image": outside("pyproject.toml"), "caption": None}]},
            {"pictures": gallery("bomb")},
            {"pictures": gallery("cut short")},
            {"pictures": gallery("text")},
            {"pictures": gallery("svg")},
            {"pictures": gallery(*["good"] * 60)},
            {"masks": gallery("good", caption="of picture 7")},
            {"masks": gallery("bomb")},
            {"masks": [{"image": outside("/etc/passwd"), "caption": None}]},
            {"token": ""},
            {"token": "two words"},
            {"token": "x" * 10_000},
            {"class_name": ""},
            {"captions": "no word in it"},
            {"captions": "<x>\n<x>\n<x>"},
            {"model": "/etc"},
            {"method": "uce"},
            {"method": "../uce"},
            {"options": '{"prior": "/etc"}'},
            {"options": '{"max_train_steps": 0}'},
            {"prompts": "no place for it"},
            {"prompts": "a {}\n" * 50},
            {"images": 10**6},
            {"every": -1},
        )
    ),
    *(("resume", {"run": "", "goes_on": True}, {"run": run}) for run in ("", None, "../x", "/etc", "runs/none", ["runs"], EDIT)),
    *(
        ("compose", COMPOSE, forged)
        for forged in (
            {},  # the same edit twice is one
            {"edits": []},
            {"edits": [EDIT, "/etc/passwd"]},
            {"edits": "all"},
            {"strengths": "["},
            {"method": "uce"},
            {"method": "../x"},
            {"concepts": "a\nb\nc"},
            {"prompts": "x\n" * 100},
        )
    ),
    *(
        ("regions", REGIONS, forged)
        for forged in (
            {"canvas": None},
            {"canvas": canvas(Given("clear"))},
            {"canvas": canvas(Given("bomb"))},
            {"canvas": canvas(Given("text"))},
            {"canvas": canvas(outside("/etc/passwd"))},
            {"canvas": canvas(outside("http://127.0.0.1:1/x.png"))},
            {"shape": "circle"},
            {"red": ""},
            {"blue": "a dog"},
            {"green_edit": EDIT},
            {"red_edit": "/etc/passwd"},
            {"red": "x" * 100_000},
            {"count": 10**6},
            {"seed": -1},
        )
    ),
]


def filled(value: Any, uploaded: dict[str, dict[str, Any]], edit: str) -> Any:
    """What stands for a file or an edit replaced by it."""
    if isinstance(value, Given):
        return uploaded[value]
    if isinstance(value, dict):
        return {key: filled(part, uploaded, edit) for key, part in value.items()}
    if isinstance(value, list):
        return [filled(part, uploaded, edit) for part in value]
    return edit if value == EDIT else value


@pytest.fixture(scope="module")
def uploaded(http: httpx.Client) -> dict[str, dict[str, Any]]:  # noqa: F811
    """The files as the server has stored them."""
    found = {}
    for name, content in FILES.items():
        [path] = http.post("/gradio_api/upload", files={"files": (f"{name.replace(' ', '-')}.png", content)}).json()
        found[name] = outside(path)
    return found


@pytest.mark.parametrize(("name", "usual", "forged"), CALLS, ids=[f"{name} {str(forged)[:50]}" for name, _, forged in CALLS])
def test_a_forged_call_is_refused(
    http: httpx.Client,  # noqa: F811
    app: App,
    saved_edit: str,
    uploaded: dict[str, dict[str, Any]],
    name: str,
    usual: dict[str, Any],
    forged: dict[str, Any],
) -> None:
    before = kept(app)
    event, told = call(http, name, [filled(value, uploaded, saved_edit) for value in {**usual, **forged}.values()])
    assert event == "error" and len(told.splitlines()) <= 1 and len(told) < 2000, told
    assert "Traceback" not in told and "root:" not in told
    assert kept(app) == before and http.get("/").status_code == 200


def test_the_usual_calls_are_not_refused(http: httpx.Client, saved_edit: str, uploaded: dict[str, dict[str, Any]]) -> None:  # noqa: F811
    for name, usual in (("customize", LEARN), ("regions", REGIONS)):
        event, told = call(http, name, [filled(value, uploaded, saved_edit) for value in usual.values()])
        assert event == "complete", told
