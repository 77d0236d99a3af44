"""The alarm of an attempt: one rank ends, and the others must know why before they take it for
their own failure. Nothing here imports more than it must: whoever rings is in a hurry.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from t2v.attempt.run_folder import timestamp

ALARM = "alarm.json"
RECORD = "failure-rank-{:05d}.json"  # what a rank leaves that failed by itself


def ring(folder: Path, *, rank: int, is_hang: bool, exit_code: int, reason: str = "") -> str:
    """Wake the other ranks; the first to ring is heard. Returns when, for later records to be
    later whatever their host's clock says."""
    with contextlib.suppress(OSError):
        # A run folder that is gone was taken back: its start was refused.
        folder.parent.mkdir(exist_ok=True)
        folder.mkdir(exist_ok=True)
        alarm = {"rank": rank, "is_hang": is_hang, "exit_code": exit_code, "at": timestamp()}
        alarm |= {"reason": reason}
        staging = folder / f".{ALARM}.{rank}"
        staging.write_text(json.dumps(alarm), encoding="utf-8")
        with contextlib.suppress(FileExistsError):
            os.link(staging, folder / ALARM)  # whole, or not there; never replaced
        staging.unlink()
    found = heard_alarm(folder)
    return max(timestamp(), found["at"]) if found and found["rank"] != rank else timestamp()


def heard_alarm(folder: Path) -> dict[str, Any] | None:
    """The alarm that another rank has rung."""
    try:
        return json.loads((folder / ALARM).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
