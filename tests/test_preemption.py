"""Requests to stop: a signal or a flag file, from the first line of the program on."""

import os
import signal
import subprocess
import sys
import time

import pytest

from t2v.train import preemption

ARM_AND_WAIT = """
import time
from t2v.train import preemption
preemption.arm()
print("armed", flush=True)
while True:
    time.sleep(0.1)
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
    code = "import sys; from t2v.train import preemption; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


def test_second_signal_leaves_at_once():
    process = subprocess.Popen(
        [sys.executable, "-c", ARM_AND_WAIT], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout as output:
        assert output.readline() == "armed\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=5) == 75
