"""One process holds everything."""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from torch import Tensor

from t2v.engine.compute import autocast, prepare_blocks, set_matmul_precision
from t2v.engine.place import Place
from t2v.engine.update import Update, gradient
from t2v.engine.world import World
from t2v.model.hpdm import HPDM

if TYPE_CHECKING:
    from t2v.config import RunConfig


class SingleEngine:
    """The plain way; every other engine trains the same numbers to rounding."""

    name = "single"

    def __init__(self, model: HPDM, config: "RunConfig", world: World) -> None:
        set_matmul_precision(config.engine)
        self.config, self.world = config.engine, world
        self.model = model.to_empty(device=world.device)
        self.model.init_weights(config.seed)
        prepare_blocks(self.model.blocks, config.engine)
        self._update = Update(config.optimizer, self.parameters(), lambda values: values)

    def autocast(self) -> AbstractContextManager:
        return autocast(self.config, self.world.device)

    def backward(self, loss: Tensor, *, final: bool) -> None:
        loss.backward()

    def gradient_norm(self) -> Tensor:
        self._update.set_gradients(
            {name: gradient(parameter) for name, parameter in self.model.named_parameters()}
        )
        return self._update.gradient_norm()

    def update(self, learning_rate: float, grad_norm: float) -> None:
        self._update.step(learning_rate, grad_norm)
        self.model.zero_grad(set_to_none=True)

    def forget_gradients(self) -> None:
        self._update.forget_gradients()
        self.model.zero_grad(set_to_none=True)

    def refresh(self) -> None:
        pass

    def parameters(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def moments(self) -> dict[str, Tensor]:
        return self._update.moments()

    def places(self) -> dict[str, Place]:
        return {name: Place(tuple(part.shape), 0) for name, part in self.parameters().items()}

    @property
    def updates(self) -> int:
        return self._update.count

    @updates.setter
    def updates(self, count: int) -> None:
        self._update.count = count
