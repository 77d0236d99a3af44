"""The benchmark that proves things on a GPU runs on a CPU too, part by part."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_parts_run_within_their_time_and_are_not_run_again(tmp_path):
    def run(parts: str, minutes: str) -> str:
        command = [sys.executable, "-m", "benchmarks.gpu", f"--out={tmp_path}"]
        done = subprocess.run(
            [*command, f"--parts={parts}", f"--minutes={minutes}"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout

    run("c", "20")
    (path,) = tmp_path.glob("gpu-c-*.json")
    result = json.loads(path.read_text())
    assert result["outcome"] == "done"
    [steps] = result["results"]
    assert steps["parameters"] > 0
    assert 0 < steps["share_of_matmul"] < 1
    # The rest has no time to be done, and says so; what is done stays.
    assert "is there already" in run("cb", "0.01")
    (other,) = tmp_path.glob("gpu-b-*.json")
    assert json.loads(other.read_text())["outcome"].startswith("not done in")
    assert json.loads(path.read_text()) == result
