"""A sign of life on the node's own disk, for probes that must not wait for anything else."""

import json
import os
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError

BEAT_SECONDS = 5.0


class NoHeartbeat(UserError):
    """The wrapper of this node is gone, or cannot reach the run folder."""

    exit_code = 71


def heartbeat_file() -> Path:
    """`T2V_HEARTBEAT`, or a file among the temporary ones."""
    return Path(os.environ.get("T2V_HEARTBEAT") or Path(tempfile.gettempdir(), "t2v-heartbeat"))


def beat(path: Path, **facts: Any) -> None:
    """Leave a sign of life; a reader sees the old one or the new."""
    # Never a file that is there: among temporary ones others may have laid a link of that name.
    staging = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with staging.open("x", encoding="utf-8") as file:
        file.write(json.dumps({"at": time.time(), "pid": os.getpid(), **facts}))
    staging.replace(path)


def check_health(path: Path, *, max_age_seconds: float, startup: bool = False) -> dict[str, Any]:
    """The last sign of life; NoHeartbeat where it is too old, or, at startup, ranks do not run."""
    try:
        facts = json.loads(path.read_text())
        age = max(time.time() - facts["at"], 0.0)
    except (OSError, ValueError, KeyError, TypeError):
        raise NoHeartbeat(f"{path}: no heartbeat; `t2v node` has not begun here.") from None
    if not age <= max_age_seconds:
        raise NoHeartbeat(
            f"{path}: heartbeat is {age:.0f} s old, more than {max_age_seconds:.0f} s; the wrapper "
            "is gone or cannot reach the run folder; restart the whole job, not this node alone."
        )
    if startup and facts.get("state") not in ("running", "done", "preempted"):
        raise NoHeartbeat(f"{path}: training has not begun; it is {facts.get('state')}.")
    return {"age_seconds": age, **facts}
