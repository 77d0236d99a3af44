"""What is promised of a run that breaks, shown by breaking it: by faults, signals and kills."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.job import Job
from benchmarks.soak_faults import Fate
from data_pipeline.errors import ConfigError, InputMissing, NumericError
from t2v.attempt.alarm import heard_alarm, ring
from t2v.loop import train
from tests.faulty_runs import TIMES, ends_of, recipe_of, run_job, steps_of, train_with
from tests.test_loop import (
    assert_same_tensors,
    config_of,
    dataset,
    leave_no_handlers,
    status_of,
    tensors_at,
    wait_for_step,
)

__all__ = ["dataset", "leave_no_handlers"]


def test_third_crash_in_a_row_is_not_started_again(dataset, tmp_path, monkeypatch):
    """R28: the refusal names step and cause; counting begins anew on request."""
    config = config_of(dataset, tmp_path / "run", checkpoint={"every_steps": 5})
    for _ in range(3):
        with pytest.raises(RuntimeError, match="a fault was asked for"):
            train_with(monkeypatch, "step:0:3:crash", config)
    assert ends_of(tmp_path / "run") == [(1, 1), (2, 1), (3, 1)]
    with pytest.raises(ConfigError, match="step 3: RuntimeError: a fault was asked for") as failure:
        train(config)
    assert failure.value.exit_code == 78
    assert status_of(tmp_path / "run")["exit_code"] == 78
    assert "crash" in (tmp_path / "run" / "failure.md").read_text()
    assert train(config, clear_failures=True) == 0
    assert not (tmp_path / "run" / "failure.md").exists()


def test_crashes_after_progress_are_started_again(dataset, tmp_path, monkeypatch):
    """R28: a newer checkpoint each time is progress."""
    config = config_of(dataset, tmp_path / "run", checkpoint={"every_steps": 1})
    for step in (2, 3, 4, 5):
        with pytest.raises(RuntimeError, match="a fault was asked for"):
            train_with(monkeypatch, f"data:0:{step}:crash", config)
    assert train(config) == 0


def test_start_that_is_refused_leaves_no_run_folder(dataset, tmp_path):
    config = config_of(dataset, tmp_path / "run")
    missing = config.data.sources[0].model_copy(update={"path": str(tmp_path / "nothing")})
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"sources": [missing]})}
    )
    with pytest.raises(InputMissing, match="nothing"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_an_alarm_does_not_bring_back_a_run_folder_that_was_taken_away(tmp_path):
    logs = tmp_path / "refused" / "logs" / "attempt-0001"
    ring(logs, rank=1, is_hang=False, exit_code=75)
    assert not (tmp_path / "refused").exists()
    (tmp_path / "refused").mkdir()
    ring(logs, rank=1, is_hang=False, exit_code=75)
    assert heard_alarm(logs)["rank"] == 1


def test_unknown_fault_ends_training_with_one_line(dataset, tmp_path):
    config = config_of(dataset, tmp_path / "run")
    command = [sys.executable, "-m", "t2v.cli", "train", str(recipe_of(config))]
    environment = os.environ | {"T2V_FAULT": "nowhere:0:1:kill"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 78
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


SECTIONS = {
    "data": "data",
    "forward": "step",
    "collective": "step",
    "checkpoint.copy": "checkpoint",
}


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("site", ["forward", "data", "collective", "checkpoint.copy"])
def test_rank_that_hangs_is_named_and_all_end(dataset, tmp_path, site):
    """R11: the report names the rank that hangs, not those that wait for it."""
    config = config_of(dataset, tmp_path / "run", engine={"kind": "fsdp"}, watchdog=TIMES)
    nth = 1 if site == "checkpoint.copy" else 3
    job, output = run_job(config, f"{site}:1:{nth}:hang")
    (struck,) = job.fault_times()
    assert time.time() - struck < TIMES["step_seconds"] + 20
    assert [rank.returncode for rank in job.ranks] == [71, 71]
    where = f"section '{SECTIONS[site]}' of step {2 if site == 'checkpoint.copy' else 3}"
    assert f"rank 1 on {os.uname().nodename} hangs in {where}" in output
    assert "rank 0 on" not in output
    assert "in _break" in output
    status = status_of(tmp_path / "run")
    assert (status["state"], status["exit_code"]) == ("failed", 71)
    assert status["reason"].startswith("rank 1 on")
    assert "| 1 on" in (tmp_path / "run" / "failure.md").read_text()


@pytest.mark.slow
@pytest.mark.dist
def test_rank_that_fails_to_read_ends_all_with_its_error(dataset, tmp_path):
    """A failure of one rank is everyone's: one line, one code, the right rank on the page."""
    config = config_of(dataset, tmp_path / "run", engine={"kind": "fsdp"}, watchdog=TIMES)
    job, output = run_job(config, "data:1:3:eio")
    assert [rank.returncode for rank in job.ranks] == [74, 74]
    assert output.count("input/output error") == 1
    assert status_of(tmp_path / "run")["exit_code"] == 74
    page = (tmp_path / "run" / "failure.md").read_text()
    assert "| 1 on" in page
    assert "input/output error" in page


