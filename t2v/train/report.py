"""What a run tells while it goes: lines of metrics, a progress view, and its status."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from data_pipeline.quarantine import Quarantine
from t2v.engine.world import World
from t2v.train.checkpoint import Saved
from t2v.train.metrics import Metrics, ProgressView, StepSums, peak_memory_gib
from t2v.train.run_folder import State, StatusFile
from t2v.train.state import TrainState

if TYPE_CHECKING:
    from data_pipeline.loader import Batch
    from t2v.config import RunConfig


class Report:
    """All ranks report; rank 0 writes."""

    def __init__(
        self,
        run_dir: Path,
        config: "RunConfig",
        world: World,
        status: StatusFile | None,
        *,
        step: int,
    ) -> None:
        self.config, self.world, self.status = config, world, status
        self.sums = StepSums(config.pyramid.levels, world)
        self.ids: list[str] = []
        self.dropped: list[dict] = []
        self.metrics = self.view = self.quarantine = None
        if status is not None:
            self.quarantine = Quarantine(
                run_dir / "quarantine.jsonl",
                max_drop_rate=config.data.max_drop_rate,
                max_drops_in_a_row=config.data.max_drops_in_a_row,
                first_sample=step * config.global_batch_size,
            )
            self.metrics = Metrics(run_dir, config.metrics, name=config.name, step=step)
            self.view = ProgressView(config.total_steps, step)
            status.write("running", step=step, last_checkpoint=step)

    def samples(self, batch: "Batch") -> None:
        """Account for the samples of a micro-batch."""
        self.sums.add_samples(batch.numbers.tolist(), batch.ids)
        self.ids += batch.ids
        self.dropped += batch.quarantined

    def step(
        self,
        state: TrainState,
        losses: Tensor,
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
        self._account_for_dropped(step)
        last = step == self.config.total_steps
        if step % self.config.metrics.every_steps and not last and not skipped:
            return
        values = {"step": step, **self.sums.summary(self.config.global_batch_size), **facts}
        if self.status is None or self.metrics is None or self.view is None:
            return
        values["peak_memory_gib"] = peak_memory_gib()
        self.metrics.write(values)
        self.view.show(values)
        self.status.refresh(step=step, samples_per_second=values["samples_per_second"])

    def _account_for_dropped(self, step: int) -> None:
        """Write down the samples that were replaced in a step; DataError when they are too many."""
        if self.world.any(bool(self.dropped)):
            parts = self.world.gather(self.dropped)
            records = [record for part in parts for record in part]
            samples = step * self.config.global_batch_size
            self.world.on_first(lambda: self._record(records, samples))
        self.dropped = []

    def _record(self, records: list[dict], samples: int) -> None:
        assert self.quarantine is not None
        self.quarantine.record(records, next_sample=samples)

    def saved(self, news: list[Saved]) -> None:
        """What became of saves."""
        for saved in news:
            if self.status is None:
                continue
            if saved.problem is None:
                self.status.write("running", last_checkpoint=saved.step)
            else:
                print(f"step {saved.step} was not saved because {saved.problem}", flush=True)

    def end(self, state: State) -> None:
        """The last status of this attempt."""
        if self.status is not None:
            self.status.write(state)

    def close(self) -> None:
        if self.metrics is not None and self.view is not None:
            self.metrics.close()
            self.view.close()
