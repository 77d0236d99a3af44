"""An engine whose parameters, gradients and optimizer are torch's own, whole or in shards."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from t2v.engine.compute import autocast, squared_norms
from t2v.engine.config import EngineConfig
from t2v.engine.optimizer import (
    MOMENTS,
    Groups,
    OptimizerConfig,
    build_optimizer,
    moments_of,
    parameter_groups,
    set_rates,
    start_moments,
)
from t2v.engine.place import Place
from t2v.engine.world import World
from t2v.network.network import Network


class NativeEngine:
    """Clips and steps on the parts that `part_of` cuts from parameters and from their gradients.

    `sum_over_parts` adds over the ranks that hold the other parts; `exchange` is told before each
    backward pass whether it is a step's last; `let_go` frees gathered weights. By default parts
    are whole parameters.
    """

    def __init__(
        self,
        name: str,
        model: Network,
        config: EngineConfig,
        optimizer: OptimizerConfig,
        world: World,
        *,
        groups: Groups,
        places: dict[str, Place],
        part_of: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        sum_over_parts: Callable[[Tensor], Tensor] = lambda values: values,
        exchange: Callable[[bool], None] = lambda final: None,
        let_go: Callable[[], None] = lambda: None,
    ) -> None:
        self.name, self.model, self.world = name, model, world
        self._parameters = dict(model.named_parameters())
        self._config, self._groups = config, groups
        self._max_grad_norm = optimizer.max_grad_norm
        self._places = places
        self._part_of, self._sum_over_parts = part_of, sum_over_parts
        self._exchange, self._let_go = exchange, let_go
        # The optimizer's own view of each part, in the same memory.
        self._parts = {name: nn.Parameter(part) for name, part in self.parameters().items()}
        members = parameter_groups(optimizer, groups, self._parts, places)
        self._optimizer = build_optimizer(optimizer, members, sum_over_parts)
        for group in members:
            start_moments(self._optimizer, group["params"], moments_of(group))
        self._updates = 0

    def autocast(self) -> AbstractContextManager:
        return autocast(self._config, self.world.device)

    def backward(self, loss: Tensor, *, final: bool) -> None:
        self._exchange(final)
        loss.backward()

    def gradient_norm(self) -> Tensor:
        for name, parameter in self._parameters.items():
            # Every parameter of our model gets a gradient in every backward pass.
            assert parameter.grad is not None
            self._parts[name].grad = self._part_of(parameter.grad)
        return self._sum_over_parts(squared_norms(self._gradients()).sum()).sqrt()

    def update(self, rates: dict[str, float], grad_norm: float) -> None:
        shrink = self._max_grad_norm / max(grad_norm, 1e-12)
        if shrink < 1:
            torch._foreach_mul_(self._gradients(), shrink)
        set_rates(self._optimizer, rates)
        self._optimizer.step()
        self._updates += 1
        self.forget_gradients()

    def forget_gradients(self) -> None:
        for parameter in (*self._parts.values(), *self._parameters.values()):
            parameter.grad = None

    def parameters(self) -> dict[str, Tensor]:
        return {n: self._part_of(p.detach()) for n, p in self._parameters.items()}

    def moments(self) -> dict[str, Tensor]:
        return {
            f"{moment}.{name}": self._optimizer.state[part][moment]
            for moment in MOMENTS
            for name, part in self._parts.items()
            if moment in self._optimizer.state[part]
        }

    def places(self) -> dict[str, Place]:
        return self._places

    def refresh(self) -> None:
        self._let_go()

    @property
    def updates(self) -> int:
        return self._updates

    @updates.setter
    def updates(self, count: int) -> None:
        self._updates = count
        for group in self._optimizer.param_groups:
            for part in group["params"]:
                own = max(count - self._groups.rest_updates(group["rate"]), 0)
                self._optimizer.state[part]["step"].fill_(own)

    def _gradients(self) -> list[Tensor]:
        return [part.grad for part in self._parts.values() if part.grad is not None]
