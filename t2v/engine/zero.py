"""DeepSpeed ZeRO: moments (stage 1), gradients (2) and weights (3) split over all ranks.

DeepSpeed exchanges gradients, runs the optimizer on its partitions and hands weights round. Rates,
clipping and what a checkpoint holds are ours, as with every engine.
"""

import contextlib
import importlib
import logging
import os
import warnings
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from t2v.engine.compute import (
    autocast,
    prepare_blocks,
    set_matmul_precision,
    squared_norms,
)
from t2v.engine.config import BUCKET_ELEMENTS, EngineConfig
from t2v.engine.optimizer import (
    BASE,
    MOMENTS,
    NEW,
    Groups,
    OptimizerConfig,
    build_optimizer,
    parameter_groups,
    set_rates,
    start_moments,
)
from t2v.engine.place import Place
from t2v.engine.whole_init import WholeInit
from t2v.engine.world import World
from t2v.engine.zero_parts import partitions_of_stage_3, partitions_of_stages_1_and_2
from t2v.network.network import Network


class ZeroEngine:
    """DeepSpeed's ZeRO optimizer around torch's AdamW."""

    name = "zero"

    def __init__(
        self,
        model: Network,
        config: EngineConfig,
        optimizer: OptimizerConfig,
        world: World,
        *,
        groups: Groups,
        seed: int,
    ) -> None:
        set_matmul_precision(config)
        self.world, self.model = world, model
        self._config, self._groups = config, groups
        self._max_grad_norm = optimizer.max_grad_norm
        deepspeed = import_quietly(world)
        prepare_blocks(model.blocks, config)
        settings = deepspeed_settings(config, model, world)
        whole = {name: Place(tuple(p.shape), 0) for name, p in model.named_parameters()}
        if config.zero_stage == 3:
            partition_from_the_start(deepspeed, model, world, settings, seed=seed)
        else:
            model.to_empty(device=world.device)
            model.init_weights(seed)
        members = parameter_groups(optimizer, groups, dict(model.named_parameters()), whole)
        self._adamw = build_optimizer(optimizer, members, lambda values: values)
        # DeepSpeed puts its partitions in place of the parameters of each group.
        self._rates = [group["rate"] for group in members]
        with silence():
            self._deepspeed, *_ = deepspeed.initialize(
                model=model, optimizer=self._adamw, config=settings, dist_init_required=False
            )
        self._zero = self._deepspeed.optimizer
        self._zero.clip_grad = 0.0
        find = {3: partitions_of_stage_3}.get(config.zero_stage, partitions_of_stages_1_and_2)
        self._partitions, self._fragments = find(self._zero, model, world)
        for partition in self._partitions:  # stage 3 steps them one by one
            start_moments(self._adamw, [partition])
        self._updates = 0
        self._coalesced: ExitStack | None = None

    def autocast(self) -> AbstractContextManager:
        return autocast(self._config, self.world.device)

    def backward(self, loss: Tensor, *, final: bool) -> None:
        if not final and self._coalesced is None:
            # Gradients of a step's micro-batches add up on each rank and travel once.
            self._coalesced = ExitStack()
            self._coalesced.enter_context(self._deepspeed.coalesce_grad_reduction())
        # The model is called without DeepSpeed's wrapper, which would do this before a forward.
        self._zero.clear_backward_seen_flag()
        self._deepspeed.backward(loss, scale_wrt_gas=False)
        if final and self._coalesced is not None:
            self._coalesced.close()
            self._coalesced = None

    def gradient_norm(self) -> Tensor:
        gradients = self._gradients()
        total = torch.zeros((), device=self.world.device)
        if gradients:
            total += squared_norms(gradients).sum().to(self.world.device)
        dist.all_reduce(total)
        return total.sqrt()

    def update(self, rates: dict[str, float], grad_norm: float) -> None:
        shrink = min(self._max_grad_norm / max(grad_norm, 1e-12), 1.0)
        torch._foreach_mul_(self._gradients(), shrink)
        set_rates(self._adamw, rates)
        self._zero.step()
        self._zero.zero_grad()
        self._updates += 1

    def forget_gradients(self) -> None:
        # A step at rates of 0 moves nothing, whatever the gradients are, and drops them.
        set_rates(self._adamw, {BASE: 0.0, NEW: 0.0})
        self._zero.step()
        self._zero.zero_grad()

    def parameters(self) -> dict[str, Tensor]:
        return {name: fragment.of(self._partitions) for name, fragment in self._fragments.items()}

    def moments(self) -> dict[str, Tensor]:
        states = [self._adamw.state[partition] for partition in self._partitions]
        return {
            f"{moment}.{name}": fragment.of([state[moment] for state in states])
            for moment in MOMENTS
            for name, fragment in self._fragments.items()
        }

    def places(self) -> dict[str, Place]:
        return {name: fragment.place for name, fragment in self._fragments.items()}

    def refresh(self) -> None:
        if self._config.zero_stage < 3:
            self._zero.update_lp_params()
        else:
            renew_split_weights(self._zero, self._partitions)

    @property
    def updates(self) -> int:
        return self._updates

    @updates.setter
    def updates(self, count: int) -> None:
        self._updates = count
        for partition, rate in zip(self._partitions, self._rates, strict=True):
            own = max(count - self._groups.rest_updates(rate), 0)
            self._adamw.state[partition]["step"].fill_(own)

    def _gradients(self) -> list[Tensor]:
        return exchanged(self._zero, self._partitions, self._config.offload_optimizer)


