"""Clipping and the optimizer step on parts of parameters; shared by the engines that own theirs."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from t2v.train.optim import OptimizerConfig, build_optimizer, squared_norms

MOMENTS = ("exp_avg", "exp_avg_sq")


def gradient(parameter: nn.Parameter) -> Tensor:
    """A parameter's gradient; every parameter of our model gets one in every backward pass."""
    assert parameter.grad is not None
    return parameter.grad


class Update:
    """An optimizer over named parts; `sum_over_parts` adds over the ranks that hold the others."""

    def __init__(
        self,
        config: OptimizerConfig,
        parameters: dict[str, Tensor],
        sum_over_parts: Callable[[Tensor], Tensor],
    ) -> None:
        self.config = config
        self.parts = {name: nn.Parameter(part) for name, part in parameters.items()}
        self.gradients: list[Tensor] = []
        self.sum_over_parts = sum_over_parts
        self.optimizer = build_optimizer(config, list(self.parts.values()), sum_over_parts)

    def set_gradients(self, gradients: dict[str, Tensor]) -> None:
        """Hand over this step's gradients, one part for each parameter."""
        for name, part in self.parts.items():
            part.grad = gradients[name]
        self.gradients = [gradients[name] for name in self.parts]

    def gradient_norm(self) -> Tensor:
        """Norm over all parts on all ranks."""
        return self.sum_over_parts(squared_norms(self.gradients).sum()).sqrt()

    def step(self, learning_rate: float, grad_norm: float) -> None:
        """Clip, step, forget."""
        torch._foreach_mul_(
            self.gradients, min(self.config.max_grad_norm / max(grad_norm, 1e-12), 1.0)
        )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.forget_gradients()

    def forget_gradients(self) -> None:
        self.gradients = []
        self.optimizer.zero_grad(set_to_none=True)

    def moments(self) -> dict[str, Tensor]:
        """The optimizer's tensors by moment and parameter name."""
        return {
            f"{moment}.{name}": self.optimizer.state[part][moment]
            for moment in MOMENTS
            for name, part in self.parts.items()
        }

    @property
    def count(self) -> int:
        """Steps taken."""
        return int(next(iter(self.optimizer.state.values()))["step"])

    @count.setter
    def count(self, count: int) -> None:
        for state in self.optimizer.state.values():
            state["step"].fill_(count)
