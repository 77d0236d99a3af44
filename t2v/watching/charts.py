"""Line charts as inline SVG: pure functions from numbers to text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise

Point = tuple[float, float | None]  # a step and its value, if that is finite

WIDTH, HEIGHT = 640, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 26
MOST_POINTS = 400
# Apart for colour-blind eyes, dark enough on white, and in print (after Okabe and Ito).
COLOURS = ("#0b5fa5", "#c2571a", "#00795a", "#a3367f", "#7a6400", "#4a4a4a", "#8f1d2c", "#3b3b98")
RAMP = ((29, 63, 143), (31, 143, 134), (217, 139, 31))


@dataclass(frozen=True)
class Series:
    """A named line."""

    name: str
    points: Sequence[Point]
    colour: str
    noisy: bool = False  # a smooth line stands before the pale values


def line_chart(
    title: str, series: Sequence[Series], *, marks: Sequence[float] = (), from_zero: bool = False
) -> str:
    """A figure of lines over steps, with a legend of last values; `marks` are vertical lines."""
    drawn = [replace(s, points=thinned(s.points, MOST_POINTS)) for s in series]
    values = [value for line in drawn for _, value in line.points if value is not None]
    heading = f"<figcaption>{escape(title)}</figcaption>"
    if not values:
        return f'<figure>{heading}<p class="none">no values yet</p></figure>'
    steps = [step for line in drawn for step, _ in line.points]
    x_low, x_high = min(steps), max(max(steps), min(steps) + 1)
    is_log = not from_zero and min(values) > 0 and max(values) / min(values) > 8
    y_ticks = log_ticks(min(values), max(values)) if is_log else ticks(
        min(0.0, *values) if from_zero else min(values), max(values)
    )  # fmt: skip
    low, high = min(y_ticks[0], *values), max(y_ticks[-1], *values)

    def x(step: float) -> float:
        return LEFT + (step - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        if is_log:
            share = math.log(value / low) / math.log(high / low)
        else:
            share = (value - low) / (high - low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y(t) + 4:.1f}" text-anchor="end">{short(t)}</text>'
        for t in y_ticks
    ]
    parts += [
        f'<text x="{x(t):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{short(t)}</text>'
        for t in ticks(x_low, x_high)
        if x_low <= t <= x_high
    ]
    parts += [
        f'<line class="mark" x1="{x(m):.1f}" x2="{x(m):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        for m in marks
        if x_low <= m <= x_high
    ]
    for line in drawn:
        for kind, shown in layers(line):
            path = _path([(x(s), None if v is None else y(v)) for s, v in shown])
            name = f"<title>{escape(line.name)}</title>"
            parts.append(f'<path class="{kind}" d="{path}" stroke="{line.colour}">{name}</path>')
    scale = ", logarithmic" if is_log else ""
    return (
        f"<figure>{heading}{legend(drawn)}"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)} over steps{scale}">{"".join(parts)}</svg></figure>'
    )


def layers(line: Series) -> list[tuple[str, Sequence[Point]]]:
    """What is drawn of a line, each with its kind: pale values, then the line one reads."""
    if not line.noisy or len(line.points) < 20:
        return [("line", line.points)]
    return [("pale", line.points), ("line", smoothed(line.points, len(line.points) // 40))]


def legend(series: Sequence[Series]) -> str:
    """Names, colours and last values."""
    entries = []
    for line in series:
        last = next((value for _, value in reversed(line.points) if value is not None), None)
        value = "" if last is None else f" <b>{short(last)}</b>"
        entries.append(
            f'<li><i style="background:{line.colour}"></i>{escape(line.name)}{value}</li>'
        )
    return f'<ul class="legend">{"".join(entries)}</ul>'


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most so many points, each the mean of neighbours; what is not finite stays a gap only
    where all of them are."""
    if len(points) <= most:
        return list(points)
    bounds = [len(points) * n // most for n in range(most + 1)]
    means: list[Point] = []
    for low, high in pairwise(bounds):
        some = points[low:high]
        values = [value for _, value in some if value is not None]
        mean = sum(values) / len(values) if values else None
        means.append((some[-1][0], mean))
    return means


def smoothed(points: Sequence[Point], reach: int) -> list[Point]:
    """Each value the mean of those at most `reach` places away."""
    result: list[Point] = []
    for place, (step, value) in enumerate(points):
        near = points[max(place - reach, 0) : place + reach + 1]
        values = [other for _, other in near if other is not None]
        result.append((step, None if value is None else sum(values) / len(values)))
    return result


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about `count` of them."""
    span = high - low or abs(high) or 1.0
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return [number * step for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten around a range; powers alone where it is wide."""
    factors = (1, 2, 5) if high / low < 1000 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    candidates = [factor * 10.0**power for power in powers for factor in factors]
    inside = [t for t in candidates if low <= t <= high]
    return inside if len(inside) > 1 else [low, high]


def short(value: float) -> str:
    """A number in few characters."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    return f"{value:.4g}" if size >= 1e-3 or size == 0 else f"{value:.1e}"


def shade(share: float) -> str:
    """A colour from cool (0) to warm (1)."""
    place, part = divmod(min(share, 1 - 1e-9) * (len(RAMP) - 1), 1)
    low, high = RAMP[int(place)], RAMP[int(place) + 1]
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(low, high, strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}"


def _path(points: Sequence[tuple[float, float | None]]) -> str:
    """SVG path commands; a line begins anew after a gap."""
    commands, pen_down = [], False
    for x, y in points:
        if y is None:
            pen_down = False
            continue
        commands.append(f"{'L' if pen_down else 'M'}{x:.1f} {y:.1f}")
        pen_down = True
    if len(commands) == 1:
        commands.append("h0.1")  # a lone point still shows
    return "".join(commands)
