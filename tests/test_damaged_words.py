"""Whatever the files of a run folder say, its status is told and its next start reads on."""

import contextlib
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest

from cluster.status import run_status
from cluster.status_view import print_statuses, to_json
from data_pipeline.errors import ConfigError
from data_pipeline.terminal import Terminal
from t2v.attempt.record import (
    failed_starts,
    failures_in_a_row,
    killed_line,
    read_attempts,
    refuse_restart_storm,
    unfinished,
)
from t2v.watching.metrics import drop_after

VALUES: list[Any] = [
    *(None, True, 0, 1, -1, 3, 1.5, 10**400, 2**63, 1e308, -1e308, 1e-300, "", "x", "[/"),
    *("\x1b[31m", [], {}, [1], {"a": 1}, "2026-01-01T00:00:00+00:00", "0001-01-01T00:00:00+23:59"),
]
STATES = ["starting", "running", "done", "failed", "preempted"]
STATUS = (
    *("exit_code", "reason", "step", "total_steps", "samples_per_second", "updated", "host"),
    *("save_seconds", "last_checkpoint", "gpu_events", "job_id", "attempt"),
)
LINE = ("step", "samples_per_second", "step_seconds", "goodput", "productive_seconds", "loss")
ATTEMPT = ("state", "exit_code", "reason", "job_id", "config_fingerprint", "step", "at")
NODE = ("node", "host", "started", "ended", "exit_code", "reason", "name", "gpu_events")


def hostile(dice: random.Random, *names: str, **known: Any) -> bytes:
    """A mapping of any values, at times cut short or with zeros of a disk that was cut off."""
    content = {name: dice.choice(VALUES) for name in names if dice.random() < 0.7} | known
    text = json.dumps(content).encode()
    if dice.random() < 0.1:
        text = text[: dice.randrange(len(text))]
    return text.replace(b'"', b"\0") if dice.random() < 0.05 else text


def fill(run: Path, dice: random.Random) -> None:
    straggler = {name: dice.choice(VALUES) for name in ("rank", "host", "share", "steps")}
    status = hostile(dice, *STATUS, state=dice.choice(STATES), straggler=straggler)
    ends = [b"\n", b"\n", b"\0\0\n", b"\r\n", b""]
    lines = [hostile(dice, *LINE) + dice.choice(ends) for _ in range(dice.randrange(5))]
    events = ["start", "end", "clear", "straggler"]
    attempts = [
        hostile(dice, *ATTEMPT, attempt=dice.choice([1, 2, True, -1]), event=dice.choice(events))
        for _ in range(dice.randrange(6))
    ]
    (run / "status.json").write_bytes(status)
    (run / "metrics.jsonl").write_bytes(b"".join(lines))
    (run / "attempts.jsonl").write_bytes(b"\n".join(attempts))
    (run / "logs" / "attempt-0001" / "node-00000.json").write_bytes(hostile(dice, *NODE))


@pytest.mark.parametrize("seed", range(4))
def test_any_word_is_read_or_left_out(tmp_path, seed):
    dice = random.Random(seed)
    (tmp_path / "logs" / "attempt-0001").mkdir(parents=True)
    for _ in range(50):
        fill(tmp_path, dice)
        status = run_status(tmp_path)
        for shown in ([status], [status, status]):
            print_statuses(shown, Terminal(file=io.StringIO(), width=120))
        assert json.loads(to_json(status))["run_dir"] == str(tmp_path)
        lines = read_attempts(tmp_path)
        told = [*lines, *map(killed_line, unfinished(lines))]
        with contextlib.suppress(ConfigError):
            refuse_restart_storm(tmp_path, failures_in_a_row(told, fingerprint="x", progress=0))
        failed_starts(told)
        seconds, last = drop_after(tmp_path / "metrics.jsonl", 5)
        assert seconds >= 0
        assert 0 <= last <= 5
