"""Initial values of a split model, equal to those of a whole one."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode


class WholeInit(TorchDispatchMode):
    """Lets `init_weights` give a sharded model the very values an unsharded one gets.

    Where values are drawn or copied in, the parameter is made whole, one at a time, and each rank
    keeps its slice; no rank talks to another.
    """

    FILLS = (
        torch.ops.aten.uniform_.default,
        torch.ops.aten.normal_.default,
        torch.ops.aten.copy_.default,
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self.FILLS or not isinstance(args[0], DTensor):
            return func(*args, **kwargs)
        target, *rest = args
        whole = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        func(whole, *rest, **kwargs)
        mesh, placements = target.device_mesh, target.placements
        mine = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        local(target).copy_(local(mine))
        return target


def local(tensor: DTensor) -> Tensor:
    """This rank's slice, without a gradient and without a copy."""
    with torch.no_grad():
        return tensor.to_local()
