"""What HTML reports are made of: tables that sort, a scatter plot, heat maps, rows of images. Self-contained, every text escaped.

Each part is a string of HTML; `page` puts them into report.html, which has the styles and the few lines of script.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Literal

from PIL import Image

from eval.intervals import Estimate

TEMPLATE = Path(__file__).with_name("report.html")
HOT = 0.8  # from this rate on a heat map's cell is dark enough for light text
LONG = 40  # characters in a table's cell from which on it breaks into lines
QUALITY = 85  # of the images, as WebP


def page(title: str, *parts: str) -> str:
    """The whole file."""
    body = "\n".join(filter(None, (f"<h1>{escape(title)}</h1>", *parts)))
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(title=escape(title), body=body)


def section(title: str, *parts: str, level: int = 2) -> str:
    """A heading with what belongs to it; "" when that is empty."""
    held = "\n".join(filter(None, parts))
    return f"<section><h{level}>{escape(title)}</h{level}>\n{held}</section>" if held else ""


def paragraph(text: str, kind: Literal["", "soft", "good", "bad"] = "") -> str:
    """A paragraph; "" when there is no text."""
    return f"<p{_class(kind)}>{escape(text)}</p>" if text else ""


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def points(lines: Iterable[str]) -> str:
    """A list; "" without lines."""
    held = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{held}</ul>" if held else ""


def facts(of: Mapping[str, str]) -> str:
    """Names and what they are; empty ones are left out."""
    held = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in of.items() if value)
    return f'<dl class="facts">{held}</dl>'


def folded(title: str, *parts: str) -> str:
    """Parts that a click shows."""
    return f"<details><summary>{escape(title)}</summary>\n{''.join(parts)}</details>"


def commands(lines: Sequence[str]) -> str:
    """What to type."""
    return f"<pre><code>{escape(chr(10).join(lines))}</code></pre>" if lines else ""


# --- tables -----------------------------------------------------------------------------------------------------------
Value = Estimate | float | str


def table(columns: Sequence[str], rows: Sequence[Sequence[Value]], caption: str = "") -> str:
    """A table that sorts by any column; rates show their intervals. Columns without any value are left out; "" without rows."""
    shown = [i for i in range(len(columns)) if any(_text(row[i]) for row in rows)]
    head = "".join(f'<th scope="col" aria-sort="none"><button type="button">{escape(columns[i])}</button></th>' for i in shown)
    body = "".join(f"<tr>{''.join(_cell(row[i]) for i in shown)}</tr>" for row in rows)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>' if rows else ""


def _cell(value: Value) -> str:
    if isinstance(value, str):
        return f"<td{_class('text' if len(value) > LONG else '')}>{escape(value)}</td>"
    number = value.value if isinstance(value, Estimate) else value
    if math.isnan(number):
        return '<td data-value=""></td>'
    spread = f"<small>{100 * value.low:.0f} to {100 * value.high:.0f}, n {value.n}</small>" if isinstance(value, Estimate) else ""
    return f'<td data-value="{number:.6g}">{_text(value)}{spread}</td>'


def _text(value: Value) -> str:
    """A value without its interval; "" when there is none."""
    if isinstance(value, str):
        return value
    if isinstance(value, Estimate):
        return "" if math.isnan(value.value) else f"{100 * value.value:.0f} %"
    return "" if math.isnan(value) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def heat_map(columns: Sequence[str], rows: Mapping[str, Sequence[Estimate]], caption: str) -> str:
    """Rates as colours, the higher the darker; what was not measured is a dash. "" without rows."""
    head = "".join(f'<th scope="col">{escape(name).replace("_", "_<wbr>")}</th>' for name in columns)  # a name may go on in a second line
    body = "".join(f'<tr><th scope="row">{escape(name)}</th>{"".join(map(_heat, rates))}</tr>' for name, rates in rows.items())
    title = f"<caption>{escape(caption)}</caption>"
    return (
        f'<div class="wide"><table class="heat">{title}<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        if rows
        else ""
    )


def _heat(rate: Estimate) -> str:
    if math.isnan(rate.value):
        return '<td class="none">–</td>'
    said = f"{100 * rate.value:.0f} % [{100 * rate.low:.0f}, {100 * rate.high:.0f}], n {rate.n}"
    hot = ' class="hot"' if rate.value >= HOT else ""
    return f'<td{hot} style="--rate: {rate.value:.2f}" title="{said}">{100 * rate.value:.0f}</td>'


# --- a scatter plot ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Point:
    """A point with its intervals. kind: which of the two marks it has."""

    name: str
    x: Estimate
    y: Estimate
    kind: Literal["one", "two"] = "one"


WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 440, 340, 44, 44, 14, 14
LINE = 14  # from one label to the next
STARTS = (0.8, 0.6, 0.0)  # where an axis may begin, so that four equal parts of it end at round numbers


def scatter(found: Sequence[Point], x: str, y: str, kinds: Mapping[str, str], caption: str) -> str:
    """Rates of things against each other, with their names and intervals. kinds: what a mark ("one", "two") means; "" without points.

    The axis of y goes from 0 to 100 %, that of x from just below what is there.
    """
    if not found:
        return ""
    least = min(point.x.value if math.isnan(point.x.low) else point.x.low for point in found)
    plane = Plane(next(start for start in STARTS if start <= max(0.0, least)))
    grid = "".join(_ticks(plane, share / 4) for share in range(5))
    names = _labels(plane, found)
    marks = "".join(_mark(plane, point, label) for point, label in zip(found, names, strict=True))
    axes = (
        f'<text class="name" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>'
        f'<text class="name" transform="translate(11 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">{escape(y)}</text>'
    )
    used, shapes = {point.kind for point in found}, zip(kinds.items(), ("Circle", "Square"), strict=False)
    key = "; ".join(f"{shape}: {meaning}" for (kind, meaning), shape in shapes if kind in used)
    said, size = escape(f"{y} against {x}"), f"0 0 {WIDTH} {HEIGHT}"
    drawing = f'<svg class="scatter" viewBox="{size}" role="img" aria-label="{said}">{grid}{axes}{marks}</svg>'
    return f"<figure>{drawing}<figcaption>{escape(caption)} {escape(key)}.</figcaption></figure>"


@dataclass(frozen=True)
class Plane:
    """What a scatter plot is drawn on. start: the share at which the axis of x begins; both end at 1."""

    start: float

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where shares are on the drawing; those outside the axes are at their ends."""
        across, up = (min(1.0, max(0.0, share)) for share in ((x - self.start) / (1 - self.start), y))
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def _ticks(plane: Plane, part: float) -> str:
    """The lines of a grid at this part of both axes."""
    share = plane.start + part * (1 - plane.start)
    (x, bottom), (right, y), (left, top) = plane.place(share, 0), plane.place(1, part), plane.place(plane.start, 1)
    return (
        f'<path class="axis" d="M{x:.1f} {top:.1f}V{bottom:.1f}M{left:.1f} {y:.1f}H{right:.1f}"/>'
        f'<text class="tick" x="{x:.1f}" y="{bottom + 15:.1f}" text-anchor="middle">{100 * share:.0f}</text>'
        f'<text class="tick" x="{left - 5:.1f}" y="{y + 4:.1f}" text-anchor="end">{100 * part:.0f}</text>'
    )


