"""The Gradio app. It holds no logic of its own: its tabs are found in tabs/, and what they do is done below."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from toolkit.commands import add_model_arguments
from toolkit.errors import UserError

if TYPE_CHECKING:
    import gradio as gr

    from tabs.base import App

HELP = "open the app in the browser: compare a model with its edited version, erase, look at jobs"
LOCAL = ("127.0.0.1", "localhost", "::1")


def add_arguments(parser: ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--port", type=int, default=7860, help="port (default %(default)s)")
    parser.add_argument("--host", default=LOCAL[0], help="address to listen on (default %(default)s); any that is not local needs --auth")
    parser.add_argument("--share", action="store_true", help="also through Gradio's public tunnel; needs --auth")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="ask for these")
    parser.add_argument("--folder", default="out/app", metavar="DIR", help="the only place that is read and written (default %(default)s)")
    parser.add_argument("--allow-hub", action="store_true", help="also load models by their hub ids")


def run(args: Namespace) -> dict[str, Any]:
    """Serve until interrupted. Gives `app`, the address."""
    auth = credentials(args)
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    if not args.allow_hub:
        os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    from tabs.base import App
    from toolkit.runs import limit_memory

    app = App.of(args, torch.get_num_threads())
    if app.shelf.model.arch.device.type == "cpu":
        limit_memory()
    try:
        serve(app, args, auth)
    except OSError as error:
        raise UserError(f"cannot listen on port {args.port} ({error}); give another --port") from None
    finally:
        app.jobs.close()
    return {"app": f"http://{args.host}:{args.port}"}


def credentials(args: Namespace) -> tuple[str, str] | None:
    """Who may come in. None is whoever reaches this machine's own address; for others to reach it without is a UserError."""
    if args.auth is None:
        if args.share or args.host not in LOCAL:
            raise UserError("with --share or another --host anybody could use this machine; give --auth USER:PASSWORD too")
        return None
    user, _, password = args.auth.partition(":")
    if not user or len(password) < 8:
        raise UserError("--auth needs a user and a password of at least 8 characters; write --auth USER:PASSWORD")
    return user, password


def serve(app: App, args: Namespace, auth: tuple[str, str] | None = None, *, block: bool = True) -> gr.Blocks:
    """Launch the page; with `block` until interrupted."""
    os.environ["GRADIO_TEMP_DIR"] = str(app.workspace.folder / "cache")
    from tabs import looks
    from tabs.page import build

    app.limits.enforce()
    page = build(app)
    page.launch(
        server_name=args.host,
        server_port=args.port,
        share=args.share,
        auth=auth,
        max_file_size=app.limits.bytes,
        ssr_mode=False,
        mcp_server=False,
        run_history=False,
        enable_monitoring=False,
        prevent_thread_lock=not block,
        quiet=not block,
        **looks.launching(),
    )
    return page
