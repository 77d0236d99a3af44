"""Files of a run folder as whoever finds them reads them: they may be missing, half written, or
damaged, and others replace them meanwhile. Nothing here imports torch."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any, TypeGuard, cast

MOST = 1e15


def read_mapping(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds; empty where there is none."""
    return next(iter(_objects([_bytes(path)])), {})


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; damaged lines are passed over."""
    return _objects(_bytes(path).splitlines())


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value can be a count, a time or a rate of a run: whatever is computed from such is
    finite."""
    return type(value) in (int, float) and 0 <= cast(float, value) <= MOST


def seconds_of(moment: object) -> float | None:
    """An ISO time as seconds since 1970; None for what is none."""
    if not isinstance(moment, str):
        return None
    try:
        return datetime.fromisoformat(moment).timestamp()
    except (ValueError, OverflowError):
        return None


def _bytes(path: Path) -> bytes:
    """What a file holds; nothing where there is none. A disk that does not answer, or no right to
    read, is an error: neither means that a run has not begun, or has another owner."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return b""


def _objects(texts: list[bytes]) -> list[dict[str, Any]]:
    found = []
    for text in texts:
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict):
            found.append(content)
    return found
