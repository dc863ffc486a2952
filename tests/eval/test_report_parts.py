"""The parts of HTML reports: nothing from outside, everything escaped, and what they show is what they are given."""

from __future__ import annotations

import base64
import io
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from PIL import Image

from eval import report_parts as part
from eval.intervals import NOTHING, Estimate, rate

EVIL = '<script>alert("x")</script>&'
VOID = {"meta", "img", "br"}


class Balanced(HTMLParser):
    """Whether every element is closed where it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass


def checked(html: str) -> Balanced:
    parser = Balanced()
    parser.feed(html)
    assert not parser.open
    return parser


def whole() -> str:
    half = Estimate(0.5, 0.4, 0.6, 20)
    image = Image.new("RGB", (8, 8), "red")
    return part.page(
        EVIL,
        part.paragraph(EVIL, "bad"),
        part.section(EVIL, part.points([EVIL]), part.facts({EVIL: EVIL})),
        part.table(("a", EVIL), [[EVIL, half], ["b", 3.0]], EVIL),
        part.heat_map((EVIL,), {EVIL: [half]}, EVIL),
        part.scatter([part.Point(EVIL, half, half)], EVIL, EVIL, {"one": EVIL}, EVIL),
        part.folded(EVIL, part.strip(EVIL, [image, image], EVIL), part.commands([EVIL])),
    )


def test_a_page_needs_nothing_from_outside() -> None:
    html = whole()
    assert all(source.startswith("data:") for source in checked(html).sources) and "@import" not in html and "url(" not in html
    assert not re.findall(r"https?://", html)
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html and len(html) < 30_000


def test_every_text_is_escaped() -> None:
    assert EVIL not in whole() and whole().count("<script>") == 1 and "&lt;script&gt;" in whole()


def test_a_table_says_what_it_sorts_by_and_leaves_empty_columns_out() -> None:
    html = part.table(("name", "rate", "none", "number"), [["a", rate([True, False]), NOTHING, 1234.5], ["b", NOTHING, math.nan, 2.0]])
    checked(html)
    assert re.findall(r'data-value="([^"]*)"', html) == ["0.5", "1234.5", "", "2"] and "none" not in re.sub('aria-sort="none"', "", html)
    assert "50 %" in html and "n 2" in html and html.count("<button") == 3
    assert part.table(("a",), []) == part.section("empty", "") == part.heat_map(("a",), {}, "") == part.points([]) == ""


def test_a_heat_map_has_the_rates_as_colours() -> None:
    html = part.heat_map(("x", "y", "z"), {"m": [Estimate(0.9, 0.8, 1, 9), Estimate(0.1, 0, 0.2, 9), NOTHING]}, "c")
    checked(html)
    assert re.findall(r"--rate: ([\d.]+)", html) == ["0.90", "0.10"] and html.count('class="hot"') == 1 and "–" in html


def test_points_are_where_their_rates_are() -> None:
    corner, middle = Estimate(1.2, 1, 1.3, 5), Estimate(0.5, 0.4, 0.75, 5)
    html = part.scatter([part.Point("a", corner, corner, "two"), part.Point("b", middle, middle)], "x", "y", {"one": "o", "two": "t"}, "c")
    svg = ET.fromstring(re.search(r"<svg.*</svg>", html)[0])  # type: ignore[index]
    (circle,), (square,) = svg.findall(".//circle"), svg.findall(".//rect")
    across, up = part.WIDTH - part.LEFT - part.RIGHT, part.HEIGHT - part.TOP - part.BOTTOM
    assert float(circle.attrib["cx"]) == part.LEFT + across / 2 and float(circle.attrib["cy"]) == part.TOP + up / 2
    assert float(square.attrib["x"]) + 4.5 == part.LEFT + across and float(square.attrib["y"]) + 4.5 == part.TOP, "kept within the axes"
    (spread,) = [path.attrib["d"] for path in svg.findall(".//g[@class='one']/path[@class='spread']")]
    assert spread.startswith(f"M{part.LEFT + 0.4 * across:.1f} ") and f"H{part.LEFT + 0.75 * across:.1f}" in spread
    assert "Circle: o; Square: t" in html


def test_the_axis_of_x_begins_just_below_what_is_there() -> None:
    kept, left = Estimate(0.95, 0.85, 1, 5), Estimate(0.5, 0.4, 0.75, 5)
    html = part.scatter([part.Point("a", kept, left)], "x", "y", {"one": "o"}, "c")
    svg = ET.fromstring(re.search(r"<svg.*</svg>", html)[0])  # type: ignore[index]
    (circle,) = svg.findall(".//circle")
    assert float(circle.attrib["cx"]) == part.LEFT + 0.75 * (part.WIDTH - part.LEFT - part.RIGHT), "0.95 is at three quarters from 0.8 to 1"
    ticks = [text.text for text in svg.findall(".//text[@class='tick']")]
    assert ticks == ["80", "0", "85", "25", "90", "50", "95", "75", "100", "100"], "of x and y in turn"


@pytest.mark.parametrize("count", [2, 6])
def test_names_of_points_do_not_cover_each_other(count: int) -> None:
    same = Estimate(0.9, 0.8, 1, 5)
    html = part.scatter([part.Point(str(i), same, same) for i in range(count)], "x", "y", {"one": "o"}, "c")
    rows = sorted(float(y) for y in re.findall(r'y="([\d.]+)" text-anchor="end">\d</text></?(?:svg|g)', html + "<svg"))
    assert all(below - above >= part.LINE - 0.11 for above, below in pairwise(rows))


def test_a_strip_holds_the_images() -> None:
    html = part.strip("after", [Image.new("RGB", (8, 6), "red"), Image.new("RGB", (8, 6), "blue")], "two")
    data = base64.b64decode(re.search(r"base64,([^\"]+)", html)[1])  # type: ignore[index]
    image = Image.open(io.BytesIO(data)).convert("RGB")
    red, blue = image.getpixel((2, 2)), image.getpixel((15, 3))
    assert image.size == (18, 6) and red[0] > 200 > 60 > red[2] and blue[2] > 200 > 60 > blue[0]  # type: ignore[index, operator]
    assert part.strip("none", [], "") == ""
