"""What is promised of a save that breaks, and of the checkpoints that a broken one leaves."""

import os
import signal
import time
from pathlib import Path

import pytest

from data_pipeline.errors import StorageError
from t2v.checkpoint.tensor_files import file_of
from t2v.loop import train
from tests.faulty_runs import ends_of, run_job, steps_of, train_with
from tests.test_loop import (
    assert_same_tensors,
    config_of,
    dataset,
    leave_no_handlers,
    lines_of,
    status_of,
    tensors_at,
)

__all__ = ["dataset", "leave_no_handlers"]


def test_disk_that_is_full_once_costs_one_checkpoint(dataset, tmp_path, monkeypatch, capsys):
    """R18: old checkpoints stay, training goes on."""
    config = config_of(dataset, tmp_path / "run")
    assert train_with(monkeypatch, "checkpoint.write:0:2:enospc", config) == 0
    assert steps_of(tmp_path / "run") == [2, 6]
    told = capsys.readouterr().out
    assert "step 4 was not saved because" in told
    assert f"{file_of(0)}: cannot be used because no space left" in told
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"step-00000002", "step-00000006"}


ENGINES = [
    {"kind": "single"},
    {"kind": "fsdp"},
    *({"kind": "zero", "zero_stage": n} for n in (1, 2, 3)),
]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_no_update_changes_what_a_save_still_copies(dataset, tmp_path, engine):
    """A copy that takes longer than the next step's gradients is of the step it is named after."""
    ranks = 1 if engine["kind"] == "single" else 2
    configs = [config_of(dataset, tmp_path / name, engine=engine) for name in ("slow", "plain")]
    slow = ";".join(f"checkpoint.copy:{rank}:1:slow" for rank in range(ranks))
    for config, faults in zip(configs, (slow, ""), strict=True):
        job, log = run_job(config, faults, ranks)
        assert [rank.returncode for rank in job.ranks] == [0] * ranks, log
    slowly, plainly = (Path(config.run_dir) for config in configs)
    for step in steps_of(plainly):
        assert_same_tensors(tensors_at(slowly, step), tensors_at(plainly, step))
    stalls = [seconds for _, seconds in lines_of(slowly, "checkpoint_seconds")]
    assert max(stalls) > 0.1  # or it was not slow enough to show anything


@pytest.mark.slow
@pytest.mark.dist
def test_copy_that_fails_on_one_rank_costs_one_checkpoint_of_all(dataset, tmp_path):
    config = config_of(dataset, tmp_path / "run", engine={"kind": "fsdp"})
    job, log = run_job(config, "checkpoint.copy:1:2:eio")
    assert [rank.returncode for rank in job.ranks] == [0, 0], log
    assert steps_of(tmp_path / "run") == [2, 6]


@pytest.mark.parametrize(
    "site",
    [
        "checkpoint.write",
        pytest.param("checkpoint.manifest", marks=pytest.mark.slow),
        pytest.param("checkpoint.rename", marks=pytest.mark.slow),
    ],
)
def test_disk_that_stays_full_ends_the_run_with_74(dataset, tmp_path, monkeypatch, site):
    """R18, R19: three saves in a row; what was committed before them stays valid."""
    config = config_of(dataset, tmp_path / "run", total_steps=12, checkpoint={"every_steps": 1})
    faults = ";".join(f"{site}:0:{n}:{'enospc' if n % 2 else 'eio'}" for n in range(3, 13))
    with pytest.raises(StorageError, match="3 saves in a row failed") as failure:
        train_with(monkeypatch, faults, config)
    assert failure.value.exit_code == 74
    assert steps_of(tmp_path / "run") == [1, 2]
    assert status_of(tmp_path / "run")["exit_code"] == 74
    page = (tmp_path / "run" / "failure.md").read_text()
    assert "Free space" in page
    assert train(config) == 0


def test_signal_while_a_checkpoint_is_written_ends_in_order(dataset, tmp_path, monkeypatch):
    """R10: during a save."""
    keep = {"every_steps": 2, "keep_last": 100}
    config = config_of(dataset, tmp_path / "run", total_steps=60, checkpoint=keep)
    assert train_with(monkeypatch, "checkpoint.manifest:0:2:term", config) == 75
    steps = steps_of(tmp_path / "run")
    assert steps[:2] == [2, 4]
    status = status_of(tmp_path / "run")
    assert (status["state"], status["exit_code"]) == ("preempted", 75)
    assert status["last_checkpoint"] == steps[-1]


def test_leftovers_of_dead_attempts_are_removed_and_good_steps_kept(dataset, tmp_path):
    """R29: staging of killed saves, half-retired steps, a stale lock, records that were cut."""
    config = config_of(dataset, tmp_path / "run", total_steps=8)
    assert train(config, stop_at_step=4) == 75
    checkpoints = tmp_path / "run" / "checkpoints"
    for name in (f".staging-step-00000006-{'0' * 32}", f".staging-step-00000001-{'f' * 32}"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "rank-00000.safetensors").write_bytes(b"half")
    (checkpoints / "step-00000005").mkdir()  # never finished: no manifest
    (tmp_path / "run" / "run.lock").write_text('{"host": "' + os.uname().nodename + '", "pid": 1}')
    with (tmp_path / "run" / "attempts.jsonl").open("a") as record:
        record.write('{"attempt": 2, "event": "start", "config_fingerprint": "x"}\n{"att')
    assert train(config) == 0
    names = {path.name for path in checkpoints.iterdir()}
    assert {"step-00000004", "step-00000006", "step-00000008"} <= names
    assert not {name for name in names if name.startswith(".staging")}
    assert ends_of(tmp_path / "run") == [(1, 75), (2, None), (3, 0)]


def test_damaged_newest_checkpoint_is_passed_over(dataset, tmp_path, capsys):
    """R03: a flipped bit is found before training, by name; the one before it is resumed."""
    whole, broken = (config_of(dataset, tmp_path / name) for name in ("whole", "broken"))
    assert train(whole) == 0
    assert train(broken, stop_at_step=4) == 75
    newest = tmp_path / "broken" / "checkpoints" / "step-00000004"
    path = next(newest.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert train(broken) == 0
    output = capsys.readouterr().out
    assert f"{path}: its bytes have changed" in output
    assert "resumed from" in output
    assert "step-00000002" in output
    assert_same_tensors(tensors_at(tmp_path / "broken", 6), tensors_at(tmp_path / "whole", 6))


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("asynchronous", [True, False])
def test_rank_killed_in_a_save_ends_all_without_that_step(dataset, tmp_path, asynchronous):
    """R02."""
    config = config_of(
        dataset,
        tmp_path / "run",
        engine={"kind": "fsdp"},
        checkpoint={"every_steps": 2, "asynchronous": asynchronous},
    )
    job, _ = run_job(config, "checkpoint.write:1:2:kill")
    (struck,) = job.fault_times()
    assert time.time() - struck < 15
    assert steps_of(tmp_path / "run") == [2]
    assert job.ranks[1].returncode == -signal.SIGKILL
    assert run_job(config)[0].exit_code == 0
    assert steps_of(tmp_path / "run") == [2, 4, 6]
