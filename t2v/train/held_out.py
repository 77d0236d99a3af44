"""Held-out loss of each part in bins of noise: the same samples and noise at every measurement."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from data_pipeline.feeding.config import Source, text_shape
from data_pipeline.feeding.loader import collate
from data_pipeline.feeding.sample import Sample, SampleReader
from data_pipeline.strict import Strict
from t2v.engine.device import to_host
from t2v.engine.world import World
from t2v.methods.method import Method
from t2v.train.state import TrainState


class HeldOutConfig(Strict):
    """What is measured on samples that training never sees."""

    every_steps: int = Field(ge=1)
    samples: int = Field(default=64, ge=1, description="over all ranks, the same every time")
    bins: int = Field(default=8, ge=1, le=64, description="equal shares of the training noise")
    weights: Literal["ema", "raw"] = "ema"
    sources: list[Source] | None = Field(
        default=None, min_length=1, description="datasets; none: what data.held_out_share holds out"
    )


class HeldOut:
    """The held-out samples of a run; all ranks measure together and get the same answer.

    Sample s belongs to rank s modulo world size. Ranks with fewer samples repeat theirs, so that
    all take part in the same number of forward passes.
    """

    def __init__(
        self,
        settings: HeldOutConfig | None,
        method: Method,
        reader: SampleReader | None,
        world: World,
        *,
        seed: int,
        micro_batch_size: int,
        total_steps: int,
    ) -> None:
        self.settings, self.method, self.world = settings, method, world
        self.seed, self.micro_batch_size, self.total_steps = seed, micro_batch_size, total_steps
        self.reader = reader
        self.read: list[Sample] = []
        self.latest: tuple[int, float] | None = None
        if settings is not None:
            self.mine = list(range(world.rank, settings.samples, world.world_size)) or [0]

    def due(self, step: int) -> bool:
        """Whether a step is one to measure after."""
        if self.settings is None:
            return False
        return step % self.settings.every_steps == 0 or step == self.total_steps

    def loss_at(self, step: int) -> float | None:
        """What was measured after a step, if it was and is finite."""
        if self.latest is None or self.latest[0] != step or not math.isfinite(self.latest[1]):
            return None
        return self.latest[1]

    def measure(
        self, state: TrainState, *, tell: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """The line of metrics.jsonl on the present weights, which are left bit by bit as they were;
        `tell` is called after each pass.

        A part's mean over bins estimates its training loss, conditions never dropped.
        """
        started = time.perf_counter()
        settings, parts = self.settings, self.method.parts
        assert settings is not None
        if not self.read:
            self.world.on_all(self._read)
        weights = averaged_weights(state) if settings.weights == "ema" else nullcontext()
        with weights, torch.no_grad():
            table = self._errors(state, settings.samples, settings.bins, tell)
            state.engine.refresh()
        losses = self.world.total(table).mean(0)
        of_parts = losses.mean(1).tolist()
        self.latest = state.step, sum(of_parts)
        return {
            "step": state.step,
            "held_out_loss": sum(of_parts),
            **{f"held_out_{part}": loss for part, loss in zip(parts, of_parts, strict=True)},
            **{f"held_out_{p}_bins": row for p, row in zip(parts, losses.tolist(), strict=True)},
            "held_out_bin_axis": self.method.bin_axis,
            "held_out_bin_edges": self.method.bin_edges(settings.bins),
            "held_out_samples": settings.samples,
            "held_out_weights": settings.weights,
            "held_out_seconds": time.perf_counter() - started,
        }

    def _read(self) -> None:
        assert self.reader is not None
        self.read = [self.reader.read(number)[0] for number in self.mine]

    def _errors(
        self, state: TrainState, samples: int, bins: int, tell: Callable[[], None]
    ) -> Float[Tensor, "samples parts bins"]:
        """This rank's errors at their places, zeros elsewhere."""
        count = len(self.method.parts)
        table = torch.zeros(samples, count, bins, dtype=torch.float64)
        has_own = self.world.rank < samples
        for some in passes(
            len(self.mine), samples, self.world.world_size, bins, self.micro_batch_size
        ):
            samples_read = [self.read[row] for row, _ in some]
            batch = collate(samples_read, [], text_shape(self.method.conditioning))
            with state.engine.autocast():
                errors, places = self.method.held_out(
                    state.engine.model,
                    batch,
                    turns=[turn for _, turn in some],
                    bins=bins,
                    seed=self.seed,
                    device=self.world.device,
                )
            if has_own:
                numbers = batch.numbers.tolist()
                for number, of_parts, values in zip(
                    numbers, places, to_host(errors.double()), strict=True
                ):
                    table[number, range(count), of_parts] = values
            tell()
        return table


def passes(
    own: int, samples: int, world_size: int, bins: int, micro_batch_size: int
) -> list[list[tuple[int, int]]]:
    """(row of a rank's `own` samples, turn) of each forward pass; as many passes on every rank.

    Short of samples, a rank repeats its first: the same values to the same places. So does a last
    pass that would be smaller than the others, for which a block would be compiled anew.
    """
    most = -(-samples // world_size)
    rows = [row if row < own else 0 for row in range(most)]
    work = [(row, turn) for turn in range(bins) for row in rows]
    work += (work * micro_batch_size)[: -len(work) % micro_batch_size]
    return [
        work[first : first + micro_batch_size] for first in range(0, len(work), micro_batch_size)
    ]


@contextmanager
def averaged_weights(state: TrainState) -> Iterator[None]:
    """The averaged weights in place of the trained ones, which come back bit by bit."""
    swap(state)
    try:
        yield
    finally:
        state.engine.refresh()
        swap(state)


@torch.no_grad()
def swap(state: TrainState) -> None:
    """Trade parameters for their averages, tensor by tensor."""
    averages = state.ema.averages
    for name, part in state.engine.parameters().items():
        kept = part.clone()
        part.copy_(averages[name])
        averages[name].copy_(kept)
    state.engine.refresh()
