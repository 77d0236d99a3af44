"""Sampling beside a run: a job of its own, at low priority, from committed checkpoints.

Training never waits for it. Nothing here imports torch: the follower mostly sleeps, and each
checkpoint is sampled by a process of `t2v sample`, whose memory ends with it.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, model_validator

from data_pipeline.errors import ConfigError, InputMissing, RunLocked
from data_pipeline.printable import say
from data_pipeline.store import storage
from data_pipeline.strict import Strict
from t2v.attempt.files import read_mapping

COMMITTED = re.compile(r"step-(\d{8,})")
STAGED = re.compile(r"\.step-\d{8,}-[0-9a-f]{32}")
POLL_SECONDS = 5.0
TRIES = 2
STATE_SECONDS = 10.0  # between two looks of the run at its side job
NICEST = 19


class SamplesConfig(Strict):
    """What is sampled of a run's checkpoints while it goes, on averaged weights."""

    every_steps: int = Field(ge=1, description="of the committed checkpoints, those so far apart")
    prompts: list[Annotated[str, Field(min_length=1)]] = Field(default=[])
    labels: list[Annotated[int, Field(ge=0)]] = Field(default=[], description="classes")
    count: int = Field(default=0, ge=0, description="clips of a recipe with neither")
    encoder: str | None = Field(default=None, description="text encoder: a folder or hub id")
    vae: str | None = Field(default=None, description="autoencoder: a folder or hub id")
    seed: int = Field(default=0, ge=0)
    settings: list[str] = Field(default=[], description="KEY=VALUE as in `t2v sample --set`")
    automatic: bool = Field(
        default=True, description="start the job beside rank 0, on its CPU; else: t2v samples"
    )
    threads: int = Field(default=2, ge=1, description="CPU threads of the automatic job")

    @model_validator(mode="after")
    def _refuse_nothing(self) -> "SamplesConfig":
        if sum(map(bool, (self.prompts, self.labels, self.count))) != 1:
            raise ValueError("give prompts, labels or, for a recipe with neither, a count")
        return self


