"""How the app looks: Gradio's own components in system fonts, so that nothing is asked of any network."""

from __future__ import annotations

from typing import Any

import gradio as gr

SANS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
PIXELATED = 128  # sides up to which pictures are enlarged without smoothing

CSS = """
.gradio-container { width: 100% !important; max-width: 1240px !important; margin: 0 auto !important; }
.pal-head h1 { margin: 0; font-size: 1.5rem; letter-spacing: -0.01em; }
.pal-head p { margin: 0.1rem 0 0; color: var(--body-text-color-subdued); }
.pal-bar { align-items: center; }
.pal-line [role=status] { display: flex; flex-wrap: wrap; gap: 0.3rem 0.8rem; align-items: center; min-height: 2rem; }
.pal-line [data-state=failed] { color: var(--error-text-color); }
.pal-line progress { flex: 1 1 8rem; height: 0.5rem; accent-color: var(--primary-600); }
.grid-wrap { min-height: 0 !important; max-height: none !important; }
.pal-pixels img { image-rendering: pixelated; }
.pal-drop .grid-wrap { padding-top: 2.6rem; }
.pal-drop .grid-container { grid-template-columns: repeat(auto-fill, minmax(5rem, 1fr)) !important; }
.pal-library .grid-wrap { padding-top: 2.6rem; }
.pal-library .grid-container { grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)) !important; }
.pal-library .caption-label { white-space: normal !important; left: 0; right: 0; max-width: none; font-size: 0.75rem; }
.pal-region { border-left: 0.6rem solid; padding-left: 0.6rem; }
.pal-red { border-color: #e11d48; } .pal-blue { border-color: #2563eb; }
.pal-green { border-color: #16a34a; } .pal-yellow { border-color: #eab308; }
.pal-slider img { width: 100% !important; height: 100% !important; object-fit: contain; }
.pal-note, .pal-note p { color: var(--body-text-color-subdued); font-size: 0.9rem; }
.pal-list label { width: 100%; }
.pal-page iframe { width: 100%; height: 75vh; border: 1px solid var(--border-color-primary); border-radius: var(--radius-md); }
footer { opacity: 0.8; }
:focus-visible { outline: 2px solid var(--primary-500); outline-offset: 2px; }
@media (max-width: 640px) {
  .gradio-container { padding: 0.5rem !important; }
  .pal-columns { flex-direction: column; }
}
@media (prefers-reduced-motion: reduce) { * { transition: none !important; animation: none !important; } }
"""


def theme() -> gr.themes.Base:
    """Quiet colours, light and dark as the browser asks for."""
    soft = gr.themes.Soft(
        primary_hue="teal", secondary_hue="teal", neutral_hue="stone", font=SANS, font_mono=MONO, radius_size=gr.themes.sizes.radius_md
    )
    labels: dict[str, str] = {"block_title_padding": "0", "block_title_text_weight": "600", "block_label_text_weight": "600"}
    for dark in ("", "_dark"):
        labels[f"block_title_background_fill{dark}"] = "transparent"
        labels[f"block_label_background_fill{dark}"] = "*background_fill_primary"
        labels |= dict.fromkeys((f"block_title_text_color{dark}", f"block_label_text_color{dark}"), "*body_text_color")
        labels |= {f"button_primary_background_fill{dark}": "*primary_700", f"button_primary_text_color{dark}": "white"}
        labels[f"button_primary_background_fill_hover{dark}"] = "*primary_800"
    return soft.set(**labels)  # type: ignore[arg-type]


def launching() -> dict[str, Any]:
    """What `launch` is given for the looks."""
    return {"theme": theme(), "css": CSS, "footer_links": ["api", "settings"]}


def pixels(side: int) -> list[str]:
    """The classes of components that show pictures of this side."""
    return ["pal-pixels"] if side <= PIXELATED else []