@pytest.mark.slow
@pytest.mark.dist
def test_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all(dataset, tmp_path):
    """R20: once: no moment changes; for ever: exit 70, and nothing bad is kept."""
    config = config_of(
        dataset,
        tmp_path / "run",
        engine={"kind": "fsdp"},
        checkpoint={"every_steps": 1, "keep_last": 9},
        optimizer={"max_skips_in_a_row": 3},
        total_steps=9,
    )
    nan = ";".join(f"forward:1:{step}:nan" for step in (3, 6, 7, 8))
    job, output = run_job(config, nan)
    assert job.exit_code == NumericError.exit_code
    assert output.count("no finite gradient in 3 steps in a row up to step 8") == 1
    assert_same_tensors(tensors_at(tmp_path / "run", 3), tensors_at(tmp_path / "run", 2))
    assert max(steps_of(tmp_path / "run")) == 7
    assert_same_tensors(tensors_at(tmp_path / "run", 7), tensors_at(tmp_path / "run", 5))
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines[2]["skipped_samples"]) == config.global_batch_size


@pytest.mark.slow
@pytest.mark.dist
def test_sigterm_to_torchrun_saves_and_is_told_by_status(dataset, tmp_path):
    """R08."""
    config = config_of(
        dataset, tmp_path / "run", engine={"kind": "fsdp"}, total_steps=5000,
        checkpoint={"every_steps": 5000},
    )  # fmt: skip
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "t2v.cli", "train", str(recipe_of(config))),
    ]
    process = subprocess.Popen(command)
    wait_for_step(tmp_path / "run", 3, process)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    status = status_of(tmp_path / "run")
    assert (status["state"], status["exit_code"]) == ("preempted", 75)
    assert steps_of(tmp_path / "run") == [status["step"]]
    assert ends_of(tmp_path / "run") == [(1, 75)]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("when", ["import", "setup", "rendezvous"])
def test_signal_before_training_leaves_quickly_and_quietly(dataset, tmp_path, when):
    """R10: no traceback, no half state, at most 10 s."""
    engine = {"kind": "fsdp"} if when == "rendezvous" else {"kind": "single"}
    config = config_of(dataset, tmp_path / "run", engine=engine)
    job = Job(
        recipe_of(config),
        ranks=2 if when == "rendezvous" else 1,
        faults="setup:0:1:hang" if when == "setup" else "",
        log=tmp_path / "log",
    )
    if when == "rendezvous":
        job.ranks[1].kill()  # so that rank 0 waits for it
        job.ranks[1].wait()
        time.sleep(12)
    elif when == "setup":
        while not job.fault_times():
            time.sleep(0.1)
    else:
        time.sleep(1.0)
    started = time.monotonic()
    job.ranks[0].send_signal(signal.SIGTERM)
    assert job.ranks[0].wait(timeout=30) == 75
    assert time.monotonic() - started < 10
    assert "Traceback" not in (tmp_path / "log").read_text()
    if when == "setup":
        assert status_of(tmp_path / "run")["state"] == "preempted"


