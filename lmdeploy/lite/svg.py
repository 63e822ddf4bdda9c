"""The two kinds of plots of the comparison's page, as SVG text: labelled bars in groups, and points over a logarithmic axis.

Colours are CSS classes of the page (`c0`, `c1`, ...), so that light and dark schemes look alike; all texts are escaped here.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 520
LABEL, VALUE = 78, 92  # room left of the bars for names, right of them for numbers
ROW, HEAD = 22, 26
#: Points: a shape for each model, as wide as the circle's radius 5.
SHAPES = (
    '<circle class="{c}" cx="{x:.1f}" cy="{y:.1f}" r="5.5"/>',
    '<rect class="{c}" x="{x0:.1f}" y="{y0:.1f}" width="10" height="10" rx="1"/>',
    '<path class="{c}" d="M{x:.1f} {y1:.1f}l6.5 11h-13z"/>',
    '<path class="{c}" d="M{x:.1f} {y1:.1f}l6 6.5l-6 6.5l-6 -6.5z"/>',
    '<path class="{c}" d="M{x:.1f} {y2:.1f}l-6.5 -11h13z"/>',
)


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: its group's heading, its own name, colour class, length, the text at its end, and a standard error (0 = none)."""

    group: str
    name: str
    colour: str
    value: float
    text: str
    error: float = 0.0


@dataclass(frozen=True, slots=True)
class Point:
    """One point: coordinates and standard error, colour class, number of its shape, and what a pointer resting on it reads."""

    x: float
    y: float
    error: float
    colour: str
    shape: int
    text: str


def bars(items: Sequence[Bar], label: str) -> str:
    """Horizontal bars from 0; negative values go to the left."""
    groups = list(dict.fromkeys(item.group for item in items))
    low = min(0.0, *(item.value - item.error for item in items))
    high = max(0.0, *(item.value + item.error for item in items))
    scale = (WIDTH - LABEL - VALUE) / ((high - low) or 1)
    zero, y, parts = LABEL - low * scale, 0.0, []
    for group in groups:
        parts.append(_text(0, y + 17, group, "g"))
        y += HEAD
        start = y
        for item in (i for i in items if i.group == group):
            parts.append(_bar(item, y, zero, scale))
            y += ROW
        parts.append(f'<line class="axis" x1="{zero:.1f}" x2="{zero:.1f}" y1="{start:.0f}" y2="{y:.0f}"/>')
        y += 6
    return _svg(y, label, parts)


def _bar(item: Bar, y: float, zero: float, scale: float) -> str:
    length, middle = item.value * scale, y + ROW / 2
    start, end = min(zero, zero + length), max(zero, zero + length)
    shape = f'<rect class="{item.colour}" x="{start:.1f}" y="{y + 3:.1f}" width="{max(1.0, end - start):.1f}" height="{ROW - 7}" rx="2"/>'
    reach = item.error * scale
    whisker = ""
    if item.error > 0:
        tip = zero + length
        whisker = f'<path class="err" d="M{tip - reach:.1f} {middle - 0.5:.1f}h{2 * reach:.1f}m0 -3v6M{tip - reach:.1f} {middle - 3.5:.1f}v6"/>'
    title = f"<title>{_escape(f'{item.group}, KV {item.name}: {item.text}')}</title>"
    return f"<g>{title}{_text(LABEL - 8, middle + 4, item.name, 'n')}{shape}{whisker}{_text(end + reach + 6, middle + 4, item.text, 'v')}</g>"


def points(items: Sequence[Point], x_title: str, y_title: str, zero_name: str) -> str:
    """Points over a linear x from 0 and a logarithmic y; those with y = 0 stand on a line of their own below, called `zero_name`."""
    left, top, bottom, height = 62, 26, 262, 330
    positive = [item.y for item in items if item.y > 0] or [1e-3]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)) + 1e-9)
    high = max(high, low + 1)
    right = _nice(max(item.x for item in items) * 1.04)

    def at(x: float) -> float:
        return left + x / right * (WIDTH - left - 16)

    def up(y: float) -> float:
        return bottom - (math.log10(y) - low) / (high - low) * (bottom - top)

    parts = [_text(0, 12, y_title, "t")]
    for power in range(low, high + 1):
        parts.append(f'<line class="grid" x1="{left}" x2="{WIDTH}" y1="{up(10.0**power):.1f}" y2="{up(10.0**power):.1f}"/>')
        parts.append(_text(left - 8, up(10.0**power) + 4, f"{10.0**power:g}", "n"))
    line = bottom + 26
    parts += [f'<line class="axis" x1="{left}" x2="{WIDTH}" y1="{line}" y2="{line}"/>', _text(left - 8, line + 4, zero_name, "n")]
    for step in range(6):
        x = right * step / 5
        parts.append(_text(at(x), line + 18, f"{x:.3g}", "m"))
    parts.append(_text((left + WIDTH) / 2, line + 36, x_title, "m"))
    for item in items:
        y = up(item.y) if item.y > 0 else line
        parts.append(_point(item, at(item.x), y, (up(max(item.y - item.error, 10.0**low)), up(item.y + item.error)) if item.y > 0 and item.error > 0 else None))
    return _svg(height, f"{y_title} over {x_title}", parts)


def _point(item: Point, x: float, y: float, ends: tuple[float, float] | None) -> str:
    whisker = "" if ends is None else f'<line class="err" x1="{x:.1f}" x2="{x:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}"/>'
    shape = SHAPES[item.shape % len(SHAPES)].format(c=item.colour, x=x, y=y, x0=x - 5, y0=y - 5, y1=y - 6.5, y2=y + 5.5)
    return f"<g><title>{_escape(item.text)}</title>{whisker}{shape}</g>"


def marker(colour: str, shape: int) -> str:
    """A point alone, for legends."""
    drawn = SHAPES[shape % len(SHAPES)].format(c=colour, x=8, y=8, x0=3, y0=3, y1=1.5, y2=13.5)
    return f'<svg class="key" viewBox="0 0 16 16" width="16" height="16" aria-hidden="true">{drawn}</svg>'


def _nice(value: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.5, 2, 2.5, 3, 4, 5, 7.5, 10) if step * power >= value * (1 - 1e-9))


def _text(x: float, y: float, words: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{_escape(words)}</text>'


def _escape(words: str) -> str:
    return html.escape(words)


def _svg(height: float, label: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{_escape(label)}">{"".join(parts)}</svg>'
