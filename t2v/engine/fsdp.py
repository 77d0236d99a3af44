"""FSDP2: every rank holds a slice of each parameter, gathered block by block as it is needed."""

import warnings
from contextlib import AbstractContextManager
from math import ceil, prod
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from t2v.engine.compute import autocast, prepare_blocks, set_matmul_precision
from t2v.engine.place import Place
from t2v.engine.update import Update, gradient
from t2v.engine.world import World
from t2v.model.hpdm import HPDM

if TYPE_CHECKING:
    from t2v.config import RunConfig


class FsdpEngine:
    """`fully_shard` around each block and around the rest; no rank ever holds the whole model."""

    name = "fsdp"

    def __init__(self, model: HPDM, config: "RunConfig", world: World) -> None:
        # Blocks return views of fresh tensors, and nothing writes into what a block returns.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        set_matmul_precision(config.engine)
        self.config, self.world, self.model = config.engine, world, model
        mesh = init_device_mesh(
            world.device.type, (world.world_size,), mesh_dim_names=("dp_shard",)
        )
        self._shards = mesh.get_group("dp_shard")
        prepare_blocks(model.blocks, config.engine)
        # Blocks are gathered in bf16 where they compute in it, save on a CPU, whose norms do not
        # mix precisions. The small rest stays fp32, and so do all inputs: a noise level or a frame
        # rate does not survive bf16.
        in_bf16 = config.engine.precision == "bf16" and world.device.type == "cuda"
        gathered = torch.bfloat16 if in_bf16 else torch.float32
        policy = MixedPrecisionPolicy(
            param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for block in model.blocks:
            fully_shard(
                block,
                mesh=mesh,
                mp_policy=policy,
                reshard_after_forward=config.engine.reshard_after_forward,
            )
        fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
        model.to_empty(device=world.device)
        with WholeInit():
            model.init_weights(config.seed)
        self._sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._settle()
        self._update = Update(config.optimizer, self.parameters(), self._sum_over_shards)

    def autocast(self) -> AbstractContextManager:
        return autocast(self.config, self.world.device)

    def backward(self, loss: Tensor, *, final: bool) -> None:
        for module in self._sharded:
            module.set_requires_gradient_sync(final, recurse=False)
        loss.backward()

    def gradient_norm(self) -> Tensor:
        self._update.set_gradients(
            {name: local(gradient(parameter)) for name, parameter in self.model.named_parameters()}
        )
        return self._update.gradient_norm()

    def update(self, learning_rate: float, grad_norm: float) -> None:
        self._update.step(learning_rate, grad_norm)
        self.model.zero_grad(set_to_none=True)

    def forget_gradients(self) -> None:
        self._update.forget_gradients()
        self.model.zero_grad(set_to_none=True)

    def refresh(self) -> None:
        for module in self._sharded:
            module.reshard()

    def parameters(self) -> dict[str, Tensor]:
        return {name: local(parameter) for name, parameter in self.model.named_parameters()}

    def moments(self) -> dict[str, Tensor]:
        return self._update.moments()

    def places(self) -> dict[str, Place]:
        shards, shard = dist.get_world_size(self._shards), dist.get_rank(self._shards)
        return {
            name: rows_of(tuple(parameter.shape), shard, shards)
            for name, parameter in self.model.named_parameters()
        }

    @property
    def updates(self) -> int:
        return self._update.count

    @updates.setter
    def updates(self, count: int) -> None:
        self._update.count = count

    def _settle(self) -> None:
        """FSDP pads slices when they are first gathered, which moves them; have it done now."""
        for module in self._sharded:
            module.unshard()
            module.reshard()

    def _sum_over_shards(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, group=self._shards)
        return values


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


def rows_of(shape: tuple[int, ...], shard: int, shards: int) -> Place:
    """The rows that FSDP2 gives to a shard: equal chunks, the last ones shorter or empty."""
    row = min(shard * ceil(shape[0] / shards), shape[0])
    return Place(shape, row * prod(shape[1:]))


def local(tensor: Tensor) -> Tensor:
    """This rank's slice, without a gradient and without a copy."""
    assert isinstance(tensor, DTensor)
    with torch.no_grad():
        return tensor.to_local()
