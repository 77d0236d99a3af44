"""What training changes: the named tensors and counters that a checkpoint holds, and no others."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from t2v.checkpoint.compatibility import WEIGHTS, average_prefix, kinds_of, refuse_differences
from t2v.checkpoint.manifest import Manifest
from t2v.checkpoint.tensor_files import Slice, read_slices, tensor_kinds
from t2v.engine.engine import Engine
from t2v.engine.place import Place
from t2v.train.ema import Ema
from t2v.train.part_weights import PartWeights


@dataclass
class TrainState:
    """A run after `step` steps, which have read `samples` samples; the next reads `batch_size`.

    Besides the `ema` it keeps power-function averages, by their relative `lengths`.
    """

    engine: Engine
    ema: Ema
    batch_size: int
    step: int = 0
    samples: int = 0
    skips_in_a_row: int = 0
    lengths: dict[float, Ema] = field(default_factory=dict)
    part_weights: PartWeights = field(default_factory=PartWeights)

    def update(self, rates: dict[str, float], grad_norm: float, losses: list[float]) -> None:
        """One optimizer step; `losses` are this rank's mean of each part."""
        self.engine.update(rates, grad_norm)
        if self.part_weights.learned:
            world = self.engine.world
            means = world.total(torch.tensor(losses, dtype=torch.float64)) / world.world_size
            self.part_weights.update(means, self.engine.updates)
        for average in (self.ema, *self.lengths.values()):
            average.update(self.engine.updates)
        self._count()
        self.skips_in_a_row = 0

    def skip(self) -> None:
        """A step without a finite gradient changes no tensor; the sequence of samples moves on."""
        self.engine.forget_gradients()
        self._count()
        self.skips_in_a_row += 1

    def _count(self) -> None:
        self.step += 1
        self.samples += self.batch_size

    def restart_averages(self) -> None:
        """Make every average its parameter's present value."""
        for average in (self.ema, *self.lengths.values()):
            average.restart()

    def slices(self) -> dict[str, Slice]:
        """This rank's weights, averages and moments by name; memory is shared."""
        places, parts = self.engine.places(), self.engine.parameters()
        named = {WEIGHTS["raw"] + name: Slice(part, places[name]) for name, part in parts.items()}
        averages = {average_prefix(length): kept for length, kept in self.lengths.items()}
        for prefix, average in ({WEIGHTS["ema"]: self.ema} | averages).items():
            for name, part in average.averages.items():
                named[prefix + name] = Slice(part, places[name])
        for key, part in self.engine.moments().items():
            _, name = key.split(".", 1)
            named[f"optimizer.{key}"] = Slice(part, places[name])
        if self.part_weights.learned:
            means, first = self.part_weights.means, self.engine.world.is_first
            named["loss.means"] = Slice(means, Place(tuple(means.shape), 0, kept=first))
        return named

    def restore(self, folder: Path, manifest: Manifest) -> None:
        """Become what a checkpoint holds; its tensors must be exactly ours."""
        slices = self.slices()

        def read() -> None:
            refuse_differences(folder, tensor_kinds(folder), kinds_of(slices))
            read_slices(folder, slices)

        self.engine.world.on_all(read, self.engine.world.storage)
        self.engine.refresh()
        self.engine.updates = manifest.updates
        self.step, self.samples = manifest.step, manifest.samples
