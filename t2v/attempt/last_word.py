"""The last word on an attempt: rank 0's own, or another's in the name of a rank 0 that was killed.

Nothing here imports torch.
"""

import json
from pathlib import Path

from data_pipeline.store import storage
from t2v.attempt.failure import Failure, failure_page
from t2v.attempt.record import append_attempt, end_line, read_attempts
from t2v.attempt.run_folder import timestamp


def write_page(failure: Failure, run_dir: Path, logs: Path, attempt: int) -> None:
    """failure.md: what failed first, for people."""
    page = failure_page(failure, run_dir=run_dir, logs=logs, attempt=attempt)
    storage.write_atomic(run_dir / "failure.md", page.encode())


def end_for_the_dead(logs: Path, failure: Failure) -> None:
    """Say how the attempt of a log folder ended, where its rank 0 owned the run and died."""
    run_dir, number = logs.parent.parent, int(logs.name.rpartition("-")[2])
    lines = read_attempts(run_dir)
    newest = lines[-1] if lines else {}
    if (newest.get("attempt"), newest.get("event")) != (number, "start"):
        return  # it never owned the run, has told its end, or was overtaken
    path = run_dir / "status.json"
    status = json.loads(path.read_bytes())
    reason = failure.reason
    append_attempt(run_dir, end_line(number, "failed", failure.exit_code, reason, status))
    told = {"state": "failed", "exit_code": failure.exit_code, "reason": reason}
    storage.write_atomic(path, json.dumps(status | told | {"updated": timestamp()}).encode())
    write_page(failure, run_dir, logs, number)