@pytest.mark.slow
@pytest.mark.dist
def test_zombie_that_was_taken_for_dead_may_not_commit(dataset, tmp_path):
    """R23: start together, second later, first zombie revives."""
    run_dir = tmp_path / "run"
    config = config_of(dataset, run_dir, total_steps=60, checkpoint={"every_steps": 5})
    recipe = recipe_of(config)
    zombie = Job(recipe, ranks=1, log=tmp_path / "zombie.log")
    wait_for_step(run_dir, 7, zombie.ranks[0])
    zombie.kill(signal.SIGSTOP)
    second = Job(recipe, ranks=1, log=tmp_path / "second.log")
    assert second.ranks[0].wait(timeout=120) == 73
    assert "is in use by process" in (tmp_path / "second.log").read_text()
    (run_dir / "run.lock").unlink()  # as on a disk that passes no locks on
    heir = Job(recipe, ranks=1, log=tmp_path / "heir.log")
    assert heir.ranks[0].wait(timeout=120) == 0
    before = {path.name: path.stat().st_mtime_ns for path in (run_dir / "checkpoints").iterdir()}
    told = (run_dir / "metrics.jsonl").read_bytes()
    zombie.kill(signal.SIGCONT)
    assert zombie.ranks[0].wait(timeout=120) == 73
    after = {path.name: path.stat().st_mtime_ns for path in (run_dir / "checkpoints").iterdir()}
    assert {n: t for n, t in after.items() if not n.startswith(".")} == before
    assert (run_dir / "metrics.jsonl").read_bytes() == told
    assert status_of(run_dir)["state"] == "done"
    assert "may not commit because attempt 2" in (tmp_path / "zombie.log").read_text()
    together = [Job(recipe, ranks=1, log=tmp_path / f"{n}.log") for n in range(2)]
    codes = sorted(job.ranks[0].wait(timeout=120) for job in together)
    assert codes in ([0, 73], [0, 0])  # the loser may come when the winner is done


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(1500)
def test_run_killed_at_any_instant_resumes(dataset, tmp_path):
    """R01: 50 times, in steps and in saves; at most the steps since a save are lost."""
    every, repeats = 3, 50
    chance = random.Random(0)
    run_dir = tmp_path / "killed"
    changes = {"checkpoint": {"every_steps": every}, "total_steps": 100_000}
    recipe = recipe_of(config_of(dataset, run_dir, **changes))
    reached = 0
    for number in range(repeats):
        # Three kills before one save would trip the breaker, as they should.
        job = Job(recipe, "--clear-failures", ranks=1, log=tmp_path / "log")
        wait_for_new_step(run_dir, job)
        time.sleep(chance.uniform(0.0, 0.5))
        job.kill()
        job.ranks[0].wait()
        resumed = steps_of(run_dir)[-1] if steps_of(run_dir) else 0
        whole = [line for line in (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
                 if line.endswith("}\n")]  # fmt: skip
        reached = json.loads(whole[-1])["step"] if whole else 0
        assert reached - resumed <= 2 * every, number
    assert ends_of(run_dir)[0] == (1, None)


def wait_for_new_step(run_dir: Path, job: Job) -> None:
    path, deadline = run_dir / "metrics.jsonl", time.monotonic() + 90
    before = path.stat().st_mtime_ns if path.exists() else 0
    while not path.exists() or path.stat().st_mtime_ns == before:
        assert job.ranks[0].poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(900)
def test_soak_ends_with_the_weights_of_the_undisturbed_run(tmp_path):
    """R30, short."""
    command = [sys.executable, "-m", "benchmarks.soak", "--faults", "10", "--runs", "1"]
    done = subprocess.run(
        [*command, "--workdir", str(tmp_path / "soak"), "--out", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(next(tmp_path.glob("soak-10-*.json")).read_text())
    assert result["bit_identical"]
    assert set(result["faults"]) == set(Fate.KINDS)
    assert result["left_behind"] == 0
