"""What a run tells while it goes: lines of metrics, a progress view, and its status."""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.feeding.config import DataConfig
from data_pipeline.feeding.loader import Batch
from data_pipeline.feeding.quarantine import Quarantine
from data_pipeline.printable import say
from t2v.attempt.run_folder import StatusFile
from t2v.checkpoint.checkpoints import Saved
from t2v.engine.world import World
from t2v.train.state import TrainState
from t2v.watching.metrics import Metrics, MetricsConfig, StepSums
from t2v.watching.prometheus import PrometheusView
from t2v.watching.rates import Rates, device_name, first_start, peak_memory
from t2v.watching.side_job import SamplesConfig, SideJob
from t2v.watching.stragglers import Stragglers
from t2v.watching.views import Guarded, ProgressView


@dataclass(frozen=True)
class Watched:
    """What is told of a run, and of whom."""

    name: str
    engine: str
    precision: str
    parts: tuple[str, ...]
    total_steps: int
    global_batch_size: int
    tflop_per_sample: Callable[[], float]  # of training; only rank 0 asks
    metrics: MetricsConfig
    data: DataConfig
    samples: SamplesConfig | None


class Report:
    """All ranks report; rank 0 writes."""

    def __init__(
        self,
        run_dir: Path,
        run: Watched,
        world: World,
        status: StatusFile | None,
        *,
        state: TrainState,
    ) -> None:
        """`state` is what the run begins with."""
        self.run, self.world, self.status = run, world, status
        self.sums = StepSums(run.parts, world)
        self.stragglers = Stragglers(run_dir, world, status, run.metrics.straggler_steps)
        self.late: dict[str, Any] = {}  # until the next line
        self.ids: list[str] = []
        self.dropped: list[dict] = []
        self.lines = self.quarantine = None
        if status is not None:
            self.quarantine = Quarantine(
                run_dir / "quarantine.jsonl",
                max_drop_rate=run.data.max_drop_rate,
                max_drops_in_a_row=run.data.max_drops_in_a_row,
                first_sample=state.samples,
            )
            ranks = f"{world.world_size} x {device_name(world.device)}"
            # A node that lost its GPUs would train on its CPU, slowly, and look as if all was well.
            say(f"{run.name}: {ranks}, engine {run.engine}, {run.precision}")
            self.lines = Lines(run_dir, run, world, state.step)
            status.write("running", step=state.step, last_checkpoint=state.step)

    def samples(self, batch: Batch) -> None:
        """Account for the samples of a micro-batch."""
        self.sums.add_samples(batch.numbers.tolist(), batch.ids)
        self.ids += batch.ids
        self.dropped += batch.quarantined

    def step(
        self,
        state: TrainState,
        losses: Sequence[float],
        *,
        data_seconds: float,
        step_seconds: float,
        **facts: Any,
    ) -> None:
        """Account for a finished step; every so often, a line of its means and of `facts`.

        A skipped step has its own line, with its samples.
        """
        step, skipped = state.step, state.skips_in_a_row > 0
        self.sums.add_step(losses, data_seconds=data_seconds, step_seconds=step_seconds)
        if skipped:
            ids = self.world.gather(self.ids)
            facts["skipped_samples"] = [name for part in ids for name in part]
        self.ids = []
        self._account_for_dropped(state.samples)
        self.late |= self.stragglers.step(step)
        last = step == self.run.total_steps
        if step % self.run.metrics.every_steps and not last and not skipped:
            return
        values = {
            "step": step,
            "samples": state.samples,
            **self.sums.summary(self.run.global_batch_size),
            **self.late,
            **facts,
        }
        self.late = {}
        if self.lines is not None and self.status is not None:
            self.lines.step(values)
            rate = values["samples_per_second"]
            with contextlib.suppress(OSError):  # a full disk takes the status, not the run
                self.status.refresh(step=step, samples_per_second=rate, **self.lines.side_job())

    def held_out(self, values: dict[str, Any]) -> None:
        """Losses on held-out samples, a line of their own."""
        if self.lines is not None:
            self.lines.write(values)

    def _account_for_dropped(self, samples: int) -> None:
        """Write down those of the samples so far that were replaced; DataError for too many."""
        if self.world.any(bool(self.dropped)):
            parts = self.world.gather(self.dropped)
            records = [record for part in parts for record in part]
            self.world.on_first(lambda: self._record(records, samples))
        self.dropped = []

    def _record(self, records: list[dict], samples: int) -> None:
        assert self.quarantine is not None
        self.quarantine.record(records, next_sample=samples)

    def saved(self, news: list[Saved]) -> None:
        """What became of saves."""
        if self.status is None or self.lines is None:
            return
        for saved in news:
            self.lines.stall_seconds += saved.stall_seconds
            if saved.problem is None:
                self.lines.committed(saved.step)
                with contextlib.suppress(OSError):
                    told = {"last_checkpoint": saved.step, "save_seconds": saved.seconds}
                    self.status.write("running", **told)
            else:
                say(f"step {saved.step} was not saved because {saved.problem}")

    def close(self) -> None:
        self.stragglers.close()
        if self.lines is not None:
            self.lines.close()


class Lines:
    """What rank 0 writes: metrics.jsonl and the views of it, with the rates of the whole run."""

    def __init__(self, run_dir: Path, run: Watched, world: World, step: int) -> None:
        self.metrics = Metrics(run_dir, run.metrics, name=run.name, step=step)
        self.views = [Guarded("progress", lambda: ProgressView(run.total_steps, step))]
        if run.metrics.prometheus or run.metrics.prometheus_port:
            port, total = run.metrics.prometheus_port, float(run.total_steps)
            make = partial(PrometheusView, run_dir, name=run.name, port=port, total_steps=total)
            self.views.append(Guarded("prometheus", make))
        self.rates = Rates(run.tflop_per_sample(), run.precision, world.world_size, world.device)
        self.first_start = first_start(run_dir)
        self.productive_seconds, self.last_step = self.metrics.measured
        self.stall_seconds = 0.0
        self.samples = None
        if run.samples is not None and run.samples.automatic:
            self.samples = SideJob(run_dir, run.samples)

    def step(self, values: dict[str, Any]) -> None:
        """Complete a line of steps, and write it."""
        self.productive_seconds += values["step_seconds"] * (values["step"] - self.last_step)
        self.last_step = values["step"]
        values |= self.rates.of(values["samples_per_second"]) | peak_memory()
        values["checkpoint_seconds"], self.stall_seconds = self.stall_seconds, 0.0
        values["productive_seconds"] = self.productive_seconds
        if self.first_start is not None:
            elapsed = time.time() - self.first_start
            # A clock that was set back tells nothing.
            values["goodput"] = self.productive_seconds / elapsed if elapsed > 0 else None
        self.write(values)

    def write(self, values: dict[str, Any]) -> None:
        self.metrics.write(values)
        for view in self.views:
            view.write(values)

    def committed(self, step: int) -> None:
        """A checkpoint was committed now, which is a number for dashboards."""
        for view in self.views[1:]:
            view.write({"last_checkpoint": step, "last_checkpoint_at": time.time()})

    def side_job(self) -> dict[str, Any]:
        """The state of the job that samples beside the run, if there is one, for its status."""
        return {} if self.samples is None else {"samples": self.samples.state()}

    def close(self) -> None:
        if self.samples is not None:
            self.samples.close()
        self.metrics.close()
        for view in self.views:
            view.close()
