"""What training changes: the named tensors and counters that a checkpoint holds, and no others."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from data_pipeline.errors import NumericError
from t2v.engine.engine import Engine
from t2v.train.contract import WEIGHTS, kinds_of, refuse_differences
from t2v.train.ema import Ema
from t2v.train.manifest import Manifest
from t2v.train.optim import squared_norms
from t2v.train.tensor_files import read_tensors, tensor_kinds


@dataclass
class TrainState:
    """A run after `step` steps."""

    engine: Engine
    ema: Ema
    step: int = 0
    skips_in_a_row: int = 0

    def update(self, rate: float, grad_norm: float) -> None:
        """One optimizer step."""
        self.engine.update(rate, grad_norm)
        self.ema.update(self.engine.updates)
        self.step += 1
        self.skips_in_a_row = 0

    def skip(self) -> None:
        """A step without a finite gradient changes no tensor; the sequence of samples moves on."""
        self.engine.forget_gradients()
        self.step += 1
        self.skips_in_a_row += 1

    def refuse_non_finite(self) -> None:
        """NumericError where a weight is not finite; such a state must never be kept."""
        norms = squared_norms(list(self.engine.parameters().values()))
        if self.engine.world.any(not bool(norms.isfinite().all())):
            raise NumericError(
                f"weights: not finite after step {self.step}, so they are not saved; resume from "
                "the last checkpoint with a lower optimizer.learning_rate."
            )

    def tensors(self) -> dict[str, Tensor]:
        """Weights, averages and moments by name, each as a whole; memory is shared."""
        engine = self.engine
        named = {}
        for name, part in engine.parameters().items():
            named[WEIGHTS["raw"] + name] = engine.whole(name, part)
        for name, part in self.ema.averages.items():
            named[WEIGHTS["ema"] + name] = engine.whole(name, part)
        for key, part in engine.moments().items():
            _, name = key.split(".", 1)
            named[f"optimizer.{key}"] = engine.whole(name, part)
        return named

    def restore(self, folder: Path, manifest: Manifest) -> None:
        """Become what a checkpoint holds; its tensors must be exactly ours."""
        tensors = self.tensors()
        refuse_differences(folder, tensor_kinds(folder), kinds_of(tensors))
        read_tensors(folder, tensors, self.engine.world)
        self.engine.updates = manifest.updates
        self.step = manifest.step