class SideJob:
    """The automatic job of a run, which ends with the run."""

    def __init__(self, run_dir: Path, config: SamplesConfig) -> None:
        self.run_dir = run_dir
        self.process: subprocess.Popen | None = None
        self.looked, self.known = 0.0, {}
        threads = str(config.threads)
        environment = {
            name: value
            for name, value in os.environ.items()
            # A process of its own, no rank of the run, and never on a GPU that trains.
            if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        } | {"OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "t2v.cli", "samples", str(run_dir), "--follow"]
        log = run_dir / "logs" / "samples.log"
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as output:
                self.process = subprocess.Popen(
                    [*command, "--parent", str(os.getpid())],
                    stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                    env=environment, start_new_session=True,
                )  # fmt: skip
        except OSError as failure:
            self.known = {"state": "failed", "reason": str(failure)}

    def state(self) -> dict[str, Any]:
        """What the job last said of itself."""
        if self.process is not None and time.monotonic() - self.looked > STATE_SECONDS:
            self.looked = time.monotonic()
            self.known = read_state(self.run_dir)
            if (code := self.process.poll()) is not None:
                reason = f"exit code {code}; see logs/samples.log, then `t2v samples RUN_DIR`"
                self.known |= {"state": "failed", "reason": self.known.get("reason") or reason}
        return self.known

    def close(self) -> None:
        """End the job and all it has started; what it had not finished is sampled another time."""
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def sample_run(run_dir: Path, *, follow: bool, parent: int | None, encoder: str | None) -> int:
    """Sample every checkpoint that is due and has no samples; with `follow`, for as long as there
    may be more: until the run has ended, or the process `parent` is gone. Returns the exit code of
    a step that could not be sampled, if any."""
    config = samples_config(run_dir)
    if parent is not None:
        os.nice(NICEST)
    folder = run_dir / "samples"
    folder.mkdir(exist_ok=True)
    failed: Counter[int] = Counter()
    codes: dict[int, int] = {}
    with alone(folder):
        for staging in folder.iterdir():  # of jobs that were killed
            if STAGED.fullmatch(staging.name) and not staging.is_symlink():
                shutil.rmtree(staging, ignore_errors=True)
        while True:
            ended = parent is None and run_ended(run_dir)
            due = due_steps(run_dir, config.every_steps)
            pending = [step for step in due if failed[step] < TRIES]
            for step in pending:
                codes[step] = sample_step(run_dir, step, config, encoder)
                failed[step] += codes[step] != 0
            is_alone = parent is not None and os.getppid() != parent
            if not follow or is_alone or (ended and not pending):
                left = due_steps(run_dir, config.every_steps)  # not those that were retired since
                return max((codes.get(step, 0) for step in left), default=0)
            if not pending:
                time.sleep(POLL_SECONDS)


def sample_step(run_dir: Path, step: int, config: SamplesConfig, encoder: str | None) -> int:
    """Sample one checkpoint into `samples/step-...`, which appears when it is complete; the exit
    code of `t2v sample`."""
    name = f"step-{step:08d}"
    folder = run_dir / "samples" / name
    staging = folder.with_name(f".{name}-{uuid.uuid4().hex}")
    if os.path.lexists(folder):
        reason = f"{folder} is there already and holds no samples.json; move it away"
        write_state(run_dir, state="failed", step=step, reason=reason)
        say(f"step {step}: not sampled because {reason}")
        return ConfigError.exit_code
    write_state(run_dir, state="sampling", step=step)
    command = sample_command(run_dir / "checkpoints" / name, staging, config, encoder)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        otherwise = f"t2v sample ended with code {done.returncode} and said nothing"
        reason = (done.stderr.strip().splitlines() or [otherwise])[-1][-500:]
        shutil.rmtree(staging, ignore_errors=True)
        write_state(run_dir, state="failed", step=step, reason=reason)
        say(f"step {step}: not sampled because {reason}")
        return max(done.returncode, 1)
    staging.rename(folder)
    write_state(run_dir, state="done", step=step)
    say(f"step {step}: sampled.")
    return 0


def sample_command(
    checkpoint: Path, out: Path, config: SamplesConfig, encoder: str | None
) -> list[str]:
    """`t2v sample` of a checkpoint; values cannot be taken for options."""
    command = [sys.executable, "-m", "t2v.cli", "sample", str(checkpoint), f"--out={out}"]
    command += [f"--prompt={prompt}" for prompt in config.prompts]
    command += [f"--label={label}" for label in config.labels]
    command += [f"--count={config.count}"] if config.count else []
    command += [f"--set={setting}" for setting in config.settings]
    encoder = encoder or config.encoder
    command += [f"--encoder={encoder}"] if encoder else []
    command += [f"--vae={config.vae}"] if config.vae else []
    return [*command, f"--seed={config.seed}"]


def due_steps(run_dir: Path, every_steps: int) -> list[int]:
    """Committed steps to sample, newest first: each at least `every_steps` from the next."""
    taken = committed_steps(run_dir / "samples", "samples.json")
    chosen = {0, *taken}
    for step in committed_steps(run_dir / "checkpoints", "manifest.json"):
        if all(abs(step - other) >= every_steps for other in chosen):
            chosen.add(step)
    return sorted(chosen - {0, *taken}, reverse=True)


def committed_steps(folder: Path, proof: str) -> list[int]:
    """Steps whose folder holds the file that is written last."""
    found = []
    for path in folder.glob(f"step-*/{proof}"):
        if match := COMMITTED.fullmatch(path.parent.name):
            found.append(int(match[1]))
    return sorted(found)


def samples_config(run_dir: Path) -> SamplesConfig:
    """The `samples` section of a run's recipe."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise InputMissing(f"{path}: missing; give the folder of a run that has begun.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))["samples"]
        return SamplesConfig.model_validate(content)
    except (KeyError, TypeError, yaml.YAMLError, ValueError):
        raise ConfigError(
            f"{path}: has no samples section that could be followed; write one into the recipe, "
            "or use t2v sample."
        ) from None


def run_ended(run_dir: Path) -> bool:
    """Whether a run is done; one that failed or was preempted may come back."""
    return read_mapping(run_dir / "status.json").get("state") == "done"


def read_state(run_dir: Path) -> dict[str, Any]:
    """What the side job last wrote of itself; empty where it has not."""
    return read_mapping(run_dir / "samples" / "state.json")


def write_state(run_dir: Path, **facts: Any) -> None:
    """Replace the side job's word on itself."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    content = json.dumps(facts | {"updated": now}).encode()
    storage.write_atomic(str(run_dir / "samples" / "state.json"), content)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Never two side jobs of one run; RunLocked for the second."""
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunLocked(
                f"{folder}: another job is sampling this run; let it go on, or stop it."
            ) from None
        yield
