"""Floating-point operations of a network, counted without computing."""

from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from t2v.network.network import Network


def flops_of(network: Network, inputs: dict[str, Any]) -> int:
    """Operations of a forward pass on the meta device, where network and inputs lie; a
    multiplication and an addition count as two."""
    with FlopCounterMode(display=False) as counter:
        network(**inputs)
    return counter.get_total_flops()
