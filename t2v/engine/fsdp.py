"""FSDP2: every rank holds a slice of each parameter, gathered block by block as it is needed."""

import warnings
from math import ceil, prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from data_pipeline.errors import ConfigError
from t2v.engine.compute import prepare_blocks, set_matmul_precision
from t2v.engine.config import EngineConfig
from t2v.engine.native import NativeEngine
from t2v.engine.optimizer import Groups, OptimizerConfig
from t2v.engine.place import Place
from t2v.engine.whole_init import WholeInit, local
from t2v.engine.world import World
from t2v.network.network import Network


def fsdp_engine(
    model: Network,
    config: EngineConfig,
    optimizer: OptimizerConfig,
    world: World,
    *,
    groups: Groups,
    seed: int,
) -> NativeEngine:
    """`fully_shard` around each block and around the rest; no rank ever holds the whole model.

    With `dp_replicate` groups of ranks, slices are of a group's, and groups hold the same (HSDP).
    """
    # Blocks return views of fresh tensors, and nothing writes into what a block returns.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    set_matmul_precision(config)
    mesh = build_mesh(world, config.dp_replicate)
    split = mesh if config.dp_replicate > 1 else mesh["dp_shard"]
    prepare_blocks(model.blocks, config)
    # Blocks are gathered in bf16 where they compute in it, save on a CPU, whose norms do not mix
    # precisions. The small rest stays fp32, and so do all inputs: a noise level or a frame rate
    # does not survive bf16.
    in_bf16 = config.precision == "bf16" and world.device.type == "cuda"
    gathered = torch.bfloat16 if in_bf16 else torch.float32
    policy = MixedPrecisionPolicy(
        param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in model.blocks:
        fully_shard(
            block,
            mesh=split,
            mp_policy=policy,
            reshard_after_forward=config.reshard_after_forward,
        )
    fully_shard(model, mesh=split, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    model.to_empty(device=world.device)
    with WholeInit():
        model.init_weights(seed)
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        # FSDP pads slices when they are first gathered, which moves them; have it done now.
        module.unshard()
        module.reshard()
    shards = mesh.get_group("dp_shard")

    def sum_over_shards(values: Tensor) -> Tensor:
        dist.all_reduce(values, group=shards)
        return values

    def exchange(final: bool) -> None:
        now = final or config.accumulate == "shards"
        # Where memory holds the whole model, it is gathered once a step: weights change only then.
        frees = final or config.reshard_after_forward
        for module in sharded:
            module.set_requires_gradient_sync(now, recurse=False)
            module.set_reshard_after_backward(frees, recurse=False)

    def let_go() -> None:
        for module in sharded:
            module.reshard()

    return NativeEngine(
        "fsdp",
        model,
        config,
        optimizer,
        world,
        groups=groups,
        places={
            name: rows_of(tuple(parameter.shape), mesh)
            for name, parameter in model.named_parameters()
        },
        part_of=slice_of,
        sum_over_parts=sum_over_shards,
        exchange=exchange,
        let_go=let_go,
    )


def build_mesh(world: World, replicas: int) -> DeviceMesh:
    """Ranks by (replica, shard); neighbours share a model, as they share a machine."""
    shards, rest = divmod(world.world_size, replicas)
    if rest:
        raise ConfigError(
            f"engine.dp_replicate: {replicas} is wrong because it does not divide "
            f"{world.world_size} ranks; use a divisor, or 1."
        )
    return init_device_mesh(
        world.device.type, (replicas, shards), mesh_dim_names=("dp_replicate", "dp_shard")
    )


def rows_of(shape: tuple[int, ...], mesh: DeviceMesh) -> Place:
    """The rows that FSDP2 gives to a shard: equal chunks, the last ones shorter or empty."""
    shard, shards = mesh.get_local_rank("dp_shard"), mesh.size(1)
    row = min(shard * ceil(shape[0] / shards), shape[0])
    return Place(shape, row * prod(shape[1:]), kept=mesh.get_local_rank("dp_replicate") == 0)


def slice_of(tensor: Tensor) -> Tensor:
    """This rank's rows of a parameter or of its gradient."""
    assert isinstance(tensor, DTensor)
    return local(tensor)
