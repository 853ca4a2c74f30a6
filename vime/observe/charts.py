"""Charts as inline SVG: no script, no network, readable in dark and light."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vime.observe.markup import details, escape, table

WIDTH, HEIGHT = 420, 190
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 24
MAX_POINTS = 400
SMOOTHED_FROM = 24
"""Points from which a single line is drawn smoothed over its raw values."""
TABLE_ROWS = 12
COLOURS = 8
"""Colours of lines in report.css, `s0` …; each also has its own dashes."""


@dataclass(frozen=True)
class Series:
    """One line of a chart. Points are (x, y), y finite."""

    label: str
    points: Sequence[tuple[float, float]]


def thin(points: Sequence[tuple[float, float]], most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `most` points: the lowest and highest of each bucket, so that spikes survive."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most // 2))
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        ends = {min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])}
        kept.extend(sorted(ends))
    return kept


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Centred moving mean over a twentieth of the points, truncated at both ends."""
    half = max(1, len(points) // 40)
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)

    def mean(at: int) -> float:
        first, last = max(0, at - half), min(len(points), at + half + 1)
        return (sums[last] - sums[first]) / (last - first)

    return [(x, mean(number)) for number, (x, _) in enumerate(points)]


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers in low..high, spaced by 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def brief(value: float) -> str:
    """A number as an axis label: `12k`, `0.05`."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= factor:
            return f"{value / (1e3 if unit == 'k' else factor):.4g}{unit}"
    return f"{value:.4g}"


def line_chart(title: str, lines: Sequence[Series], *, unit: str = "", axis: str = "rollout") -> str:
    """One chart over `axis`; title and first and last values are its text for screen readers. Empty without points."""
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    single = len(lines) == 1 and len(lines[0].points) >= SMOOTHED_FROM
    whole = lines
    lines = [Series(line.label, thin(line.points)) for line in lines]
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    low, high = min(ys), max(ys)
    pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    scale = _Scale(min(xs), max(xs), low - pad, high + pad)
    drawn = [_path(line, number, scale, "raw" if single else "") for number, line in enumerate(lines)]
    if single:
        drawn.append(_path(Series("", thin(smooth(whole[0].points))), 0, scale))
    said = "; ".join(
        f"{line.label}: {first:.4g} at {x0:g}, {last:.4g} at {x1:g}"
        for line in whole
        for (x0, first), (x1, last) in [(line.points[0], line.points[-1])]
    )
    last = " / ".join(brief(line.points[-1][1]) for line in whole)
    name = f"{title} ({unit})" if unit else title
    parts = [
        f'<figure class="chart"><figcaption>{escape(name)}<span class="last">{escape(last)}</span></figcaption>',
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}. {escape(said)}">',
        *_axes(scale),
        *drawn,
        "</svg>",
    ]
    if len(lines) > 1:
        keys = "".join(
            f'<span><i class="key s{n % COLOURS}"></i>{escape(line.label)}</span>' for n, line in enumerate(lines)
        )
        parts.append(f'<div class="legend">{keys}</div>')
    return "".join([*parts, details("values", _values(title, whole, axis)), "</figure>"])


def _values(title: str, lines: Sequence[Series], axis: str) -> str:
    """Up to TABLE_ROWS of the values, including first and last, as a table."""
    longest = max(lines, key=lambda line: len(line.points)).points
    count = min(TABLE_ROWS, len(longest))
    chosen = {longest[round(i * (len(longest) - 1) / max(1, count - 1))][0] for i in range(count)}
    of_line = [(line.label, dict(line.points)) for line in lines]
    rows = [
        {axis: f"{x:g}", **{label: f"{values[x]:.5g}" if x in values else "" for label, values in of_line}}
        for x in sorted(chosen)
    ]
    return table(rows, numbers=[axis, *(label for label, _ in of_line)], caption=title)


@dataclass(frozen=True)
class _Scale:
    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        span = self.x1 - self.x0 or 1.0
        return round(LEFT + (value - self.x0) / span * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM), 1)


def _axes(scale: _Scale) -> list[str]:
    parts = []
    for value in ticks(scale.y0, scale.y1):
        y = scale.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{brief(value)}</text>')
    for value in ticks(scale.x0, scale.x1, 6):
        parts.append(f'<text x="{scale.x(value)}" y="{HEIGHT - 7}" text-anchor="middle">{brief(value)}</text>')
    return parts


def _path(line: Series, number: int, scale: _Scale, more: str = "") -> str:
    points = [f"{scale.x(x)},{scale.y(y)}" for x, y in line.points]
    kind = f"s{number % COLOURS} {more}".strip()
    if len(points) == 1:
        x, y = points[0].split(",")
        return f'<circle class="{kind}" cx="{x}" cy="{y}" r="3"/>'
    return f'<polyline class="{kind}" points="{" ".join(points)}"/>'
