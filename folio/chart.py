"""The loss curves of a report, as HTML: an SVG that stretches with the page, and labels on top.

The SVG has no text, because it is stretched in one direction. Its coordinates are percent, from the
top left. report.html has the style.
"""

import math
from html import escape
from typing import NamedTuple

from folio.plot import smooth

CURVE_POINTS = 800  # longest curve
LABEL_HEIGHT = 6.0  # percent
N_COLORS = 6  # in report.html

Points = list[tuple[int, float]]  # updates, loss


class Curves(NamedTuple):
    """The losses of a run, in nats per token; one of the two may be empty."""

    name: str
    color: int  # its number
    train: Points  # of single batches
    val: Points


class Label(NamedTuple):
    y: float
    x: float
    style: str
    text: str


def lowest(points: Points) -> tuple[int, float]:
    return min(points, key=lambda point: point[1])


def draw(runs: list[Curves], baselines: list[tuple[str, float]]) -> str:
    """One chart of all runs, with baselines (name, loss) as dashed lines."""
    curves = [curve for run in runs for curve in (run.train, run.val)]
    losses = [loss for curve in curves for _, loss in curve] + [loss for _, loss in baselines]
    right, low, high = max(x for curve in curves for x, _ in curve) or 1, min(losses), max(losses)
    if baselines:  # a loss that diverges would flatten the rest
        high = min(high, 1.3 * max(loss for _, loss in baselines))
    margin = 0.05 * (high - low or 1)
    low, high = low - margin, high + margin
    shapes, labels, legend, marks = [], [], [], []

    def at(x: float, loss: float) -> tuple[float, float]:
        return 100 * x / right, 100 * (high - min(loss, high)) / (high - low)

    def line(points: Points, style: str) -> None:
        corners = " ".join(f"{x:.2f},{y:.2f}" for x, y in (at(*point) for point in thinned(points)))
        shapes.append(f'<polyline class="{style}" points="{corners}"/>')

    def dots(points: Points, style: str) -> None:  # a line without length has round ends
        moves = "".join(f"M{x:.2f},{y:.2f}h0" for x, y in (at(*point) for point in points))
        shapes.append(f'<path class="{style}" d="{moves}"/>')

    for loss in ticks(low, high):
        line([(0, loss), (right, loss)], "grid")
        labels.append(f'<span class="y" style="top:{at(0, loss)[1]:.2f}%">{loss:.6g}</span>')
    for x in ticks(0, right, smallest=1):
        labels.append(f'<span class="x" style="left:{at(x, 0)[0]:.2f}%">{x:,.0f}</span>')
    for name, loss in baselines:
        line([(0, loss), (right, loss)], "baseline")
        marks.append(Label(at(0, loss)[1], 100.0, "", f"{name} {loss:.2f}"))
    for name, color, train, val in runs:
        color, best = f"c{color % N_COLORS}", "not evaluated"
        other = color if len(runs) > 1 else "c1"  # a single run has a color for each split
        line(train, f"batch {color}")
        line(smoothed(train), f"smooth {color}")
        line(val, f"val {other}")
        dots(thinned(val), f"dots {other}")
        if val:
            x, loss = lowest(val)
            dots([(x, loss)], f"best {other}")
            marks.append(Label(at(x, loss)[1] - 2, at(x, loss)[0], other, f"best {loss:.4f}"))
            best = f"best {loss:.4f} at update {x:,}"
        text = f"{escape(name)}, {best}"
        if len(runs) == 1:
            legend.append(f'<span class="{color}">training loss of batches, and smoothed</span>')
            text = f"validation loss, {best}"
        legend.append(f'<span class="{other}">{text}</span>')
    for y, x, style, text in spread(marks):
        side = f"right:{100 - x:.2f}%" if x > 50 else f"left:{x:.2f}%"
        labels.append(f'<span class="text {style}" style="top:{y:.2f}%;{side}">{text}</span>')
    return (
        f'<div class="chart"><svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
        f'aria-label="losses by update">{"".join(shapes)}</svg>{"".join(labels)}</div>'
        f'<p class="axis">updates</p><p class="legend">{"".join(legend)}</p>'
    )


def smoothed(points: Points) -> Points:
    return list(zip([x for x, _ in points], smooth([y for _, y in points]), strict=True))


def thinned(points: Points) -> Points:
    """At most about CURVE_POINTS of a curve, with the last."""
    return points[: -1 : math.ceil(len(points) / CURVE_POINTS) or 1] + points[-1:]


def spread(labels: list[Label]) -> list[Label]:
    """The labels, moved up so that none covers another."""
    result, limit = [], 100.0
    for label in sorted(labels, reverse=True):
        limit = min(label.y, limit)
        result.append(label._replace(y=limit))
        limit -= LABEL_HEIGHT
    return result


def ticks(low: float, high: float, smallest: float = 0.0) -> list[float]:
    """At most seven multiples of 1, 2 or 5 times a power of 10, at least `smallest` apart."""
    power = 10.0 ** math.floor(math.log10((high - low) / 6))
    step = max(smallest, next(power * m for m in (1, 2, 5, 10) if (high - low) / (power * m) <= 6))
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
