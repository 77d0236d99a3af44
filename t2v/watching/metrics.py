"""metrics.jsonl is the truth; the terminal, wandb and TensorBoard are views of it."""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from data_pipeline.printable import say
from data_pipeline.store import storage
from data_pipeline.strict import Strict
from t2v.attempt.files import is_number
from t2v.engine.world import World
from t2v.watching.lines import parse_line
from t2v.watching.views import Guarded, TensorBoardView
from t2v.watching.wandb_mirror import WandbMirror

BLOCK_BYTES = 1 << 16
MOST_WAITING = 10_000  # lines kept in memory while the disk is full


class MetricsConfig(Strict):
    """What is told of a run, and to whom."""

    every_steps: int = Field(default=1, ge=1, description="steps per line of metrics.jsonl")
    wandb_project: str | None = Field(
        default=None,
        description="as wandb is set up, offline where it knows no key; none: not used",
    )
    tensorboard: bool = Field(default=False, description="event files in the run folder")
    prometheus: bool = Field(default=False, description="metrics.prom in the run folder")
    prometheus_port: int | None = Field(
        default=None, ge=1024, le=65535, description="of rank 0's host, for Prometheus to ask"
    )
    straggler_steps: int = Field(
        default=100, ge=0, description="steps after which ranks compare who waits; 0: never"
    )


class StepSums:
    """What this rank adds up between two lines; a few numbers are then summed over ranks."""

    def __init__(self, parts: tuple[str, ...], world: World) -> None:
        self.world, self.parts = world, parts
        self._clear()

    def add_samples(self, numbers: list[int], ids: list[str]) -> None:
        """Account for the samples of a micro-batch."""
        for number, name in zip(numbers, ids, strict=True):
            self.digest = wrap(self.digest + sample_digest(number, name))

    def add_step(
        self, losses: Sequence[float], *, data_seconds: float, step_seconds: float
    ) -> None:
        """Account for a step; `losses` are this rank's mean of each part."""
        self.losses += torch.tensor(losses, dtype=torch.float64)
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
            **{f"loss_{part}": loss for part, loss in zip(self.parts, losses, strict=True)},
            "samples_per_second": global_batch_size / seconds,
            "data_wait_share": min(data_seconds / seconds, 1.0),
            "step_seconds": seconds,
            "batch_digest": f"{int(digest) % 2**64:016x}",
        }
        self._clear()
        return values

    def _clear(self) -> None:
        self.losses = torch.zeros(len(self.parts), dtype=torch.float64)
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
    """The lines of a run, written by rank 0; a step never has two of a kind.

    `measured` tells of the lines that earlier attempts left: (seconds of their steps, last step).
    """

    def __init__(self, run_dir: Path, config: MetricsConfig, *, name: str, step: int) -> None:
        self.path = run_dir / "metrics.jsonl"
        self.measured = drop_after(self.path, step)
        self.file = self.path.open("ab", buffering=0)
        self.waiting: list[bytes] = []
        self.views: list[Guarded] = []
        if (project := config.wandb_project) is not None:
            self.views.append(Guarded("wandb", lambda: WandbMirror(run_dir, project, name)))
        if config.tensorboard:
            self.views.append(Guarded("tensorboard", lambda: TensorBoardView(run_dir, step)))

    def write(self, values: dict[str, Any]) -> None:
        """One line; JSON has no NaN, so what is not finite becomes null."""
        finite = {key: _finite(value) for key, value in values.items()}
        self.waiting.append(json.dumps(finite, allow_nan=False).encode() + b"\n")
        self._flush()
        for view in self.views:
            view.write(finite)

    def _flush(self) -> None:
        """Write what waits; on a full disk it waits on, up to a bound, and the run goes on."""
        end = os.fstat(self.file.fileno()).st_size
        lines = b"".join(self.waiting)
        try:
            if self.file.write(lines) != len(lines):
                raise OSError("no space")
        except OSError as failure:
            os.ftruncate(self.file.fileno(), end)  # never half a line
            if len(self.waiting) == 1:
                say(f"{self.path}: lines wait in memory because {failure}; free space.")
            del self.waiting[:-MOST_WAITING]
        else:
            self.waiting = []

    def close(self) -> None:
        self.file.close()
        for view in self.views:
            view.close()


def drop_after(path: Path, step: int) -> tuple[float, int]:
    """Forget lines of steps after `step`, and a last line that a killed process left half; returns
    what the rest measured: (seconds of its steps, the last of them). A damaged line before one of
    these is named, and stays. A long file is read from its end, and never held whole."""
    if not path.exists():
        return 0.0, 0
    end, found = 0, None
    for place, line in lines_from_the_end(path):
        values = parse_line(line)
        if values is None or values["step"] > step:
            continue
        end = end or place + len(line)
        if is_number(seconds := values.get("productive_seconds")):
            found = seconds, values["step"]
            break
    _renew(path, end)
    return found or measured(read_lines(path))


def lines_from_the_end(path: Path) -> Iterator[tuple[int, bytes]]:
    """(place in the file, line) of each line, the last one first."""
    with path.open("rb") as file:
        start, rest = file.seek(0, os.SEEK_END), b""
        while start:
            size = min(BLOCK_BYTES, start)
            start = file.seek(start - size)
            first, *whole = (file.read(size) + rest).splitlines(keepends=True)
            place = start + len(first) + sum(map(len, whole))
            for line in reversed(whole):
                place -= len(line)
                yield place, line
            rest = first
        if rest:
            yield 0, rest


def _renew(path: Path, end: int) -> None:
    """Put a copy of a file up to `end` in its place, its damaged lines named: an attempt that was
    taken for dead and wakes up writes into the old file, which nobody reads."""
    with path.open("rb") as old, storage.open_atomic(str(path)) as new:
        for number, line in enumerate(old, start=1):
            if new.tell() == end:
                break
            new.write(line)
            if not (line.startswith(b"{") and line.endswith(b"}\n")):
                say(f"{path}: line {number} is damaged and is passed over; look at it.")


def read_lines(path: Path) -> Iterator[dict]:
    """The lines of a metrics.jsonl that somebody may be writing; damaged ones are passed over."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if (values := parse_line(line)) is not None:
                yield values


def measured(lines: Iterable[dict]) -> tuple[float, int]:
    """(seconds of all steps that lines tell of, the last of these steps); a line speaks for the
    steps since the one before."""
    total, before = 0.0, 0
    for line in lines:
        if is_number(seconds := line.get("step_seconds")):
            total += seconds * (line["step"] - before)
            before = line["step"]
    return total, before


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