def exchanged(zero: Any, partitions: list[Tensor], offloaded: bool) -> list[Tensor]:
    """This rank's part of the exchanged gradients, padding left out where it may hold junk."""
    if offloaded:
        return [p.grad for p in partitions if p.grad is not None]
    groups = zero.averaged_gradients.values()
    return [gradient for group in groups for gradient in group if gradient.numel()]


def renew_split_weights(zero: Any, partitions: list[Tensor]) -> None:
    """Stage 3: what the model computes with is a copy of the fp32 parts; make it anew."""
    for number, partition in enumerate(partitions):
        zero.fp16_partitioned_groups_flat[number].data.copy_(partition.detach())
    persistent = zero.persistent_parameters
    if persistent:
        # These stay gathered between steps: give them up and gather them anew.
        persistent[0].partition(persistent, has_been_updated=False)
        persistent[0].all_gather(persistent)


def deepspeed_settings(config: EngineConfig, model: Network, world: World) -> dict[str, Any]:
    """DeepSpeed's configuration of a recipe's engine."""
    count = sum(parameter.numel() for parameter in model.parameters())
    bucket = min(BUCKET_ELEMENTS, count)
    on_gpu = world.device.type == "cuda"
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": 2 * bucket,
        "stage3_prefetch_bucket_size": min(bucket, largest_block(model)),
        # Blocks are gathered as they are needed, and not kept for the backward pass.
        "stage3_max_live_parameters": 2 * largest_block(model),
        "stage3_max_reuse_distance": 0,
        "overlap_comm": on_gpu,
        # Stage 3 would put a linear layer of its own in place of torch's, for the whole process.
        "memory_efficient_linear": False,
    }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    return {
        "train_micro_batch_size_per_gpu": 1,  # only its timers ask
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


def largest_block(model: Network) -> int:
    """Parameters of the largest block."""
    return max(sum(p.numel() for p in block.parameters()) for block in model.blocks)


def partition_from_the_start(
    deepspeed: Any, model: Network, world: World, settings: dict[str, Any], *, seed: int
) -> None:
    """Give a model that is still on the meta device initial values without ever being whole.

    Values are drawn into shards first; then one parameter at a time is put together and becomes
    DeepSpeed's.
    """
    mesh = init_device_mesh(world.device.type, (world.world_size,))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            rows = -(-parameter.shape[0] // world.world_size)
            first = min(world.rank * rows, parameter.shape[0])
            mine = torch.empty(parameter[first : first + rows].shape, device=world.device)
            shard = DTensor.from_local(
                mine,
                mesh,
                [Shard(0)],
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
            module.register_parameter(name, nn.Parameter(shard))
    with WholeInit():
        model.init_weights(seed)
    with silence():
        for module in model.modules():
            owner = nn.Module()
            for name, parameter in list(module.named_parameters(recurse=False)):
                assert isinstance(parameter, DTensor)
                whole = nn.Parameter(parameter.detach().full_tensor())
                module.register_parameter(name, whole)
                owner.register_parameter("parameter", whole)
                deepspeed.zero.Init(module=owner, config_dict_or_path=settings, dtype=torch.float32)


def import_quietly(world: World) -> Any:
    """DeepSpeed, which is slow to import and talks much; nothing of it is compiled."""
    # What a launcher would have set; without one there is a single process.
    os.environ.setdefault("LOCAL_RANK", str(world.device.index or 0))
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    warnings.filterwarnings("ignore", ".*all_gather_into_tensor. is deprecated")
    warnings.filterwarnings("ignore", ".*reduce_scatter_tensor. is deprecated")
    with silence():
        deepspeed = importlib.import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # A C++ kernel for reductions between processes of one machine; gloo does it as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextlib.contextmanager
def silence() -> Any:
    """Nothing on stdout or stderr but errors."""
    with contextlib.redirect_stdout(None), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
