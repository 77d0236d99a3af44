"""The exponential moving average of the weights, kept in fp32 where the weights are."""

import torch
from torch import Tensor


class Ema:
    """Averages of named parts of parameters; an average is split exactly as its parameter is.

    A weight counts half after `half_life_steps` updates. Values from before the first update do not
    count at all: update t moves the average by (1 - d) / (1 - d^t), with decay d per update.
    """

    def __init__(self, parameters: dict[str, Tensor], half_life_steps: float) -> None:
        self.decay = 0.5 ** (1 / half_life_steps)
        self.parameters = parameters
        self.averages = {name: part.detach().clone() for name, part in parameters.items()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the parameters as they are after update number `updates`, counted from 1."""
        weight = (1 - self.decay) / (1 - self.decay**updates)
        torch._foreach_lerp_(list(self.averages.values()), list(self.parameters.values()), weight)

    def restart(self) -> None:
        """Make every average its parameter's present value."""
        torch._foreach_copy_(list(self.averages.values()), list(self.parameters.values()))
