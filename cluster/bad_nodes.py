"""Nodes that a run avoids: a name per line, and until when; one without a time is an operator's.

A node that is mended is tried again after a while, so that names need not be removed by hand.
"""

import os
import re
import socket
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cluster.names import DIRECTIVE_VALUE
from data_pipeline.errors import ConfigError

FILE = "bad_nodes"
# What is broken waits for a repair; what is slow may have been so for a neighbour's sake.
BROKEN_DAYS, SLOW_DAYS = 7.0, 1.0


def node_name() -> str:
    """What the scheduler calls this node."""
    told = os.environ.get("SLURMD_NODENAME") or os.environ.get("T2V_NODE")
    return told or socket.gethostname()


def note_bad_nodes(names: Iterable[str], *, days: float = BROKEN_DAYS) -> None:
    """Add nodes to the file that `T2V_BAD_NODES` names, if it names one."""
    path = os.environ.get("T2V_BAD_NODES")
    end = (datetime.now(UTC) + timedelta(days=days)).isoformat(timespec="seconds")
    lines = [f"{name} {end}\n" for name in names if name.strip()]
    if path and lines:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write("".join(lines))


def read_bad_nodes(path: Path) -> tuple[str, ...]:
    """Those whose time is not over, sorted; ConfigError names a line that is damaged."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found, now = set(), datetime.now(UTC)
    for line in filter(str.strip, text.splitlines()):
        name, *until = line.split()
        ends = [end for word in until if (end := _time(word)) is not None]
        if not re.fullmatch(DIRECTIVE_VALUE, name) or len(until) > 1 or len(ends) < len(until):
            raise ConfigError(f"{path}: {line!r} is no node's name; write one name per line.")
        if not until or ends[0] > now:
            found.add(name)
    return tuple(sorted(found))


def _time(word: str) -> datetime | None:
    try:
        return datetime.fromisoformat(word).astimezone(UTC)
    except ValueError:
        return None