def _labels(plane: Plane, found: Sequence[Point]) -> list[tuple[float, float, str]]:
    """Where each point's name goes: beside it, on the side that has room, and further up or down where another name is."""
    at = [plane.place(point.x.value, point.y.value) for point in found]
    placed: dict[int, tuple[float, float, str]] = {}
    for side, shift in (("start", 9), ("end", -9)):
        own = sorted((i for i, (x, _) in enumerate(at) if (x > WIDTH / 2) == (side == "end")), key=lambda i: at[i][1])
        rows, lowest = [at[i][1] + 4 for i in own], HEIGHT - BOTTOM - 3.0
        for k in range(1, len(rows)):
            rows[k] = max(rows[k], rows[k - 1] + LINE)
        for k in reversed(range(len(rows))):
            rows[k] = min(rows[k], lowest)
            lowest = rows[k] - LINE
        placed |= {i: (at[i][0] + shift, y, side) for i, y in zip(own, rows, strict=True)}
    return [placed[i] for i in range(len(found))]


def _mark(plane: Plane, point: Point, label: tuple[float, float, str]) -> str:
    """A point, its intervals and its name."""
    x, y = plane.place(point.x.value, point.y.value)
    (low, _), (high, _) = plane.place(point.x.low, 0), plane.place(point.x.high, 0)
    (_, under), (_, over) = plane.place(0, point.y.low), plane.place(0, point.y.high)
    shape = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
        if point.kind == "one"
        else f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9"/>'
    )
    at, line, side = label
    leader = f'<path class="leader" d="M{x:.1f} {y:.1f}L{at:.1f} {line - 4:.1f}"/>' if abs(line - y - 4) > LINE / 2 else ""
    spread = f'<path class="spread" d="M{low:.1f} {y:.1f}H{high:.1f}M{x:.1f} {under:.1f}V{over:.1f}"/>'
    said = escape(f"{point.name}: {_text(point.x)}, {_text(point.y)}")
    name = f'<text x="{at:.1f}" y="{line:.1f}" text-anchor="{side}">{escape(point.name)}</text>'
    return f'<g class="{point.kind}"><title>{said}</title>{spread}{leader}{shape}</g>{name}'


def beside(*figures: str) -> str:
    """Figures side by side where there is room."""
    return f'<div class="beside">{"".join(figures)}</div>' if any(figures) else ""


# --- images -----------------------------------------------------------------------------------------------------------
def strip(label: str, images: Sequence[Image.Image], said: str) -> str:
    """Images of one size in a row. said: what they show, for who does not see them; "" without images."""
    if not images:
        return ""
    width, height = images[0].size
    row = Image.new("RGB", (len(images) * (width + 2) - 2, height), "white")
    for i, image in enumerate(images):
        row.paste(image, (i * (width + 2), 0))
    data = io.BytesIO()
    row.save(data, "WEBP", quality=QUALITY)
    source = f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
    size = f"max-width: {4.5 * len(images):g}rem"
    return f'<div class="strip"><span>{escape(label)}</span><img src="{source}" style="{size}" alt="{escape(said)}"></div>'
