"""One owner of a run folder at a time."""

import json
import subprocess
import sys

import pytest

from data_pipeline.errors import RunLocked
from t2v.train.run_folder import StatusFile, locked

HOLD = """
import sys
from pathlib import Path
from t2v.train.run_folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_second_owner_is_refused_until_the_first_is_gone_however_it_went(tmp_path):
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
        with pytest.raises(RunLocked, match=f'"pid": {process.pid}') as failure, locked(tmp_path):
            pass
        assert failure.value.exit_code == 73
        process.kill()
        process.wait()
    with locked(tmp_path):
        pass


def test_status_is_whole_and_keeps_its_facts(tmp_path):
    status = StatusFile(tmp_path, total_steps=9)
    status.write("running", step=3)
    status.refresh(step=4)
    status.write("preempted")
    found = json.loads((tmp_path / "status.json").read_text())
    assert (found["state"], found["step"], found["total_steps"]) == ("preempted", 4, 9)
    assert {"host", "pid", "updated"} <= set(found)
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
