"""How far a rank has come with collectives, by torch's own recorder of them.

A GPU's collectives are launched and not waited for: whoever hangs, all hosts end up waiting for
their device. What each rank has launched, and what its device has begun, tells them apart.
"""

import contextlib
import json
import threading
from pathlib import Path
from typing import NamedTuple

FILE = "collectives-rank-{:05d}.json"
PATIENCE_SECONDS = 5.0  # a recorder may itself wait for what hangs
RECORDERS = ("_dump_fr_trace_json", "_dump_nccl_trace_json")  # of gloo, of NCCL


class Progress(NamedTuple):
    """Of one group's collectives on this rank: how many were launched, began and ended."""

    launched: int
    begun: int
    ended: int


def recorded() -> dict[str, dict]:
    """What each recorder of this process knows; empty without process groups."""
    found: dict[str, dict] = {}

    def ask() -> None:
        import torch._C._distributed_c10d as c10d

        for name in RECORDERS:
            with contextlib.suppress(Exception):  # its format is torch's own affair
                found[name] = json.loads(getattr(c10d, name)())

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE_SECONDS)
    return dict(found)


def progress(dumps: dict[str, dict]) -> dict[str, Progress]:
    """By group; all ranks number their groups alike."""
    found = {}
    for name, dump in dumps.items():
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
            for group, status in dump["pg_status"].items():
                counts = (
                    int(status[f"last_{what}_collective"])
                    for what in ("enqueued", "started", "completed")
                )
                found[f"{name}/{group}"] = Progress(*counts)
    return found


def collective_seconds(after_ns: int) -> tuple[float, float, int]:
    """(seconds that a device spent in collectives launched after a moment, seconds from the first
    to the last of these, when that was launched, in ns since 1970). A rank that comes last waits
    for none; zeros where the recorder does not time, as of gloo."""
    dump = recorded().get("_dump_nccl_trace_json", {})
    seconds, launched = 0.0, []
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
        for entry in dump.get("entries", []):
            duration, at = entry.get("duration_ms"), int(entry["time_created_ns"])
            if at > after_ns and isinstance(duration, int | float):
                seconds += duration / 1000
                launched.append(at)
    if len(launched) < 2:
        return 0.0, 0.0, after_ns
    return seconds, (max(launched) - min(launched)) / 1e9, max(launched)


def leave_record(folder: Path, rank: int, dumps: dict[str, dict]) -> None:
    """The last collectives of a rank, for people."""
    with contextlib.suppress(OSError):
        (folder / FILE.format(rank)).write_text(json.dumps(dumps), encoding="utf-8")
