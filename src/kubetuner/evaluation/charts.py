"""Line charts as geometry for inline SVG; the template only places what is computed here."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 720, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 40
MAX_POINTS = 400

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One line: a CSS class for its colour and the ``points`` attribute of an SVG polyline."""

    name: str
    style: str
    points: str


@dataclass(frozen=True)
class Tick:
    """A labelled position on an axis, in SVG units."""

    at: float
    label: str


@dataclass(frozen=True)
class Chart:
    """A chart ready to be drawn."""

    title: str
    x_label: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def line_chart(title: str, x_label: str, series: Sequence[tuple[str, str, Points]]) -> Chart | None:
    """A chart of ``(name, style, points)`` series; points that are not finite are left out.

    Returns:
        ``None`` when no series has two points.
    """
    cleaned = [(name, style, _thin(_finite(points))) for name, style, points in series]
    cleaned = [entry for entry in cleaned if len(entry[2]) > 1]
    if not cleaned:
        return None
    xs = [x for _, _, points in cleaned for x, _ in points]
    ys = [y for _, _, points in cleaned for _, y in points]
    x_range, y_values = (min(xs), max(xs)), nice_ticks(min(0.0, *ys), max(ys))
    y_range = (y_values[0], max(y_values[-1], max(ys)))

    def x_at(value: float) -> float:
        return _scale(value, x_range, LEFT, WIDTH - RIGHT)

    def y_at(value: float) -> float:
        return _scale(value, y_range, HEIGHT - BOTTOM, TOP)

    lines = tuple(
        Line(name, style, " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in points))
        for name, style, points in cleaned
    )
    x_ticks = tuple(Tick(x_at(x), f"{x:g}") for x in nice_ticks(*x_range) if x_range[0] <= x <= x_range[1])
    return Chart(title, x_label, lines, x_ticks, tuple(Tick(y_at(y), f"{y:g}") for y in y_values))


def smoothed(points: Points) -> list[tuple[float, float]]:
    """Centred moving average over about a twentieth of the points; the ends average over fewer."""
    half = max(1, len(points) // 40)
    values = [y for _, y in points]
    result = []
    for index, (x, _) in enumerate(points):
        reach = min(half, index, len(points) - 1 - index)
        window = values[index - reach : index + reach + 1]
        result.append((x, sum(window) / len(window)))
    return result


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round values that span ``low`` to ``high``."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor * count >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def _finite(points: Points) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average neighbours so that at most :data:`MAX_POINTS` are left."""
    size = math.ceil(len(points) / MAX_POINTS) if points else 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _scale(value: float, span: tuple[float, float], start: float, end: float) -> float:
    low, high = span
    return start + (value - low) / ((high - low) or 1.0) * (end - start)
