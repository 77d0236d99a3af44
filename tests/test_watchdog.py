"""Hangs end at their deadline, and the rank that hangs is told from those that wait for it."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from t2v.attempt.alarm import ring
from t2v.attempt.culprit import Position, culprit
from t2v.attempt.failure import Failure, advice, failure_page, first_failure, record_failure


def at(rank: int, entered: int, *, waits: bool = False, seconds: float = 9.0) -> Position:
    return Position(
        rank=rank, host="host", section="step", step=4, entered=entered, seconds=seconds,
        waits=waits, memory_gib=1.0, samples=(), stack="",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ([at(0, 9, waits=True), at(1, 8)], 1),
        ([at(0, 9), at(1, 8, waits=True)], 1),
        ([at(0, 9, waits=True), at(1, 9), at(2, 9, waits=True)], 1),
        ([at(0, 9, seconds=8.0), at(1, 9, seconds=9.0)], 1),
        ([at(0, 8), at(2, 9, waits=True)], 1),
    ],
    ids=["behind", "behind though it waits", "waits", "longest", "silent"],
)
def test_culprit_is_behind_or_silent(positions, expected):
    """R11."""
    world_size = 1 + max(position.rank for position in positions)
    assert culprit(positions, world_size) == expected
    assert culprit(reversed(positions), world_size) == expected


HANG = """
import sys, time
from pathlib import Path
from t2v.attempt.watchdog import Watchdog, WatchdogConfig

def stuck():
    time.sleep(60)

config = WatchdogConfig(setup_seconds=0.5, data_seconds=0.5, step_seconds=60.0)
with Watchdog(config) as watchdog:
    if len(sys.argv) > 1:
        watchdog.serve(Path(sys.argv[1]), rank=0, world_size=1, on_end=lambda f, code: print(code))
    watchdog.enter("data", 4, samples=["0/1/2"])
    stuck()
"""


def test_hang_names_section_and_stack_and_exits_71(tmp_path):
    started = time.monotonic()
    command = [sys.executable, "-c", HANG, str(tmp_path / "logs")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert time.monotonic() - started < 30
    assert (done.returncode, done.stdout) == (71, "71\n")
    assert "hangs in section 'data' of step 5" in done.stderr
    assert "in stuck" in done.stderr
    failure = first_failure(tmp_path / "logs")
    assert failure is not None
    assert (failure.rank, failure.exit_code, failure.section, failure.step) == (0, 71, "data", 4)
    assert failure.samples == ("0/1/2",)
    assert "in stuck" in failure.stack


def a_failure(rank: int, when: str, **fields) -> Failure:
    known = {"exit_code": 70, "reason": "no numbers", "section": "step", "step": 3, "stack": ""}
    return Failure.model_validate({"rank": rank, "host": "h", "at": when, **known, **fields})


def test_first_failure_is_the_earliest_and_damaged_records_are_none(tmp_path):
    assert first_failure(tmp_path) is None
    record_failure(tmp_path, a_failure(0, "2026-01-01T00:00:02.000+00:00"))
    record_failure(tmp_path, a_failure(1, "2026-01-01T00:00:01.000+00:00"))
    (tmp_path / "failure-rank-00002.json").write_text("{")
    failure = first_failure(tmp_path)
    assert failure is not None
    assert failure.rank == 1


def test_whoever_rings_later_fails_later_whatever_its_clock_says(tmp_path):
    first = {"rank": 1, "is_hang": False, "exit_code": 65, "at": "2999-01-01T00:00:00.000+00:00"}
    (tmp_path / "alarm.json").write_text(json.dumps(first))
    assert ring(tmp_path, rank=0, is_hang=False, exit_code=1) == first["at"]
    assert json.loads((tmp_path / "alarm.json").read_text()) == first
    assert [path.name for path in tmp_path.iterdir()] == ["alarm.json"]


def test_page_says_who_where_why_and_what_may_help():
    failure = a_failure(
        3, "2026-01-01T00:00:00.000+00:00", exit_code=71, reason="rank 3 hangs", section="data",
        samples=("0/000001/2",), stack="File x, line 1\n",
    )  # fmt: skip
    page = failure_page(failure, run_dir=Path("runs/a"), logs=Path("runs/a/logs"), attempt=2)
    for text in ("rank 3 hangs", "| 3 on h |", "71", "watchdog.data_seconds", "`0/000001/2`"):
        assert text in page
    memory = a_failure(0, "", exit_code=1, reason="OutOfMemoryError: CUDA out of memory")
    assert "micro_batch_size" in advice(memory)
