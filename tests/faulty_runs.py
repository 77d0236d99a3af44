"""Runs that are broken on purpose, and what they leave."""

import time
from pathlib import Path

from benchmarks.job import Job
from t2v.attempt.record import read_attempts
from t2v.checkpoint.finding import list_checkpoints
from t2v.loop import train
from t2v.recipe.recipe import RunConfig, dump_config

TIMES = {
    "setup_seconds": 100.0,
    "data_seconds": 6.0,
    "step_seconds": 6.0,
    "checkpoint_seconds": 10.0,
}


def recipe_of(config: RunConfig) -> Path:
    path = Path(config.run_dir).with_suffix(".yaml")
    path.write_text(dump_config(config))
    return path


def steps_of(run_dir: Path) -> list[int]:
    return [info.step for info in list_checkpoints(run_dir) if info.problem is None]


def train_with(monkeypatch, faults: str, config: RunConfig, **arguments) -> int:
    monkeypatch.setenv("T2V_FAULT", faults)
    try:
        return train(config, **arguments)
    finally:
        monkeypatch.setenv("T2V_FAULT", "")


def run_job(config: RunConfig, faults: str = "", ranks: int = 2) -> tuple[Job, str]:
    """A job of some ranks that has ended, and all that they printed."""
    log = Path(config.run_dir).with_suffix(".log")
    job = Job(recipe_of(config), ranks=ranks, faults=faults, log=log)
    deadline = time.monotonic() + 150
    while not job.is_over:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    return job, log.read_text()


def ends_of(run_dir: Path) -> list[tuple]:
    lines = read_attempts(run_dir)
    return [(line["attempt"], line["exit_code"]) for line in lines if line["event"] == "end"]
