"""The processes of a run: who this one is, and how all of them come to agree."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.errors import ConfigError, NodeUnfit, StorageError, UserError
from t2v.engine.config import EngineConfig

T = TypeVar("T")
# The last collectives are remembered, and when a device began each.
RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_ENABLE_TIMING": "1"}


@dataclass(frozen=True)
class World:
    """This process among its peers; by default it has none.

    `control` carries small agreements between steps, `storage` those of checkpoints; both are gloo
    groups on the CPU with a deadline, so that neither ever waits behind the GPU's collectives.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    control: dist.ProcessGroup | None = None
    storage: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=group or self.control)
        return values

    def total(self, values: Tensor) -> Tensor:
        """Sum over ranks of a small CPU tensor."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self.control)
        return values

    def any(self, flag: bool) -> bool:
        """Whether any rank says so; all ranks get the same answer."""
        return bool(self.total(torch.tensor(int(flag))) > 0)

    def on_all(self, function: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
        """What `function` returned on every rank; where one rank fails, all ranks raise."""
        value, error = None, None
        try:
            value = function()
        except UserError as failure:
            error = failure
        except OSError as failure:
            error = storage_error(failure)
        except Exception as failure:
            # A bug: its own rank shows the traceback, the others say where it was.
            self.gather((None, RuntimeError(f"rank {self.rank}: {failure!r}")), group)
            raise
        outcomes = self.gather((value, error), group)
        for rank, (_, failure) in enumerate(outcomes):
            if failure is not None:
                failure.rank = rank
                raise failure
        return [value for value, _ in outcomes]

    def together(self, function: Callable[[], T]) -> T:
        """What `function` returned here; where it fails on one rank, all ranks raise. Costs one
        small sum where none fails."""
        value, error = None, None
        try:
            value = function()
        except Exception as failure:
            error = failure
        if not self.any(error is not None):
            return cast(T, value)

        def fail() -> None:
            if error is not None:
                raise error

        self.on_all(fail)
        raise AssertionError("one rank has failed")

    def on_first(self, function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
        """What `function` returned on rank 0, the only one to call it; its error is everyone's."""
        outcomes = self.on_all(lambda: function() if self.is_first else None, group)
        return cast(T, outcomes[0])


ALONE = World(torch.device("cpu"))


def storage_error(failure: OSError) -> StorageError:
    """An operating system's refusal in our words."""
    place = failure.filename or "storage"
    reason = failure.strerror or str(failure)
    return StorageError(f"{place}: cannot be used because {reason.lower()}; check disk and rights.")


@contextlib.contextmanager
def join_world(config: EngineConfig) -> Iterator[World]:
    """The world as `torchrun`, `accelerate launch` or no launcher at all tells it by environment.

    One process alone needs no environment; `single` needs no process group either.
    """
    rank, world_size = _from_environment("RANK", 0), _from_environment("WORLD_SIZE", 1)
    if rank >= max(world_size, 1):
        raise ConfigError(
            f"RANK: {rank} is wrong because WORLD_SIZE is {world_size}; start with torchrun."
        )
    if config.kind == "single" and world_size > 1:
        raise ConfigError(
            f"engine.kind: 'single' is wrong because WORLD_SIZE is {world_size}; "
            "use 'fsdp', or start one process."
        )
    device = torch.device("cpu")
    if _from_environment("T2V_GPUS", 0) and not torch.cuda.is_available():
        raise NodeUnfit(
            "T2V_GPUS: this job was promised GPUs, and torch sees none here; see `nvidia-smi` and "
            "the image's NVIDIA_VISIBLE_DEVICES. It does not compute on the CPU instead."
        )
    if torch.cuda.is_available():
        device = _cuda_device(_from_environment("LOCAL_RANK", 0))
        torch.cuda.set_device(device)
    if config.kind == "single":
        yield World(device)
        return
    deadline = timedelta(seconds=config.collective_timeout_seconds)
    _start_process_group(device, rank, world_size, deadline)
    try:
        yield World(device, rank, world_size, _gloo_group(deadline), _gloo_group(deadline))
    finally:
        dist.destroy_process_group()


def _cuda_device(local_rank: int) -> torch.device:
    """This process's GPU; ConfigError where the host has fewer."""
    count = torch.cuda.device_count()
    if local_rank >= count:
        failure = ConfigError(
            f"LOCAL_RANK: {local_rank} is wrong because {count} GPUs are visible on this host; "
            "start one process per GPU (--nproc-per-node), or see CUDA_VISIBLE_DEVICES."
        )
        failure.rank = _from_environment("RANK", 0)  # those before it have one
        raise failure
    return torch.device("cuda", local_rank)


def _gloo_group(deadline: timedelta) -> dist.ProcessGroup:
    """A group of all ranks, apart from every other."""
    group = dist.new_group(backend="gloo", timeout=deadline)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _start_process_group(
    device: torch.device, rank: int, world_size: int, deadline: timedelta
) -> None:
    # What a hang is found out by (t2v/attempt/collectives.py).
    for name, value in RECORDER.items():
        os.environ.setdefault(name, value)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    device_id = device if device.type == "cuda" else None
    if world_size == 1:
        store = dist.HashStore()
        dist.init_process_group(
            backend, store=store, rank=0, world_size=1, timeout=deadline, device_id=device_id
        )
        return
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ConfigError(
                f"{name}: missing from the environment, where WORLD_SIZE is {world_size}; "
                "start with torchrun."
            )
    try:
        dist.init_process_group(
            backend, rank=rank, world_size=world_size, timeout=deadline, device_id=device_id
        )
    except dist.DistError as failure:
        raise StorageError(
            f"MASTER_ADDR {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: the ranks did "
            f"not meet because {failure}; check that all {world_size} started."
        ) from None


def _from_environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"{name}: {text!r} is wrong because it is no whole number; unset it.")
    return int(text)
