"""Plots are XML that draws the values: where points lie, which ticks axes have, what is left out."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from ops.loadgen.plot import tokens_by_second
from ops.loadgen.svg import Chart, Series, axis_over, draw
from tests.ops.loadgen.test_result import answered

NAMESPACE = "{http://www.w3.org/2000/svg}"


def lines_of(chart: Chart) -> list[list[tuple[float, float]]]:
    """Points of each line in pixels."""
    root = ElementTree.fromstring(draw([chart]))
    texts = [line.attrib["points"].split() for line in root.iter(f"{NAMESPACE}polyline")]
    return [[tuple(map(float, point.split(","))) for point in points] for points in texts]  # type: ignore[misc]


def chart(series: list[Series], **options: object) -> Chart:
    return Chart(title="a < b & c", x_label="x", y_label="y", series=series, **options)  # type: ignore[arg-type]


def test_points_lie_where_their_values_are() -> None:
    """On a linear axis equal steps are equal distances, on a logarithmic one equal ratios; y grows upwards."""
    (line,) = lines_of(chart([Series("", [1, 2, 3], [10, 20, 40])]))
    steps = [after[0] - before[0] for before, after in zip(line, line[1:], strict=False)]
    assert steps[0] == pytest.approx(steps[1], abs=0.2)
    assert line[1][1] - line[2][1] == pytest.approx(2 * (line[0][1] - line[1][1]), abs=0.3)
    (line,) = lines_of(chart([Series("", [1, 2, 4], [10, 100, 1000])], x_ticks=[1, 2, 4], log_y=True))
    for axis in (0, 1):
        assert line[1][axis] - line[0][axis] == pytest.approx(line[2][axis] - line[1][axis], abs=0.2)


def test_texts_are_escaped_and_all_lines_have_names() -> None:
    root = ElementTree.fromstring(draw([chart([Series("one", [1], [2]), Series("two", [1], [3])])]))
    texts = [text.text for text in root.iter(f"{NAMESPACE}text")]
    assert {"a < b & c", "one", "two", "x", "y"} <= set(texts)


def test_a_logarithmic_axis_leaves_out_what_is_zero() -> None:
    (line,) = lines_of(chart([Series("", [0, 1, 2], [1, 0, 5])], log_y=True))
    assert len(line) == 2


def test_charts_without_values_are_drawn() -> None:
    for options in ({}, {"log_x": True, "log_y": True}):
        assert lines_of(chart([Series("", [], [])], **options)) == [[]]


@pytest.mark.parametrize(
    ("values", "is_log", "ticks"),
    [
        ([0, 73], False, [0, 10, 20, 30, 40, 50, 60, 70, 80]),
        ([3], False, [0, 0.5, 1, 1.5, 2, 2.5, 3]),
        ([27, 180], True, [20, 50, 100, 200]),
        ([1000, 1000], True, [1000, 2000, 5000, 10000]),
        ([0.5, 40_000], True, [1, 10, 100, 1000, 10000]),
    ],
)
def test_ticks_are_round_and_few(values: list[float], is_log: bool, ticks: list[float]) -> None:
    axis = axis_over(values, 0, 100, is_log=is_log)
    assert axis.ticks == pytest.approx(ticks)
    assert all(0 <= axis.place(value) <= 100 for value in values)


def test_tokens_are_counted_in_the_second_in_which_they_came() -> None:
    """The third answer's two events carry six tokens."""
    answers = [
        answered(100.0, [100.2, 100.9, 102.1]),
        answered(100.0, [101.5]),
        answered(100.0, [100.1, 102.9], num_tokens=6),
    ]
    assert tokens_by_second(answers, 100.0) == ([0.5, 1.5, 2.5], [5.0, 1.0, 4.0])
