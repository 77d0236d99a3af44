"""Whoever is stopped or killed takes along what it started, and leaves nothing of it."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from t2v.attempt.failure import wait_until
from tests.test_loop import config_of, dataset, status_of
from tests.test_node import processes_of, start_node, wait_for_step

__all__ = ["dataset"]


def temporary() -> set[str]:
    return {name for name in os.listdir(tempfile.gettempdir()) if name.startswith("torchelastic")}


@pytest.mark.slow
@pytest.mark.dist
def test_ranks_of_a_killed_wrapper_save_and_end(dataset, tmp_path):
    config = config_of(
        dataset, tmp_path / "run", total_steps=100_000, engine={"kind": "fsdp"},
        checkpoint={"every_steps": 100_000},
    )  # fmt: skip
    before = temporary()
    node = start_node(config, tmp_path)
    wait_for_step(tmp_path / "run", 3, node)
    node.kill()
    node.communicate(timeout=120)  # its ranks have its output, too
    assert wait_until(lambda: not processes_of(Path(config.run_dir)), 60)
    status = status_of(tmp_path / "run")
    assert (status["state"], status["last_checkpoint"]) == ("preempted", status["step"])
    assert temporary() <= before


HANG = """
import tempfile, time
from t2v import cli

def hang(options):
    with tempfile.TemporaryDirectory():
        print("begun", flush=True)
        time.sleep(60)

cli.plan = hang
raise SystemExit(cli.main(["plan", "x"]))
"""


def test_a_command_that_is_told_to_stop_leaves_no_temporary_files(tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", HANG]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 143
    assert list(tmp_path.iterdir()) == []
