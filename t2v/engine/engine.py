"""The seam between the training loop and the way a model is split over ranks."""

from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from t2v.engine.config import EngineConfig
from t2v.engine.optimizer import Groups, OptimizerConfig
from t2v.engine.place import Place
from t2v.engine.world import World
from t2v.network.network import Network


class Engine(Protocol):
    """A model, its gradients and its optimizer, each split as the engine likes.

    A *part* is what this rank holds of a named tensor: a plain fp32 tensor of one range of its
    flattened elements, the same for the parameter, its gradient, its moments and its average.
    Whatever works element by element works on parts; `places` tells a checkpoint where they lie.
    """

    name: str
    world: World
    model: Network

    def autocast(self) -> AbstractContextManager:
        """The precision of forward passes."""

    def backward(self, loss: Tensor, *, final: bool) -> None:
        """Add gradients of one micro-batch; ranks exchange them at the final one of a step."""

    def gradient_norm(self) -> Tensor:
        """Norm of the gradient over all parameters and ranks, after the final micro-batch."""

    def update(self, rates: dict[str, float], grad_norm: float) -> None:
        """Clip by a known norm, step with a rate for each group, forget the gradients."""

    def forget_gradients(self) -> None:
        """Drop this step's gradients without a step."""

    def refresh(self) -> None:
        """Let go of what forward passes gathered or copied of the weights: to be called before and
        after `parameters` are changed in place, and after forward passes without a backward."""

    def parameters(self) -> dict[str, Tensor]:
        """This rank's part of every parameter; memory is shared."""

    def moments(self) -> dict[str, Tensor]:
        """This rank's part of every optimizer tensor, `exp_avg.NAME` and `exp_avg_sq.NAME`."""

    def places(self) -> dict[str, Place]:
        """Where this rank's part of every parameter lies."""

    @property
    def updates(self) -> int:
        """Optimizer steps taken; a skipped step is none."""

    @updates.setter
    def updates(self, count: int) -> None: ...


def build_engine(
    model: Network,
    config: EngineConfig,
    optimizer: OptimizerConfig,
    world: World,
    *,
    groups: Groups,
    seed: int,
) -> Engine:
    """The engine of a kind around a model that is still on the meta device; no other is imported,
    for what they build on takes seconds. Initial values come from the seed."""
    match config.kind:
        case "single":
            from t2v.engine.single import single_engine

            return single_engine(model, config, optimizer, world, groups=groups, seed=seed)
        case "fsdp":
            from t2v.engine.fsdp import fsdp_engine

            return fsdp_engine(model, config, optimizer, world, groups=groups, seed=seed)
        case "zero":
            from t2v.engine.zero import ZeroEngine

            return ZeroEngine(model, config, optimizer, world, groups=groups, seed=seed)
