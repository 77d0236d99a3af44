"""How batches reach a device, and how far a host runs ahead of it; on a CPU both are nothing."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from data_pipeline.feeding.loader import Batch


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches on a device, each copied on a stream of its own while the one before is used."""
    if device.type != "cuda":
        yield from batches
        return
    stream, coming = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(stream):
            moved = batch.to(device)
            copied = stream.record_event()
        if coming is not None:
            yield _received(*coming)
        coming = moved, copied
    if coming is not None:
        yield _received(*coming)


def _received(batch: Batch, copied: torch.Event) -> Batch:
    """A batch whose copy the current stream waits for, and whose memory it keeps."""
    current = torch.cuda.current_stream()
    current.wait_event(copied)
    for tensor in batch.tensors.values():
        tensor.record_stream(current)
    return batch


def to_host(values: Tensor) -> Tensor:
    """Values on the host, once the device has computed them; a CPU's as they are."""
    return values.cpu()


class Pace:
    """Keeps the host one piece of work ahead of its device, and no more: a deadline then tells of
    a piece of work, and a hang is seen where it is."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._last: torch.Event | None = None

    def wait(self) -> None:
        """Called after each piece was handed over: until the one before it is done."""
        if self.device.type != "cuda":
            return
        if self._last is not None:
            self._last.synchronize()
        self._last = torch.cuda.current_stream(self.device).record_event()
