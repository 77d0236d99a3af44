"""How a run is, from its shared folder alone; and what a scheduler should do with it now."""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.requeue import Decision, decide
from data_pipeline.errors import InputMissing
from t2v.attempt.files import is_number, read_mapping, seconds_of
from t2v.attempt.record import (
    PREEMPTED,
    failed_starts,
    failures_in_a_row,
    killed_line,
    pause_seconds,
    read_attempts,
    unfinished,
)
from t2v.watching.side_job import committed_steps

STALE_SECONDS = 120.0
# One of these is in every run folder, whoever began it.
SIGNS = ("status.json", "attempts.jsonl", "logs", "checkpoints", "launch", "slurm")
COUNTS = ("step", "total_steps", "exit_code")
SECONDS_AND_RATES = (
    "samples_per_second",
    "goodput",
    "step_seconds",
    "save_seconds",
    "started",
    "ended",
)
TEXTS = ("state", "reason", "host", "updated", "node", "name")


@dataclass(frozen=True)
class NodeRecord:
    """What the wrapper of one node says of its part of an attempt; `exit_code` None: it goes on."""

    node: str
    host: str
    started: float
    ended: float | None = None
    exit_code: int | None = None
    reason: str = ""
    name: str = ""  # what the scheduler calls it
    gpu_events: Sequence[str] = ()


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint: its step, when, and the attempt that made it."""

    step: int
    at: float
    attempt: int


@dataclass(frozen=True)
class RunStatus:
    """The answer of `t2v status`; seconds and counts, None where the folder does not say."""

    run_dir: str
    state: str
    exit_code: int | None
    reason: str | None
    step: int
    total_steps: int | None
    samples_per_second: float | None
    eta_seconds: float | None
    last_checkpoint: int | None
    last_checkpoint_age_seconds: float | None
    restarts: int
    failures_without_progress: int
    quarantined: int
    quarantined_share: float | None
    skipped_steps: int
    silent_seconds: float | None
    is_stale: bool
    goodput: float | None  # share of the time since the first start that led to a line of metrics
    host: str | None
    straggler: dict[str, Any] | None  # the rank that others wait for, its host and what it costs
    gpu_events: tuple[str, ...]  # of the newest attempt, what drivers told of their GPUs
    decision: Decision
    pause_seconds: float  # before it is started again

    @property
    def has_ended(self) -> bool:
        """Whether no attempt goes on, as far as the folder says."""
        return self.state in ("done", "preempted", "failed")


def run_status(run_dir: Path, *, now: float | None = None) -> RunStatus:
    """The status of a run folder; InputMissing where it is none."""
    if not run_dir.is_dir():
        raise InputMissing(f"{run_dir}: no such run folder; give one that a run has begun.")
    if not any((run_dir / sign).exists() for sign in SIGNS):
        raise InputMissing(f"{run_dir}: holds no run; give a run's own folder, as runs/NAME.")
    now = time.time() if now is None else now
    status = sound(read_mapping(run_dir / "status.json"))
    attempts = read_attempts(run_dir)
    nodes = last_nodes(run_dir)
    ending = last_ending(status, nodes)
    checkpoint = last_checkpoint(run_dir)
    metrics = sound(last_line(run_dir / "metrics.jsonl"))
    step = max(status.get("step") or 0, 0)
    total_steps = status.get("total_steps")
    samples_per_step = _per_step(metrics)
    rate = status.get("samples_per_second") or metrics.get("samples_per_second")
    goes_on = ending["state"] in ("starting", "running")
    going = unfinished(attempts)[-1:] if goes_on else []
    finished = [line for line in attempts if line not in going]
    updated = seconds_of(status.get("updated"))
    # Clocks differ, and may be set back: what comes from later was written now.
    silent = max(now - updated, 0.0) if updated else None
    quarantined = count_lines(run_dir / "quarantine.jsonl")
    samples = step * samples_per_step if samples_per_step else None
    return RunStatus(
        run_dir=str(run_dir),
        **ending,
        step=step,
        total_steps=total_steps,
        samples_per_second=rate,
        eta_seconds=_eta(metrics, step, total_steps) if goes_on else None,
        last_checkpoint=checkpoint.step if checkpoint else None,
        last_checkpoint_age_seconds=max(now - checkpoint.at, 0.0) if checkpoint else None,
        restarts=max(sum(line["event"] == "start" for line in attempts) - 1, 0),
        failures_without_progress=failures(finished, checkpoint),
        quarantined=quarantined,
        quarantined_share=quarantined / samples if samples else None,
        skipped_steps=count_lines(run_dir / "metrics.jsonl", containing=b'"skipped_samples"'),
        silent_seconds=silent,
        is_stale=goes_on and silent is not None and silent > STALE_SECONDS,
        goodput=metrics.get("goodput"),
        host=status.get("host"),
        straggler=straggler_of(status),
        gpu_events=tuple(f"{n.name or n.host}: {told}" for n in nodes for told in n.gpu_events),
        decision=decide(ending, failures(attempts, checkpoint)),
        pause_seconds=pause_seconds(failures(attempts, checkpoint) + 1),
    )


def straggler_of(status: dict[str, Any]) -> dict[str, Any] | None:
    """The straggler of a status, if it tells of one and the file is sound."""
    found = status.get("straggler")
    if not isinstance(found, dict) or not is_number(found.get("share")):
        return None
    if not isinstance(found.get("host"), str):
        return None
    return found if all(is_number(found.get(name)) for name in ("rank", "steps")) else None


def last_ending(status: dict, nodes: Iterable[NodeRecord]) -> dict[str, Any]:
    """State, exit code and reason of the newest attempt.

    An attempt that failed before it owned the run folder has only its wrappers' word.
    """
    nodes = list(nodes)
    started = min((node.started for node in nodes), default=0.0)
    if status and (seconds_of(status.get("updated")) or 0.0) >= int(started):
        state = status.get("state", "starting")
        code = status.get("exit_code")
        if state == "done":
            code = 0
        elif state == "preempted":
            code = PREEMPTED
        if state in ("done", "preempted", "failed"):
            return {"state": state, "exit_code": code, "reason": status.get("reason")}
    ended = [node for node in nodes if node.ended is not None]
    last = max((node.ended or 0.0 for node in ended), default=0.0)
    if status.get("state") in ("starting", "running") and (
        (seconds_of(status.get("updated")) or 0.0) > last
    ):
        ended = []  # another job on this folder has failed, which does not touch the one that runs
    failed = sorted((n for n in ended if n.exit_code), key=lambda node: node.ended or 0.0)
    if failed:
        first = next((n for n in failed if n.exit_code != PREEMPTED), failed[0])
        state = "preempted" if first.exit_code == PREEMPTED else "failed"
        return {"state": state, "exit_code": first.exit_code, "reason": first.reason}
    state = status.get("state", "starting") if status else "starting"
    return {"state": state, "exit_code": status.get("exit_code"), "reason": status.get("reason")}


def failures(attempts: list[dict], checkpoint: Saved | None) -> int:
    """The newest failures in a row: of attempts that failed, or ended without a word, since the
    newest checkpoint, or of starts that failed alike before any owned the run."""
    starts = [line for line in attempts if line["event"] == "start"]
    failed = failures_in_a_row(
        [*attempts, *map(killed_line, unfinished(attempts))],
        fingerprint=starts[-1].get("config_fingerprint", "") if starts else "",
        progress=checkpoint.attempt if checkpoint else 0,
    )
    return max(len(failed_starts(attempts)), len(failed))


def last_checkpoint(run_dir: Path) -> Saved | None:
    """The newest checkpoint; its manifest is written last."""
    folder = run_dir / "checkpoints"
    steps = committed_steps(folder, "manifest.json")
    if not steps:
        return None
    manifest = folder / f"step-{steps[-1]:08d}" / "manifest.json"
    attempt = read_mapping(manifest).get("attempt")
    return Saved(steps[-1], manifest.stat().st_mtime, attempt if isinstance(attempt, int) else 0)


def last_nodes(run_dir: Path) -> list[NodeRecord]:
    """The nodes of the newest attempt that any wrapper has begun."""
    attempts = sorted((run_dir / "logs").glob("attempt-*"))
    return next(filter(None, map(records_in, reversed(attempts))), [])


def records_in(attempt: Path) -> list[NodeRecord]:
    """What the wrappers of an attempt left in its folder."""
    records = [read_mapping(path) for path in sorted(attempt.glob("node-*.json"))]
    known = NodeRecord.__dataclass_fields__
    return [
        NodeRecord(**{name: value for name, value in record.items() if name in known})
        for record in map(sound, records)
        if {"node", "host", "started"} <= set(record)
    ]


def sound(facts: dict[str, Any]) -> dict[str, Any]:
    """What a folder says, less what a damaged file says that cannot be."""
    return {
        name: value
        for name, value in facts.items()
        if not (
            (name in COUNTS and not (type(value) is int and is_number(value + 1)))
            or (name in SECONDS_AND_RATES and not is_number(value))
            or (name in TEXTS and not isinstance(value, str))
            or (name == "gpu_events" and not is_list_of_texts(value))
        )
    }


def is_list_of_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def last_line(path: Path) -> dict[str, Any]:
    """The last whole line of a JSONL file that may be long."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 65536, 0))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict):
            return content
    return {}


def count_lines(path: Path, *, containing: bytes = b"") -> int:
    """Lines of a file, or those of them that hold some bytes."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(containing in line for line in file)


def _per_step(metrics: dict) -> float | None:
    """Samples per step, from a line of metrics."""
    rate, seconds = metrics.get("samples_per_second"), metrics.get("step_seconds")
    return round(rate * seconds) if rate and seconds else None


def _eta(metrics: dict, step: int, total_steps: int | None) -> float | None:
    seconds = metrics.get("step_seconds")
    return max(total_steps - step, 0) * seconds if seconds and total_steps else None
