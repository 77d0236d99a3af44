"""What an engine asks of a network."""

from abc import ABC, abstractmethod

from torch import nn


class Network(nn.Module, ABC):
    """A network that can be built on the meta device, split over ranks, and only then filled.

    Engines wrap, gather, recompute and compile its `blocks` one by one, and the rest together.
    A block whose `forward` is too varied to be compiled names methods that are not in `programs`.
    Modules that attend do so in their `attention_dtype`, or in that of their values if it is None.
    """

    blocks: nn.ModuleList

    @abstractmethod
    def init_weights(self, seed: int = 0) -> None:
        """Set every parameter, in a fixed order, from one seed."""
