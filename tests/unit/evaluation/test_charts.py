import math

import pytest

from kubetuner.evaluation.charts import MAX_POINTS, line_chart, nice_ticks, smoothed


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 0.037, [0, 0.01, 0.02, 0.03, 0.04]), (5, 5, [5, 6]), (0, 0, [0, 0.2])],
)
def test_ticks_are_round_and_cover_the_values(low: float, high: float, expected: list[float]) -> None:
    assert nice_ticks(low, high)[: len(expected)] == pytest.approx(expected)


def test_points_stay_inside_the_frame_and_long_series_are_thinned() -> None:
    points = [(float(step), 1 / (step + 1)) for step in range(5000)]
    chart = line_chart("t", "step", [("a", "after", points)])

    assert chart is not None
    pairs = [tuple(map(float, pair.split(","))) for pair in chart.lines[0].points.split()]
    assert 2 <= len(pairs) <= MAX_POINTS
    assert all(chart.left <= x <= chart.right and chart.top <= y <= chart.bottom for x, y in pairs)


def test_what_is_not_finite_is_left_out_and_nothing_gives_no_chart() -> None:
    assert line_chart("t", "x", [("a", "after", [(0.0, 1.0), (1.0, math.nan)])]) is None
    assert line_chart("t", "x", []) is None


def test_smoothing_keeps_steps_and_a_straight_line() -> None:
    points = [(float(step), 2.0 * step) for step in range(100)]
    assert [x for x, _ in smoothed(points)] == [x for x, _ in points]
    assert [y for _, y in smoothed(points)] == pytest.approx([y for _, y in points])
