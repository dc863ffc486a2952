"""Forged calls of the running server: each is refused in one line, the server stays up, and nothing is written."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client

from tabs.base import App

COMPARE: dict[str, Any] = {
    "prompt": "a cat",
    "model": "emoji-sd",
    "edits": [],
    "strengths": "{}",
    "seed": 0,
    "count": 1,
    "steps": 2,
    "guidance": 2,
}
ERASE: dict[str, Any] = {
    "concepts": "pistol",
    "synonyms": "",
    "anchors": "",
    "preserve": "",
    "everything_else": False,
    "kind": "object",
    "model": "emoji-sd",
    "method": "uce",
    "options": "{}",
    "images": 1,
    "steps": 2,
    "goes_on": True,
}
EDIT = "an edit that is there"
ATTACK: dict[str, Any] = {
    "edit": EDIT,
    "concepts": "pistol",
    "model": "emoji-sd",
    "attacks": ["paraphrase"],
    "options": "{}",
    "images": 1,
    "steps": 2,
    "seed": 0,
    "everything_else": False,
    "goes_on": False,
}
EXPORT: dict[str, Any] = {"model": "emoji-sd", "edits": [EDIT], "strengths": "{}", "format": "delta"}
PATH = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
CALLS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *(
        ("compare", COMPARE, forged)
        for forged in (
            {"prompt": "x" * 1_000_000},
            {"prompt": ""},
            {"prompt": None},
            {"prompt": PATH},
            {"prompt": ["a"] * 1000},
            {"model": "/etc"},
            {"model": "../../models"},
            {"model": "stabilityai/sdxl-turbo"},
            {"model": "models/x.ckpt"},
            {"edits": ["/etc/passwd"]},
            {"edits": ["runs/../../../etc"]},
            {"edits": ["edits/x.pt"]},
            {"edits": "all"},
            {"edits": [["runs"]]},
            {"strengths": "["},
            {"strengths": "[" * 100_000},
            {"strengths": "x" * 1_000_000},
            {"seed": -1},
            {"seed": 1e300},
            {"seed": "0; ls"},
            {"count": 100_000},
            {"count": 1.5},
            {"steps": 10**9},
            {"steps": 0},
            {"guidance": float("nan")},
            {"guidance": float("inf")},
        )
    ),
    *(
        ("erase", ERASE, forged)
        for forged in (
            {"concepts": ""},
            {"concepts": "x\n" * 60},
            {"concepts": "pistol", "synonyms": "a\nb\nc"},
            {"preserve": "pistol"},
            {"preserve": "x" * 100_000},
            {"kind": "person"},
            {"method": "dreambooth_lora"},
            {"method": "../uce"},
            {"method": "__init__"},
            {"options": '{"nonsense": 1}'},
            {"options": '{"erase_scale": "much"}'},
            {"options": "null"},
            {"method": "crce", "options": '{"coreferents": "/etc/passwd"}'},
            {"method": "crce", "options": '{"coreferents": "pyproject.toml"}'},
            {"method": "few_shot", "options": '{"images": "/etc"}'},
            {"method": "few_shot", "options": '{"images": "toolkit"}'},
            {"method": "mace", "options": '{"prior": "runs/../../x.txt"}'},
            {"images": 10**6},
            {"steps": "many"},
        )
    ),
    *(
        ("attack", ATTACK, forged)
        for forged in (
            {"edit": ""},
            {"edit": None},
            {"edit": "/etc/passwd"},
            {"edit": "runs/../edits"},
            {"edit": ["runs"]},
            {"concepts": "no such thing"},
            {"concepts": "x" * 1_000_000},
            {"concepts": ",".join(f"x{i}" for i in range(50))},
            {"model": "../emoji-sd"},
            {"attacks": ["base"]},
            {"attacks": ["../bench"]},
            {"attacks": "paraphrase"},
            {"attacks": [["paraphrase"]]},
            {"attacks": ["relearn"] * 10_000},
            {"options": '{"relearn.rank": 2}'},
            {"options": '{"paraphrase.nonsense": 2}'},
            {"options": '{"nonsense": 2}'},
            {"attacks": ["ring_a_bell"], "options": '{"ring_a_bell.population": 1e12}'},
            {"attacks": ["relearn"], "options": '{"relearn.steps": [5, 1000000000]}'},
            {"attacks": ["prompt_set"], "options": '{"prompt_set.file": "/etc/passwd"}'},
            {"attacks": ["prompt_set"], "options": '{"prompt_set.file": "edits/../../x.csv"}'},
            {"images": 10**9},
            {"steps": float("nan")},
            {"seed": -1},
        )
    ),
    *(
        ("export", EXPORT, forged)
        for forged in (
            {"edits": ["edits/none"]},
            {"edits": ["/etc"]},
            {"format": "pickle"},
            {"format": "../x"},
            {"format": None},
            {"format": "embedding"},
            {"edits": []},
            {"strengths": "[]"},
            {"model": "models/none.safetensors"},
            {"model": "owner/name", "format": "checkpoint"},
        )
    ),
    *(("describe", {"model": ""}, {"model": forged}) for forged in ("/etc", "..", "models/../runs", "owner/name", "", None, "x" * 10**6)),
    ("attention", {"word": "cat", **COMPARE}, {"word": "dog"}),
    ("attention", {"word": "cat", **COMPARE}, {"word": "x" * 1000}),
    ("attention", {"word": "cat", **COMPARE}, {"word": ""}),
    ("stop", {"job": 1}, {"job": 10**8}),
    ("stop", {"job": 1}, {"job": -5}),
    ("stop", {"job": 1}, {"job": "all"}),
    ("look", {"name": ""}, {"name": "runs/../cache"}),
    ("look", {"name": ""}, {"name": "/etc"}),
    ("look", {"name": ""}, {"name": "cache/x"}),
]


@pytest.fixture(scope="module")
def http(server: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server, timeout=60) as client:
        yield client


def kept(app: App) -> set[Path]:
    """Everything in the working folder but what is on its way to browsers."""
    return {path for part in ("runs", "edits", "models") for path in (app.workspace.folder / part).rglob("*")}


def call(http: httpx.Client, name: str, values: list[Any]) -> tuple[str, str]:
    """How a call ends, "complete" or "error", and what the server then says."""
    answer = http.post(f"/gradio_api/call/{name}", content=json.dumps({"data": values}), headers={"content-type": "application/json"})
    if answer.status_code != 200:
        return "error", answer.text
    event = ""
    with http.stream("GET", f"/gradio_api/call/{name}/{answer.json()['event_id']}") as stream:
        for line in stream.iter_lines():
            if line.startswith("event: "):
                event = line.removeprefix("event: ")
            elif line.startswith("data: ") and event in ("complete", "error"):
                return event, line.removeprefix("data: ")
    return event, ""


@pytest.mark.parametrize(("name", "usual", "forged"), CALLS, ids=[f"{name} {str(forged)[:50]}" for name, _, forged in CALLS])
def test_a_forged_call_is_refused(
    http: httpx.Client, app: App, saved_edit: str, name: str, usual: dict[str, Any], forged: dict[str, Any]
) -> None:
    before = kept(app)
    there = {"edit": saved_edit, "edits": [saved_edit]}
    values = {key: there[key] if value in (EDIT, [EDIT]) else value for key, value in {**usual, **forged}.items()}
    event, told = call(http, name, list(values.values()))
    assert event == "error" and len(told.splitlines()) <= 1 and len(told) < 2000, told
    assert "Traceback" not in told and "root:" not in told
    assert kept(app) == before and http.get("/").status_code == 200


def test_the_usual_calls_are_not_refused(http: httpx.Client, app: App) -> None:
    assert call(http, "compare", list(COMPARE.values()))[0] == "complete"
    assert call(http, "attention", ["cat", *COMPARE.values()])[0] == "complete"


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../../../etc/passwd",
        "/gradio_api/file=pyproject.toml",
        "/gradio_api/file=/proc/self/environ",
        "/file=/etc/passwd",
        "/gradio_api/file/etc/passwd",
        "/static/../../../../etc/passwd",
        "/static/%2e%2e/%2e%2e/etc/passwd",
        "/assets/..%2f..%2f..%2fetc/passwd",
        "/custom_component/x/client/component/../../../../etc/passwd",
        "/gradio_api/proxy=http://127.0.0.1:22/",
        "/theme.css/../../etc/passwd",
    ],
)
def test_no_file_is_read_through_an_address(http: httpx.Client, path: str) -> None:
    answer = http.get(path)
    assert answer.status_code in (400, 401, 403, 404, 405, 422, 500) or "<!doctype html>" in answer.text.lower()
    assert "root:" not in answer.text and "PATH=" not in answer.text and "[build-system]" not in answer.text


def test_the_working_folder_itself_is_not_served(http: httpx.Client, app: App) -> None:
    secret = app.workspace.folder / "edits" / "secret.txt"
    secret.write_text("secret")
    try:
        assert http.get(f"/gradio_api/file={secret}").status_code in (403, 404)
    finally:
        secret.unlink()


def test_large_uploads_are_refused(http: httpx.Client, app: App) -> None:
    answer = http.post("/gradio_api/upload", files={"files": ("x.png", bytes(app.limits.bytes + 2**20))})
    assert answer.status_code == 413 and http.get("/").status_code == 200


def test_a_name_with_a_path_uploads_into_the_cache_alone(http: httpx.Client, app: App) -> None:
    before = kept(app)
    answer = http.post("/gradio_api/upload", files={"files": ("../../../../edits/x.safetensors", b"x")})
    if answer.status_code == 200:
        assert all(Path(path).resolve().is_relative_to(app.workspace.folder / "cache") for path in answer.json())
    assert kept(app) == before


def test_pages_of_other_sites_cannot_call(http: httpx.Client) -> None:
    answer = http.options("/gradio_api/call/compare", headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"})
    assert answer.headers.get("access-control-allow-origin") not in ("*", "https://evil.example")


def test_many_stop_the_same_job_at_once(server: str, app: App) -> None:
    client = Client(server, verbose=False)
    job = client.submit(*{**COMPARE, "steps": 100, "count": 16}.values(), api_name="/compare")
    while not (running := [found for found in app.jobs.all() if not found.over]):
        pass
    stops = [client.submit(running[0].number, api_name="/stop") for _ in range(8)]
    for stop in stops:
        stop.result(timeout=60)
    with pytest.raises(Exception, match=r"stopped"):
        job.result(timeout=60)
    assert running[0].state == "stopped"


def test_hostile_files_in_the_folder_are_refused(http: httpx.Client, app: App, saved_edit: str, tmp_path: Path) -> None:
    """Headers that lie, links that lead out, and what is no model at all."""
    models, edits = app.workspace.folder / "models", app.workspace.folder / "edits"
    (tmp_path / "outside.safetensors").write_bytes(app.workspace.edit_file(saved_edit).read_bytes())
    (tmp_path / "outside").mkdir()
    (models / "bomb.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    (models / "text.safetensors").write_text("root:x:0:0")
    (models / "edit.safetensors").write_bytes((tmp_path / "outside.safetensors").read_bytes())
    (edits / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (edits / "folder").mkdir()
    (edits / "folder" / "edit.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (edits / "bomb.safetensors").write_bytes((100_000_000).to_bytes(8, "little") + b"[" * 1000)
    before = kept(app)
    try:
        for name in ("bomb", "text", "edit"):
            event, told = call(http, "describe", [f"models/{name}.safetensors"])
            assert event == "error" and "Traceback" not in told and "root:" not in told
        for name in ("link.safetensors", "folder", "bomb.safetensors"):
            event, told = call(http, "export", list({**EXPORT, "edits": [f"edits/{name}"]}.values()))
            assert event == "error" and "Traceback" not in told
            event, told = call(http, "attack", list({**ATTACK, "edit": f"edits/{name}"}.values()))
            assert event == "error" and "Traceback" not in told
        assert call(http, "describe", ["emoji-sd"])[0] == "complete"
        assert kept(app) == before and http.get("/").status_code == 200
    finally:
        for path in (models / "bomb.safetensors", models / "text.safetensors", models / "edit.safetensors"):
            path.unlink()
        for path in (edits / "link.safetensors", edits / "folder" / "edit.safetensors", edits / "bomb.safetensors"):
            path.unlink()
        (edits / "folder").rmdir()


def test_attacks_of_many_are_stopped_at_once_and_leave_nothing(server: str, app: App, saved_edit: str) -> None:
    clients = [Client(server, verbose=False) for _ in range(4)]
    before = kept(app)
    asked = {**ATTACK, "edit": saved_edit, "attacks": ["ring_a_bell"], "steps": 20, "images": 16}
    jobs = [client.submit(*asked.values(), api_name="/attack") for client in clients]
    for _ in range(600):
        if len(started := [job for job in app.jobs.all() if not job.over]) == len(jobs):
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"{len(started)} of {len(jobs)} jobs were started: {[job.exception() for job in jobs if job.done()]}")
    stops = [client.submit(job.number, api_name="/stop") for client in clients for job in started]
    for stop in stops:
        stop.result(timeout=60)
    for job in jobs:
        with pytest.raises(Exception, match="stopped"):
            job.result(timeout=60)
    assert all(job.state == "stopped" for job in started) and kept(app) == before and not app.shelf.model.edits
