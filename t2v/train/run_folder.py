"""The run folder: one owner at a time, and a status anyone may read."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from data_pipeline.errors import RunLocked

State = Literal["starting", "running", "done", "preempted", "failed"]
REFRESH_SECONDS = 1.0


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Own the run folder; RunLocked names the process that does.

    The kernel drops the lock with the process, however it ends; a record lock is not inherited by
    the loader's workers, which may outlive it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "run.lock"
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RunLocked(
                f"{run_dir}: is in use by {file.read().strip() or 'another process'}; wait for it, "
                "stop it, or choose another run_dir."
            ) from None
        file.truncate(0)
        file.write(json.dumps(whoami()))
        file.flush()
        yield


class StatusFile:
    """status.json: the run's state, its facts (step, total_steps, ...), who wrote it and when."""

    def __init__(self, run_dir: Path, **facts: Any) -> None:
        self.path = run_dir / "status.json"
        self.state: State = "starting"
        self.facts = facts
        self.written = 0.0

    def write(self, state: State, **facts: Any) -> None:
        """Replace the file; a reader sees the old one or the new."""
        self.state, self.written = state, time.monotonic()
        self.facts |= facts
        now = datetime.now(UTC).isoformat(timespec="seconds")
        status = {"state": state, **self.facts, **whoami(), "updated": now}
        staging = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        staging.write_text(json.dumps(status) + "\n", encoding="utf-8")
        staging.replace(self.path)

    def refresh(self, **facts: Any) -> None:
        """Note facts; write them if the file is older than a second."""
        self.facts |= facts
        if time.monotonic() - self.written >= REFRESH_SECONDS:
            self.write(self.state)


def whoami() -> dict[str, Any]:
    """This process, for others to find."""
    return {"host": socket.gethostname(), "pid": os.getpid()}
