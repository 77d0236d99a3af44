"""Copies of tensors in host memory: what a checkpoint is written from while training goes on."""

import threading

import torch

from data_pipeline.errors import ConfigError
from data_pipeline.host_memory import available_memory
from t2v.checkpoint.tensor_files import Slice
from t2v.engine.faults import fault
from t2v.engine.world import World

GIB = 2**30


class HostCopy:
    """Copies of tensors in host memory that is used again; pinned where a GPU fills it."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def reserve(self, slices: dict[str, Slice]) -> None:
        """Claim the memory, and touch it: fresh pages cost more than the copy itself. ConfigError
        where the host has less."""
        kept = {name: piece for name, piece in slices.items() if piece.place.kept}
        new = {name: piece.part for name, piece in kept.items() if name not in self._buffers}
        needed = sum(part.numel() * part.itemsize for part in new.values())
        if needed > (left := available_memory()):
            raise ConfigError(
                f"checkpoint: is wrong because its copy takes {needed / GIB:.1f} GiB of this "
                f"rank's host memory, and {left / GIB:.1f} are left; split the model over more "
                "ranks, or give each more memory."
            )
        for name, part in new.items():
            pinned = part.device.type == "cuda"
            buffer = torch.zeros(part.shape, dtype=part.dtype, pin_memory=pinned)
            self._buffers[name] = buffer.fill_(1)

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


def gpus_of(slices: dict[str, Slice]) -> set[torch.device]:
    """The GPUs that hold parts of tensors."""
    devices = {piece.part.device for piece in slices.values()}
    return {device for device in devices if device.type == "cuda"}
