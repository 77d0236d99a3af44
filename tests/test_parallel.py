"""Work in several processes gives the same as in one, and ends with its parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from data_pipeline.errors import DataError
from data_pipeline.making.build import build
from data_pipeline.parallel import map_in_order

pytestmark = pytest.mark.dist


def slow_at_first(number: int) -> int:
    time.sleep(0.2 if number == 0 else 0.0)
    return number * number


def die_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_results_come_in_order():
    assert list(map_in_order(slow_at_first, range(20), 2)) == [n * n for n in range(20)]


def test_a_worker_that_dies_is_told():
    with pytest.raises(DataError, match=r"^clip [0-3]: a worker process died at it"):
        list(map_in_order(die_at_three, range(8), 2, named=lambda number: f"clip {number}"))


@pytest.mark.parametrize("seconds", [0.0, 0.03, 0.1, 0.2, 0.4, 0.8])
def test_ctrl_c_at_any_instant_is_told_once_and_ends_all(seconds):
    script = (
        "import sys, time\nfrom data_pipeline.parallel import map_in_order\n"
        "if __name__ == '__main__':\n    print('begins', flush=True)\n"
        "    try:\n        list(map_in_order(time.sleep, [0.05] * 1000, 2))\n"
        "    except KeyboardInterrupt:\n        sys.exit('interrupted')\n"
    )
    job = subprocess.Popen([sys.executable, "-c", script], start_new_session=True, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert job.stdout.readline() == "begins\n"
    time.sleep(seconds)
    family = psutil.Process(job.pid).children(recursive=True)
    os.killpg(job.pid, signal.SIGINT)
    assert job.communicate(timeout=60)[1] == "interrupted\n"
    assert not psutil.wait_procs(family, timeout=10)[1]


@pytest.mark.slow
def test_workers_make_the_same_dataset_and_end_with_a_killed_parent(media, datasets, tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable, "-c",
        "import sys\nfrom data_pipeline.making.build import build\nif __name__ == '__main__':\n"
        " build(*sys.argv[1:], frames=8, height=24, width=32, shard_samples=6, workers=2)",
        str(media / "videos"), str(out),
    ]  # fmt: skip
    job = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not (out / "shards" / "000000.idx").exists() and job.poll() is None:
        time.sleep(0.01)
    family = psutil.Process(job.pid).children(recursive=True)
    job.send_signal(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    dataset = build(
        media / "videos", out, frames=8, height=24, width=32, shard_samples=6, workers=2
    )
    for path in sorted(Path(dataset.shard_folder).iterdir()):
        assert path.read_bytes() == (datasets / "videos" / "shards" / path.name).read_bytes()
