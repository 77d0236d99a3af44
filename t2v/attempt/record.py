"""The run record, attempts.jsonl: a line where an attempt begins, and one where it ends.

A line that is missing tells too: whoever began and did not end was killed.
"""

import json
import os
from pathlib import Path
from typing import Any

from data_pipeline.errors import INTERRUPTED, ConfigError, RunLocked
from t2v.attempt.files import read_records
from t2v.attempt.run_folder import State, timestamp

FILE = "attempts.jsonl"
FAILURES_IN_A_ROW = 3
LOCKED, PREEMPTED = 73, 75
# Before the second and the third start, and for a scheduler that waits two minutes by itself.
PAUSES_SECONDS = (30.0, 120.0, 480.0)
KILLED = "ended without a word: killed, or its host went down"

Lines = list[dict[str, Any]]


def read_attempts(run_dir: Path) -> Lines:
    """The lines of a run record; those that a killed process left half are passed over."""
    return [
        line
        for line in read_records(run_dir / FILE)
        if isinstance(line.get("attempt"), int) and line.get("event") in ("start", "end", "clear")
    ]


def append_attempt(run_dir: Path, line: dict[str, Any]) -> None:
    """Add a line, durably; half a line before it stays alone."""
    path = run_dir / FILE
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(file).st_size
        torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
        os.write(file, b"\n" * torn + json.dumps(line).encode() + b"\n")
        os.fsync(file)
    finally:
        os.close(file)


def next_number(lines: Lines) -> int:
    """The number of the attempt that begins now, from 1."""
    return max((line["attempt"] for line in lines), default=0) + 1


def unfinished(lines: Lines) -> Lines:
    """Starts without an end; once the run folder is ours, these were killed."""
    ended = {line["attempt"] for line in lines if line["event"] == "end"}
    return [line for line in lines if line["event"] == "start" and line["attempt"] not in ended]


def end_line(
    number: int,
    state: State,
    exit_code: int | None,
    reason: str | None,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """How an attempt ended, after what its status or its start knows."""
    return {
        "attempt": number,
        "event": "end",
        "at": timestamp(),
        "state": state,
        "exit_code": exit_code,
        "reason": reason,
        "step": facts.get("step") or 0,
        "last_checkpoint": facts.get("last_checkpoint"),
    }


def killed_line(start: dict[str, Any]) -> dict[str, Any]:
    """The end that a killed attempt could not write."""
    return end_line(start["attempt"], "failed", None, KILLED, start)


def failed_start_line(number: int, exit_code: int, reason: str) -> dict[str, Any]:
    """The end of an attempt that never owned the run folder, and so has no start."""
    state: State = "preempted" if exit_code == PREEMPTED else "failed"
    return end_line(number, state, exit_code, reason, {}) | {"job_id": job_id()}


def failed_starts(lines: Lines) -> Lines:
    """The newest attempts in a row of one job that failed alike before they owned the folder."""
    started = {line["attempt"] for line in lines if line["event"] == "start"}
    found: Lines = []
    for line in reversed(lines):
        is_start = line["event"] == "end" and line["attempt"] not in started
        code = line.get("exit_code")
        if not is_start or line.get("state") != "failed" or code in (LOCKED, INTERRUPTED):
            break
        if found and any(line.get(n) != found[0].get(n) for n in ("job_id", "exit_code")):
            break
        found.insert(0, line)
    return found


def pause_seconds(failures: int) -> float:
    """How long to wait before the start after so many failures in a row."""
    return PAUSES_SECONDS[min(failures, len(PAUSES_SECONDS)) - 1] if failures else 0.0


def count_anew(run_dir: Path) -> None:
    """Failures so far count no more."""
    number = next_number(read_attempts(run_dir))
    append_attempt(run_dir, {"attempt": number, "event": "clear", "at": timestamp()})


def job_id() -> str | None:
    """The scheduler's name for this job."""
    for name in ("SLURM_JOB_ID", "JOB_NAME", "TORCHELASTIC_RUN_ID"):
        if os.environ.get(name):
            return os.environ[name]
    return None


def failures_in_a_row(lines: Lines, *, fingerprint: str, progress: int) -> Lines:
    """Ends of the last attempts at this recipe that failed after the newest checkpoint, which
    attempt `progress` committed, and after the last time that counting began anew.

    A preempted attempt neither failed nor went on; a changed recipe is another try.
    """
    recipes = {
        line["attempt"]: line.get("config_fingerprint")
        for line in lines
        if line["event"] == "start"
    }
    failed: Lines = []
    for line in lines:
        if line["event"] == "clear" or line.get("state") == "done":
            failed = []
        elif line["event"] == "end" and line.get("state") == "failed":
            failed.append(line)
    return [
        line
        for line in failed
        if line["attempt"] > progress
        and line.get("exit_code") != INTERRUPTED
        and recipes.get(line["attempt"]) == fingerprint
    ]


def refuse_restart_storm(run_dir: Path, failed: Lines) -> None:
    """ConfigError after too many failures without a newer checkpoint."""
    if len(failed) < FAILURES_IN_A_ROW:
        return
    last = failed[-1]
    reason = str(last.get("reason") or "unknown").splitlines()[0]
    raise ConfigError(
        f"{run_dir}: is not started again because its last {len(failed)} attempts failed without "
        f"a newer checkpoint, the last one at step {last.get('step')}: {reason}\n"
        f"  {run_dir / 'failure.md'} tells more; correct the cause, then start once with "
        "--clear-failures."
    )


def refuse_if_overtaken(run_dir: Path, number: int, nonce: str) -> None:
    """RunLocked where another attempt has begun since ours: only the newest may commit."""
    starts = [line for line in read_attempts(run_dir) if line["event"] == "start"]
    newest = starts[-1] if starts else {}
    if newest.get("nonce") == nonce:
        return
    who = f"attempt {newest.get('attempt')} on {newest.get('host')} (process {newest.get('pid')})"
    raise RunLocked(
        f"{run_dir}: attempt {number} may not commit because {who if newest else 'another'} has "
        "taken the run over; let that one go on."
    )
