"""Collectives that return at once and whose results block, as NCCL's: whoever hangs is named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed import HashStore

from t2v.attempt import collectives
from t2v.attempt.collectives import Progress, progress, recorded
from t2v.attempt.culprit import culprit
from t2v.attempt.failure import first_failure
from t2v.attempt.watchdog import LAST, TIMES, Measured, Watchdog, WatchdogConfig
from tests.test_watchdog import at

RANKS = 3
# Each rank is a host that launches collectives and a device that runs them behind it: a collective
# ends where all devices have begun it, which files in a shared folder tell.
RANK = """
import sys, time
from pathlib import Path
from t2v.attempt import watchdog as watching
from t2v.attempt.collectives import Progress
from t2v.attempt.watchdog import Watchdog, WatchdogConfig
from t2v.engine.device import to_host

rank, ranks, hangs, has_recorder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
folder = Path(sys.argv[5])
launched = begun = 0

class Result:
    def __init__(self, number):
        self.number = number
    def cpu(self):
        while len(list(folder.glob(f"begun-{self.number}-*"))) < ranks:
            time.sleep(0.02)
        return self

def launch(device_works=True):
    global launched, begun
    launched += 1
    if device_works:
        begun = launched
        (folder / f"begun-{launched}-{rank}").touch()
    return Result(launched)

def compute():
    if hangs == "host" and rank == 1 and launched == 4:
        time.sleep(600)

def counted(dumps):
    ended = sum(len(list(folder.glob(f"begun-{n}-*"))) == ranks for n in range(1, 9))
    return {"stub/0": Progress(launched, begun, ended)} if has_recorder == "recorder" else {}

watching.progress = counted
config = WatchdogConfig(setup_seconds=60.0, data_seconds=2.0, step_seconds=2.0)
with Watchdog(config) as watchdog:
    logs = folder / "logs"
    watchdog.serve(logs, rank=rank, world_size=ranks, on_end=lambda failure, code: None)
    for step in range(3):
        watchdog.enter("step", step)
        for part in range(2):
            compute()
            result = launch(device_works=not (hangs == "device" and rank == 1 and launched >= 4))
        to_host(result)
"""


@pytest.mark.dist
@pytest.mark.parametrize(
    ("hangs", "recorder"),
    [
        ("device", "recorder"),
        pytest.param("host", "none", marks=pytest.mark.slow),
        pytest.param("host", "recorder", marks=pytest.mark.slow),
    ],
)
def test_the_rank_that_hangs_is_named_though_all_hosts_wait_for_a_device(tmp_path, hangs, recorder):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(RANKS), hangs, recorder, str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    told = [rank.communicate(timeout=100)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [71] * RANKS, told
    failure = first_failure(tmp_path / "logs")
    assert failure is not None
    assert failure.rank == 1
    assert "rank 1" in failure.reason
    assert ("in compute" if hangs == "host" else "in to_host") in failure.stack


def late(rank: int, launched: int, begun: int, *, ended: int = 5, waits: bool = True):
    position = at(rank, 9, waits=waits)
    return position.model_copy(update={"collectives": {"nccl/0": (launched, begun, ended)}})


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ([late(0, 9, 6), late(1, 8, 6), late(2, 9, 6, waits=False)], 1),
        ([late(0, 9, 6), late(1, 9, 5), late(2, 9, 6, waits=False)], 1),
        ([late(0, 9, 6), late(1, 9, 6), late(2, 9, 6, waits=False)], 2),
        ([late(0, 9, 9, ended=9), late(1, 7, 7, ended=7, waits=False)], 1),
    ],
    ids=["launched less", "its device began less", "equal: who does not wait", "nobody is awaited"],
)
def test_collectives_that_somebody_waits_for_decide(positions, expected):
    assert culprit(positions, len(positions)) == expected


def test_torchs_recorder_tells_what_was_launched_and_ended(monkeypatch):
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "2000")
    before = progress(recorded())
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        import torch

        for _ in range(3):
            dist.all_reduce(torch.ones(2))
        after = progress(recorded())
    finally:
        dist.destroy_process_group()
    (group,) = set(after) - set(before)
    assert (after[group].launched, after[group].ended) == (3, 3)


def test_a_recorder_of_another_form_is_no_recorder(tmp_path):
    assert progress({"a": {}, "b": {"pg_status": []}, "c": {"pg_status": {"0": {}}}}) == {}
    counts = {f"last_{what}_collective": "4" for what in ("enqueued", "started", "completed")}
    known = {"a": {"pg_status": {"0": counts}}}
    assert progress(known) == {"a/0": Progress(4, 4, 4)}
    collectives.leave_record(tmp_path, 7, known)
    assert json.loads((tmp_path / "collectives-rank-00007.json").read_text()) == known
    collectives.leave_record(Path("/proc/none"), 7, known)  # a disk that fails hides nothing


def test_a_deadline_is_ten_times_what_was_measured_and_compilation_counts_once():
    measured = Measured()
    assert measured.deadline("step") == 0.0
    measured.add("step", 40.0, is_first_step=True)
    assert measured.deadline("step") == pytest.approx(40.0)
    measured.add("step", 5.0, is_first_step=True)
    assert measured.deadline("step") == pytest.approx(5.0 * TIMES)
    measured.add("step", 7.0, is_first_step=False)
    assert measured.deadline("step") == pytest.approx(7.0 * TIMES)
    assert measured.deadline("data") == 0.0
    for _ in range(LAST):
        measured.add("step", 0.5, is_first_step=False)
    assert measured.deadline("step") == pytest.approx(0.5 * TIMES)


def test_a_slow_section_is_no_hang_and_no_deadline_outlasts_those_who_wait(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("t2v.attempt.watchdog.time.monotonic", lambda: clock[0])
    for longest, expected in ((1e9, 70.0), (50.0, 50.0), (3.0, 6.0)):
        watchdog = Watchdog(WatchdogConfig(step_seconds=6.0), longest=longest)
        for step, seconds in enumerate((30.0, 7.0, 7.0)):
            watchdog.enter("step", step)
            clock[0] += seconds
        watchdog.enter("step", 3)
        assert watchdog._deadline() == expected
