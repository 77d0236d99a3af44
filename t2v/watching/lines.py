"""A line of metrics.jsonl as whoever follows the file reads it; nothing here imports torch."""

import json
from typing import Any

from t2v.attempt.files import is_number


def parse_line(line: bytes) -> dict | None:
    """A line of metrics.jsonl; None where it is damaged."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    whole = line.endswith(b"\n") and isinstance(values, dict)
    step = values.get("step") if whole else None
    return values if isinstance(step, int) and is_number(step) else None


def numbers(values: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line by name; those of a list get its name and their place."""
    flat: dict[str, float] = {}
    for key, value in values.items():
        entries = value if isinstance(value, list) else [value]
        for place, entry in enumerate(entries):
            if isinstance(entry, int | float) and not isinstance(entry, bool):
                flat[f"{key}_{place}" if isinstance(value, list) else key] = entry
    return flat
