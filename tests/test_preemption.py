"""Requests to stop: a signal or a flag file, from the first line of the program on."""

import errno
import os
import signal
import subprocess
import sys
import time
from functools import partial
from typing import Any

import pytest

from t2v.attempt import preemption

ARM_AND_WAIT = """
import ctypes, sys, time
from pathlib import Path
from t2v.attempt import preemption
preemption.arm()
folder, where = Path(sys.argv[1]), sys.argv[2]
with preemption.leaving(folder, (folder / "left").touch):
    if where == "training":
        preemption.wait_for_save()
    print("armed", flush=True)
    if where == "deep":
        ctypes.CDLL(None).sleep(60), ctypes.CDLL(None).sleep(60)
    time.sleep(60)
"""


@pytest.fixture
def armed():
    preemption.arm()
    yield
    preemption.disarm()


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_a_signal_is_a_request(armed, tmp_path, number):
    assert not preemption.requested(tmp_path)
    os.kill(os.getpid(), number)
    assert preemption.requested(tmp_path)


def test_a_flag_file_is_a_request_until_it_is_acknowledged(tmp_path):
    (tmp_path / "PREEMPT").touch()
    assert preemption.requested(tmp_path)
    preemption.acknowledge(tmp_path)
    preemption.acknowledge(tmp_path)
    assert not preemption.requested(tmp_path)


def test_arming_does_not_import_torch():
    code = "import sys; from t2v.attempt import preemption; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


def test_a_request_that_cannot_be_taken_away_is_told_and_hurts_nothing(tmp_path, capsys):
    (tmp_path / "PREEMPT" / "theirs").mkdir(parents=True)
    assert preemption.requested(tmp_path)
    preemption.acknowledge(tmp_path)
    assert f"{tmp_path}/PREEMPT: stays because" in capsys.readouterr().out


def test_a_disk_that_does_not_answer_asks_for_nothing(tmp_path, monkeypatch):
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "stat", fail)
    assert not preemption.requested(tmp_path)


@pytest.mark.slow
def test_a_terminal_that_is_gone_is_a_request_but_under_nohup(tmp_path):
    deaf = partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    with start(tmp_path, "training", preexec_fn=deaf) as process:
        process.send_signal(signal.SIGHUP)
        time.sleep(ECHO := preemption.ECHO_SECONDS)
        process.send_signal(signal.SIGHUP)
        time.sleep(ECHO)
        assert process.poll() is None
        process.kill()
    with start(tmp_path, "setup") as process:
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=10) == 75


def start(*arguments: object, **options: Any) -> subprocess.Popen:
    command = [sys.executable, "-c", ARM_AND_WAIT, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)
    assert process.stdout is not None
    assert process.stdout.readline() == "armed\n"
    return process


def test_second_signal_leaves_at_once(tmp_path):
    """R10. A launcher and a scheduler that both pass on one request are no second one."""
    with start(tmp_path, "training") as process:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        time.sleep(preemption.ECHO_SECONDS)
        assert process.poll() is None
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=5) == 75
    assert (tmp_path / "left").exists()


@pytest.mark.parametrize(("request_stop", "where"), [("signal", "deep"), ("flag", "setup")])
def test_process_with_nothing_to_save_leaves_by_itself(tmp_path, request_stop, where):
    """R10: wherever it is, also deep in C, where Python's own handlers cannot run."""
    with start(tmp_path, where) as process:
        if request_stop == "signal":
            process.send_signal(signal.SIGTERM)
        else:
            (tmp_path / "PREEMPT").touch()
        assert process.wait(timeout=10) == 75
    assert (tmp_path / "left").exists()
