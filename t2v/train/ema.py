"""Moving averages of the weights, kept in fp32 where the weights are."""

from collections.abc import Callable

import torch
from torch import Tensor

from t2v.checkpoint.power_average import power_of

Newest = Callable[[int], float]  # update, from 1 -> what its weights count in the average


def half_life(steps: float) -> Newest:
    """Exponential: a weight counts half after as many updates. Values from before the first update
    do not count at all: with decay d per update, update t counts `(1 - d) / (1 - d^t)`."""
    decay = 0.5 ** (1 / steps)
    return lambda update: (1 - decay) / (1 - decay**update)


def power_function(length: float) -> Newest:
    """Of a relative length: update t counts `1 - (1 - 1 / t)^(gamma + 1)` (edm2, section 3.1)."""
    exponent = power_of(length) + 1
    return lambda update: 1 - (1 - 1 / update) ** exponent


class Ema:
    """Averages of named parts of parameters; an average is split exactly as its parameter is."""

    def __init__(self, parameters: dict[str, Tensor], newest: Newest) -> None:
        self.parameters, self.newest = parameters, newest
        self.averages = {name: part.detach().clone() for name, part in parameters.items()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the parameters as they are after update number `updates`, counted from 1."""
        torch._foreach_lerp_(
            list(self.averages.values()), list(self.parameters.values()), self.newest(updates)
        )

    def restart(self) -> None:
        """Make every average its parameter's present value."""
        torch._foreach_copy_(list(self.averages.values()), list(self.parameters.values()))
