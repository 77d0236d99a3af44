"""Charts: ticks enclose what is drawn, thinning keeps means and ends, text stays text."""

import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest

from t2v.watching.charts import (
    Series,
    line_chart,
    log_ticks,
    shade,
    short,
    smoothed,
    thinned,
    ticks,
)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.3, 0.31), (-5, 2), (7, 7), (0, 0), (1e-9, 3e-9), (0, 512345)]
)
def test_ticks_enclose_the_range_with_few_round_numbers(low, high):
    places = ticks(low, high)
    assert places[0] <= low + 1e-12
    assert places[-1] >= high - 1e-12
    assert 2 <= len(places) <= 8
    gaps = {round(b - a, 12) for a, b in pairwise(places)}
    assert len(gaps) == 1


@pytest.mark.parametrize(("low", "high"), [(0.2, 4.0), (1e-6, 1e3), (0.9, 8.1)])
def test_log_ticks_lie_within_the_range(low, high):
    places = log_ticks(low, high)
    assert len(places) >= 2
    assert all(low <= place <= high for place in places)


def test_thinning_keeps_the_mean_and_the_last_step():
    points = [(step, float(step % 7)) for step in range(1, 4001)]
    few = thinned(points, 400)
    assert len(few) == 400
    assert few[-1][0] == 4000
    mean = sum(value for _, value in points) / len(points)
    assert sum(value or 0 for _, value in few) / len(few) == pytest.approx(mean)
    assert thinned(points[:400], 400) == points[:400]
    assert thinned([(1, None), (2, 3.0), (3, None), (4, None)], 2) == [(2, 3.0), (4, None)]


def test_smoothing_leaves_lines_as_they_are_and_gaps_open():
    line = [(step, 2.0 * step) for step in range(10)]
    assert smoothed(line, 2)[2:-2] == line[2:-2]
    assert smoothed([(0, 1.0), (1, None), (2, 3.0)], 1)[1] == (1, None)


@pytest.mark.parametrize(
    "points",
    [
        [(1, 2.0)],
        [(1, 0.0), (2, 0.0)],
        [(1, None), (2, 1.0), (3, None)],
        [(step, 10.0**-step) for step in range(1, 60)],
        [(1, -3.0), (2, 1e9)],
    ],
)
@pytest.mark.parametrize("from_zero", [False, True])
def test_any_values_make_a_picture_inside_its_frame(points, from_zero):
    figure = line_chart("a < b & c", [Series("<x>", points, "#000")], from_zero=from_zero)
    tree = ElementTree.fromstring(figure)
    title = tree.find("figcaption")
    assert title is not None
    assert title.text == "a < b & c"
    paths = tree.findall(".//path")
    assert paths
    for path in paths:
        text = path.attrib["d"].replace("M", " ").replace("L", " ").replace("h", " 0 ")
        numbers = [float(number) for number in text.split()]
        assert all(-1 <= number <= 641 for number in numbers)


def test_nothing_to_draw_is_said():
    assert "no values yet" in line_chart("x", [Series("y", [(1, None)], "#000")])


def test_numbers_are_short_and_colours_are_colours():
    assert [short(value) for value in (0, 0.5, 12345, 3e7, 1.5e-5)] == [
        "0", "0.5", "12.35k", "30M", "1.5e-05",
    ]  # fmt: skip
    assert {len(shade(n / 10)) for n in range(11)} == {7}
    assert shade(0) != shade(0.5) != shade(1)
