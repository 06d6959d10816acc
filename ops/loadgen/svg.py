"""Line charts as SVG, written by hand: what plots of measurements need, without a plotting library.

The same values give the same bytes, so that a plot in the documentation can be compared with its data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 560, 340
LEFT, RIGHT, TOP, BOTTOM = 68, 16, 40, 48
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's palette, which people with colour blindness can tell apart."""
MAX_TICKS = 8
MARGIN = 1.1
ALMOST_MORE = 1 + 1e-9
"""Powers of ten are not exact, and a value that is one must not fall beside it."""


@dataclass(frozen=True, slots=True)
class Series:
    """One line: finite values of equal number, `xs` ascending."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Lines over common axes, values being zero or more. A logarithmic axis leaves out those that are zero. With
    `x_ticks`, all positive, the x axis is logarithmic and has lines at these."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    x_ticks: Sequence[float] = ()
    log_x: bool = False
    log_y: bool = False
    has_points: bool = True


@dataclass(frozen=True, slots=True)
class Axis:
    """From values to pixels, and the values that get a line."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool
    ticks: Sequence[float]

    def place(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.is_log else (self.low, self.high)
        share = ((math.log(value) if self.is_log else value) - low) / (high - low)
        return self.start + share * (self.end - self.start)


def axis_over(values: Sequence[float], start: float, end: float, *, is_log: bool) -> Axis:
    """An axis that holds all of these and ends at round values; a linear one begins at zero."""
    if is_log:
        low, high = _round_below(min(values, default=1.0)), _round_above(max(values, default=1.0))
        high = high if high > low else 10 * low
        return Axis(low, high, start, end, True, _log_ticks(low, high))
    highest = max(values, default=0.0)
    step = _step((highest if highest > 0 else 1.0) / MAX_TICKS)
    num_steps = max(math.ceil(highest / step / ALMOST_MORE), 1)
    return Axis(0.0, num_steps * step, start, end, False, [number * step for number in range(num_steps + 1)])


def axis_at(ticks: Sequence[float], start: float, end: float) -> Axis:
    """A logarithmic axis with these ticks, whose values are all between them."""
    return Axis(min(ticks) / MARGIN, max(ticks) * MARGIN, start, end, True, ticks)


def _step(least: float) -> float:
    size = 10.0 ** math.floor(math.log10(least))
    return next(size * factor for factor in (1, 2, 5, 10) if size * factor >= least)


def _around(value: float) -> list[float]:
    """1, 2, 5 and 10 of its power of ten, as they come out in floating point."""
    power = math.floor(math.log10(value))
    return [factor * 10.0**power for factor in (1, 2, 5, 10)]


def _round_below(value: float) -> float:
    return max(one for one in _around(value) if one <= value * ALMOST_MORE)


def _round_above(value: float) -> float:
    return min(one for one in _around(value) if one >= value / ALMOST_MORE)


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 of each power of ten; only the powers where these are too many, and then not each of them."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors, stride in (((1, 2, 5), 1), ((1,), 1), ((1,), math.ceil(len(powers) / MAX_TICKS))):
        ticks = [factor * 10.0**power for power in powers[::stride] for factor in factors]
        found = [tick for tick in ticks if low / ALMOST_MORE <= tick <= high * ALMOST_MORE]
        if len(found) <= MAX_TICKS:
            break
    return found


def draw(charts: Sequence[Chart]) -> str:
    """All charts side by side as one SVG document."""
    size = f'width="{WIDTH * len(charts)}" height="{HEIGHT}"'
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">']
    lines.append('<rect width="100%" height="100%" fill="white"/>')
    for number, chart in enumerate(charts):
        lines += [f'<g transform="translate({number * WIDTH} 0)">', *_chart(chart), "</g>"]
    return "\n".join([*lines, "</svg>"]) + "\n"


def _chart(chart: Chart) -> Iterator[str]:
    shown = [Series(one.name, *_drawable(one, chart)) for one in chart.series]
    xs, ys = [x for one in shown for x in one.xs], [y for one in shown for y in one.ys]
    right = WIDTH - RIGHT
    x_axis = axis_at(chart.x_ticks, LEFT, right) if chart.x_ticks else axis_over(xs, LEFT, right, is_log=chart.log_x)
    y_axis = axis_over(ys, HEIGHT - BOTTOM, TOP, is_log=chart.log_y)
    yield _text(WIDTH / 2, 18, chart.title, "middle", ' font-weight="bold"')
    yield _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, chart.x_label)
    yield _text(0, 0, chart.y_label, extra=f' transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2:g}) rotate(-90)"')
    yield from _grid(x_axis, y_axis)
    for number, one in enumerate(shown):
        yield from _line(one, x_axis, y_axis, COLOURS[number % len(COLOURS)], has_points=chart.has_points)
    yield from _legend([one.name for one in shown])


def _drawable(series: Series, chart: Chart) -> tuple[list[float], list[float]]:
    points = [
        (x, y)
        for x, y in zip(series.xs, series.ys, strict=True)
        if (x > 0 or not (chart.log_x or chart.x_ticks)) and (y > 0 or not chart.log_y)
    ]
    return [x for x, _ in points], [y for _, y in points]


def _grid(x_axis: Axis, y_axis: Axis) -> Iterator[str]:
    top, bottom, left, right = y_axis.end, y_axis.start, x_axis.start, x_axis.end
    for tick in x_axis.ticks:
        x = x_axis.place(tick)
        yield f'<path d="M{x:.1f} {bottom}V{top}" stroke="#ddd"/>'
        yield _text(x, bottom + 16, f"{tick:.6g}")
    for tick in y_axis.ticks:
        y = y_axis.place(tick)
        yield f'<path d="M{left} {y:.1f}H{right}" stroke="#ddd"/>'
        yield _text(left - 6, y + 4, f"{tick:.6g}", "end")
    yield f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="black"/>'


def _line(series: Series, x_axis: Axis, y_axis: Axis, colour: str, *, has_points: bool) -> Iterator[str]:
    points = [(x_axis.place(x), y_axis.place(y)) for x, y in zip(series.xs, series.ys, strict=True)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
    if has_points or len(points) == 1:
        yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points)


def _legend(names: Sequence[str]) -> Iterator[str]:
    if len(names) < 2:
        return
    for number, name in enumerate(names):
        x = LEFT + number * (WIDTH - LEFT - RIGHT) / len(names)
        yield f'<path d="M{x:g} 30h16" stroke="{COLOURS[number % len(COLOURS)]}" stroke-width="2"/>'
        yield _text(x + 20, 34, name, "start")


def _text(x: float, y: float, text: str, anchor: str = "middle", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(text)}</text>'
