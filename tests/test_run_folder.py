"""One owner of a run folder at a time, on one host and between hosts."""

import json
import os
import socket
import subprocess
import sys
import threading

import pytest

from data_pipeline.errors import RunLocked
from t2v.attempt import run_folder
from t2v.attempt.run_folder import RECORD_BYTES, StatusFile, locked

HOLD = """
import sys
from pathlib import Path
from t2v.attempt.run_folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_second_owner_is_refused_until_the_first_is_gone_however_it_went(tmp_path):
    """R23: second later."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(RunLocked, match=f"process {process.pid} on") as failure:
            locked(tmp_path).__enter__()
        assert failure.value.exit_code == 73
        process.kill()
        process.wait()
    with locked(tmp_path):
        pass


def beat_elsewhere(path, beats: int) -> None:
    """What an owner on a host whose locks do not reach us leaves in the file."""
    record = {"host": "far-away", "pid": 7, "nonce": "x", "beat": beats}
    with path.open("r+b" if path.exists() else "wb") as file:
        file.write(json.dumps(record).encode().ljust(RECORD_BYTES))


def test_owner_on_another_host_is_left_alone_while_its_heart_beats(tmp_path):
    path = tmp_path / "run.lock"
    beat_elsewhere(path, 1)
    later = threading.Timer(0.5, beat_elsewhere, (path, 2))
    later.start()
    with pytest.raises(RunLocked, match="process 7 on far-away"), locked(tmp_path):
        pass
    later.join()


def test_owner_on_another_host_without_a_heartbeat_is_replaced(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_folder, "STALE_SECONDS", 0.5)
    beat_elsewhere(tmp_path / "run.lock", 1)
    with locked(tmp_path):
        mine = json.loads((tmp_path / "run.lock").read_text())
    assert (mine["host"], mine["pid"]) == (socket.gethostname(), os.getpid())
    assert "waiting up to" in capsys.readouterr().out
    # Whoever leaves in order leaves nothing to wait for.
    assert json.loads((tmp_path / "run.lock").read_text()) == {}


def test_status_is_whole_and_keeps_its_facts(tmp_path):
    status = StatusFile(tmp_path, total_steps=9)
    status.write("running", step=3)
    status.refresh(step=4, last_checkpoint=2)
    first = status.facts["last_checkpoint_at"]
    status.write("preempted", last_checkpoint=2, exit_code=75)
    found = json.loads((tmp_path / "status.json").read_text())
    assert (found["state"], found["step"], found["total_steps"]) == ("preempted", 4, 9)
    assert (found["exit_code"], found["reason"]) == (75, None)
    assert found["last_checkpoint_at"] == first
    assert {"host", "pid", "updated"} <= set(found)
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
