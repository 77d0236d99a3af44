"""metrics.jsonl is the truth; the terminal and wandb are views of it."""

import hashlib
import json
import os
import resource
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from data_pipeline import storage
from data_pipeline.strict import Strict
from t2v.engine.world import World

PLAIN_LINE_SECONDS = 10.0


class MetricsConfig(Strict):
    """What is told of a run, and to whom."""

    every_steps: int = Field(default=1, ge=1, description="steps per line of metrics.jsonl")
    wandb_project: str | None = Field(
        default=None, description="offline without WANDB_API_KEY; none: wandb is not used"
    )


class StepSums:
    """What this rank adds up between two lines; a few numbers are then summed over ranks."""

    def __init__(self, levels: int, world: World) -> None:
        self.world = world
        self.levels = levels
        self._clear()

    def add_samples(self, numbers: list[int], ids: list[str]) -> None:
        """Account for the samples of a micro-batch."""
        for number, name in zip(numbers, ids, strict=True):
            self.digest = wrap(self.digest + sample_digest(number, name))

    def add_step(self, losses: Tensor, *, data_seconds: float, step_seconds: float) -> None:
        """Account for a step; `losses` are this rank's mean per level."""
        self.losses += losses.detach().double().cpu()
        self.data_seconds += data_seconds
        self.seconds += step_seconds
        self.steps += 1

    def summary(self, global_batch_size: int) -> dict[str, Any]:
        """Means since the last summary, over all ranks; all ranks call this together."""
        world_size = self.world.world_size
        sums = torch.cat([self.losses, torch.tensor([self.data_seconds]).double()])
        *losses, data_seconds = (self.world.total(sums) / world_size / self.steps).tolist()
        digest = self.world.total(torch.tensor(self.digest))
        seconds = self.seconds / self.steps
        values = {
            "loss": sum(losses),
            **{f"loss_level_{level}": loss for level, loss in enumerate(losses)},
            "samples_per_second": global_batch_size / seconds,
            "data_wait_share": min(data_seconds / seconds, 1.0),
            "step_seconds": seconds,
            "batch_digest": f"{int(digest) % 2**64:016x}",
        }
        self._clear()
        return values

    def _clear(self) -> None:
        self.losses = torch.zeros(self.levels, dtype=torch.float64)
        self.data_seconds = self.seconds = 0.0
        self.steps = self.digest = 0


def sample_digest(number: int, name: str) -> int:
    """64 bits of a sample at its place in the global order, as a signed integer.

    A batch's digest is the sum over its samples, so it tells order and content, whatever rank read
    which sample.
    """
    content = hashlib.blake2b(f"{number}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(content, "little", signed=True)


def wrap(value: int) -> int:
    """An integer modulo 2^64, signed, as the sum of int64 tensors wraps."""
    return (value + 2**63) % 2**64 - 2**63


class Metrics:
    """The lines of a run, written by rank 0; a step never has two."""

    def __init__(self, run_dir: Path, config: MetricsConfig, *, name: str, step: int) -> None:
        path = run_dir / "metrics.jsonl"
        drop_after(path, step)
        self.file = path.open("a", encoding="utf-8")
        self.wandb = None
        if config.wandb_project is not None:
            self.wandb = WandbView(run_dir, config.wandb_project, name)

    def write(self, values: dict[str, Any]) -> None:
        """One line; JSON has no NaN, so what is not finite becomes null."""
        finite = {
            key: None if isinstance(value, float) and not -1e308 < value < 1e308 else value
            for key, value in values.items()
        }
        self.file.write(json.dumps(finite, allow_nan=False) + "\n")
        self.file.flush()
        if self.wandb is not None:
            self.wandb.write(finite)

    def close(self) -> None:
        self.file.close()
        if self.wandb is not None:
            self.wandb.close()


def drop_after(path: Path, step: int) -> None:
    """Forget lines of steps after `step`, and a last line that a killed process left half."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    storage.write_atomic(path, b"".join(kept))


def peak_memory_gib() -> float:
    """Most memory this rank has held: its GPU's if it has one, else its process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class WandbView:
    """wandb as a mirror: the run id survives restarts, and its failure ends the mirror only."""

    def __init__(self, run_dir: Path, project: str, name: str) -> None:
        self.run = None
        mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
        id_file = run_dir / "wandb_id"
        try:
            import wandb

            known = id_file.read_text().strip() if id_file.exists() else None
            self.run = wandb.init(
                project=project,
                name=name,
                id=known or uuid.uuid4().hex,
                resume="allow",
                mode=mode,
                dir=str(run_dir),
                settings=wandb.Settings(silent=True),
            )
            storage.write_atomic(id_file, self.run.id.encode())
        except Exception as failure:
            self._end(failure)

    def write(self, values: dict[str, Any]) -> None:
        if self.run is None:
            return
        try:
            numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
            self.run.log(numbers, step=values["step"])
        except Exception as failure:
            self._end(failure)

    def close(self) -> None:
        if self.run is None:
            return
        try:
            self.run.finish()
        except Exception as failure:
            self._end(failure)

    def _end(self, failure: Exception) -> None:
        self.run = None
        print(f"wandb: ends here because {failure!r}; metrics.jsonl goes on.", flush=True)


class ProgressView:
    """A bar on a terminal, a plain line now and then elsewhere."""

    def __init__(self, total_steps: int, step: int) -> None:
        self.total_steps = total_steps
        self.next_line = 0.0
        self.bar = None
        if sys.stdout.isatty():
            self.bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=Console(),
            )
            self.task = self.bar.add_task("training", total=total_steps, completed=step, text="")
            self.bar.start()

    def show(self, values: dict[str, Any]) -> None:
        text = (
            f"loss {values['loss']:.4f}  grad {values['grad_norm']:.3g}  "
            f"{values['samples_per_second']:.1f} samples/s  "
            f"data wait {values['data_wait_share']:.0%}"
        )
        if self.bar is not None:
            self.bar.update(self.task, completed=values["step"], text=text)
        elif time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + PLAIN_LINE_SECONDS
            print(f"step {values['step']}/{self.total_steps}  {text}", flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
