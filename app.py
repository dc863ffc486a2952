"""The Gradio app: draw a prompt with and without edits, side by side, from the same noise.

It holds no logic of its own: images come from the sampler, edits from their files.
"""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from toolkit.commands import add_model_arguments, open_model
from toolkit.errors import PalimpsestError, UserError

if TYPE_CHECKING:
    import gradio as gr
    from PIL import Image

    from toolkit.model import Model

HELP = "open the app in the browser: compare a model with its edited version"
MAX_STEPS = 100


def add_arguments(parser: ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--port", type=int, default=7860, help="port on this machine (default %(default)s)")


def run(args: Namespace) -> dict[str, Any]:
    """Serve on localhost until interrupted. Gives `app`, the address."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        build(open_model(args)).launch(server_name="127.0.0.1", server_port=args.port, share=False)
    except OSError as error:
        raise UserError(f"cannot listen on port {args.port} ({error}); give another --port") from None
    return {"app": f"http://127.0.0.1:{args.port}"}


def build(model: Model) -> gr.Blocks:
    """The page for a model with edits attached: each gets a slider for its strength."""
    import gradio as gr

    edits = [edit for edit, _ in model.edits]

    def compare(prompt: str, seed: float, steps: float, guidance: float, *scales: float) -> tuple[Image.Image, Image.Image]:
        from toolkit.sample import generate

        options: dict[str, Any] = {"steps": max(1, min(int(steps), MAX_STEPS)), "guidance": guidance}
        try:
            model.detach_all()
            before = generate(model, [prompt], [int(seed)], **options)[0]
            for edit, scale in zip(edits, scales, strict=True):
                model.attach(edit, scale)
            return before, generate(model, [prompt], [int(seed)], **options)[0]
        except PalimpsestError as error:
            raise gr.Error(str(error)) from None

    with gr.Blocks(title="Palimpsest") as page:
        gr.Markdown(f"# Palimpsest\n{model.source}, with {len(edits)} edit{'s' * (len(edits) != 1)}. Left: without, right: with.")
        prompt = gr.Textbox("a pistol on a red background", label="Prompt", max_length=500)
        with gr.Row():
            seed = gr.Number(0, label="Seed", precision=0)
            steps = gr.Slider(1, MAX_STEPS, 20, step=1, label="Steps")
            guidance = gr.Slider(1, 15, model.guidance, label="Guidance scale")
        names = [f"{edit.info.method or edit.kind()} {' '.join(edit.info.triggers)}".strip() for edit in edits]
        scales = [
            gr.Slider(0, 2, scale, label=f"Strength of {name}", interactive=edit.scalable)
            for name, (edit, scale) in zip(names, model.edits, strict=True)
        ]
        button = gr.Button("Draw", variant="primary")
        slider = gr.ImageSlider(label="without | with", height=512)
        # One job at a time: the model is one, and its edits come and go.
        button.click(compare, [prompt, seed, steps, guidance, *scales], slider, concurrency_limit=1, api_name="compare")
    return page
