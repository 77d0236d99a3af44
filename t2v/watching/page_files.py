"""What a run's files tell its report; whatever is missing or damaged is passed over."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from t2v.watching.metrics import read_lines

MOST_LINES = 4000


def read_metrics(path: Path) -> tuple[list[dict], list[dict], int]:
    """(lines of steps, held-out lines, skipped steps) of a run, in bounded memory: means of
    neighbouring lines where there are very many."""
    held_out: list[dict] = []
    skipped = 0

    def of_steps() -> Iterable[dict]:
        nonlocal skipped
        for line in read_lines(path):
            if "held_out_loss" in line:
                held_out.append(line)
            elif "loss" in line:
                skipped += "skipped_samples" in line
                yield line

    steps = condensed(of_steps(), MOST_LINES)
    return steps, held_out, skipped


def condensed(lines: Iterable[dict], most: int) -> list[dict]:
    """At most `most` lines and one, each the mean of as many neighbours; fewer stay as they are."""
    kept: list[dict] = []
    group: list[dict] = []
    size = 1
    for line in lines:
        group.append(line)
        if len(group) < size:
            continue
        kept.append(merged(group))
        group = []
        if len(kept) == most:
            kept = [merged(kept[n : n + 2]) for n in range(0, most, 2)]
            size *= 2
    return [*kept, merged(group)] if group else kept


def merged(lines: list[dict]) -> dict:
    """One line for several: the last step, and means of what is finite."""
    if len(lines) == 1:
        return lines[0]
    keys = dict.fromkeys(key for line in lines for key in line)
    return {key: mean(lines, key) for key in keys} | {"step": lines[-1]["step"]}


def points(lines: list[dict], key: str) -> list[tuple[float, float | None]]:
    """(step, value) of the lines that have a key."""
    return [(line["step"], number(line, key)) for line in lines if key in line]


def number(mapping: dict, key: str) -> float | None:
    """A finite number, or None."""
    value = mapping.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # Not math.isfinite: an integer may be too large for a float.
    return value if is_number and abs(value) <= sys.float_info.max else None


def entry(values: Any, place: int) -> float | None:
    """One number of a list, if there is such a list."""
    if not isinstance(values, list) or place >= len(values):
        return None
    return number({"value": values[place]}, "value")


def mean(lines: list[dict], key: str) -> float | None:
    """Mean of a key's finite values."""
    values = [value for line in lines if (value := number(line, key)) is not None]
    return sum(values) / len(values) if values else None


def spread(steps: list[int], most: int) -> list[int]:
    """At most so many of the steps, evenly, first and last among them."""
    if len(steps) <= most:
        return steps
    return [steps[round(n * (len(steps) - 1) / (most - 1))] for n in range(most)]


def read_list(path: Path) -> list[dict]:
    """The objects of a JSON list; empty where it cannot be read."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return []
    records = content if isinstance(content, list) else []
    return [record for record in records if isinstance(record, dict)]
