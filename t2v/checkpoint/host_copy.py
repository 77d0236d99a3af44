"""Copies of tensors in host memory: what a checkpoint is written from while training goes on."""

import os
import threading
from itertools import accumulate
from typing import Any

import torch

from data_pipeline.errors import ConfigError
from data_pipeline.host_memory import available_memory
from t2v.checkpoint.tensor_files import Slice
from t2v.engine.faults import fault
from t2v.engine.world import World

GIB = 2**30
ALIGNED = 64  # bytes; a tensor of any kind may begin there


class HostCopy:
    """Copies of tensors in host memory that is used again; pinned where a GPU fills it."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def reserve(self, slices: dict[str, Slice]) -> None:
        """Claim the memory in one piece, and touch it: fresh pages cost more than the copy itself.
        ConfigError where this rank's share of the host has less."""
        kept = {name: piece.part for name, piece in slices.items() if piece.place.kept}
        if kept.keys() == self._buffers.keys():
            return
        ends = list(accumulate(-(-part.nbytes // ALIGNED) * ALIGNED for part in kept.values()))
        needed = ends[-1] if ends else 0
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if needed > (left := available_memory() / ranks):
            raise ConfigError(
                f"checkpoint: is wrong because its copy takes {needed / GIB:.1f} GiB of this "
                f"rank's host memory, and {left / GIB:.1f} are left to each of {ranks} here; split "
                "the model over more ranks, or give each more memory."
            )
        flat = torch.ones(needed, dtype=torch.uint8)
        if gpus_of(slices):
            pin(flat)
        for (name, part), start in zip(kept.items(), [0, *ends], strict=False):
            piece = flat[start : start + part.nbytes]
            self._buffers[name] = piece.view(part.dtype).view(part.shape)

    def take(self, slices: dict[str, Slice]) -> dict[str, Slice]:
        """Those slices that this rank writes, as they are now; valid until the next call."""
        slices = {name: piece for name, piece in slices.items() if piece.place.kept}
        self.reserve(slices)
        # A stream of its own: on training's, the copy would wait for all that is queued there.
        streams = {device: torch.cuda.Stream(device) for device in gpus_of(slices)}
        for name, piece in slices.items():
            with torch.cuda.stream(streams.get(piece.part.device)):
                self._buffers[name].copy_(piece.part, non_blocking=True)
        for stream in streams.values():
            stream.synchronize()
        return {name: Slice(self._buffers[name], piece.place) for name, piece in slices.items()}

    def on_all(
        self, slices: dict[str, Slice], world: World, copied: threading.Event
    ) -> dict[str, Slice]:
        """What each rank writes, in memory of its own, by a thread beside training; once `copied`
        is set, the tensors are free to change."""
        mine: dict[str, Slice] = {}

        def copy() -> None:
            try:
                fault("checkpoint.copy")
                mine.update(self.take(slices))
            finally:
                copied.set()

        world.on_all(copy, world.storage)
        return mine


def pin(memory: torch.Tensor) -> None:
    """Let GPUs copy into memory directly. torch's own allocator would round it up to a power of
    two."""
    cudart: Any = torch.cuda.cudart()
    failed = cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    if int(failed):
        raise ConfigError(
            f"checkpoint: its copy of {memory.nbytes / GIB:.1f} GiB cannot be pinned (CUDA error "
            f"{int(failed)}); raise the limit of locked memory (ulimit -l)."
        )


def gpus_of(slices: dict[str, Slice]) -> set[torch.device]:
    """The GPUs that hold parts of tensors."""
    devices = {piece.part.device for piece in slices.values()}
    return {device for device in devices if device.type == "cuda"}
