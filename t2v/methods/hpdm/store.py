"""Arrays that sampling keeps: on the device, in main memory, or in a file; what lies outside the
device is fetched one batch ahead by a thread of its own."""

import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from data_pipeline.errors import StorageError

T = TypeVar("T")
Where = Literal["device", "host", "disk"]
Fetched = dict[Any, Tensor]
Box = tuple[slice, ...]  # of the leading axes; the others are whole


class InMemory:
    """In the memory of the device, or in main memory beside it."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, home: torch.device
    ) -> None:
        self.device = device
        self.pinned = home.type == "cpu" and device.type == "cuda"
        self.values = torch.zeros(shape, dtype=dtype, device=home, pin_memory=self.pinned)

    def read(self, boxes: list[Box]) -> Tensor:
        """Boxes of one shape, stacked, in fp32 on the device."""
        parts = [self.values[box] for box in boxes]
        if not self.pinned:
            return torch.stack(parts).float()
        staged = torch.empty((len(parts), *parts[0].shape), dtype=parts[0].dtype, pin_memory=True)
        torch.stack(parts, out=staged)
        return staged.to(self.device, non_blocking=True).float()

    def write(self, box: Box, values: Tensor) -> None:
        self.values[box] = values.to(self.values.device, self.values.dtype)

    def add(self, box: Box, values: Tensor) -> None:
        place = self.values[box]
        # Added in the precision of the values: sums of halves would drift.
        place.copy_(place.to(values.dtype) + values.to(place.device))


class OnDisk:
    """In a file without a name, which is gone when the process is.

    It is read by calls, not mapped: mapped pages would count as this process's memory.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, folder: Path
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        size = prod(shape) * dtype.itemsize
        try:
            self.file, name = tempfile.mkstemp(prefix="t2v-features-", dir=folder)
            weakref.finalize(self, os.close, self.file)
            os.unlink(name)
            os.posix_fallocate(self.file, 0, size)
        except OSError as failure:
            reason = failure.strerror or str(failure)
            raise StorageError(
                f"{folder}: cannot hold {size / 2**30:.1f} GiB of features because "
                f"{reason.lower()}; give --scratch another folder, or more --memory-gib."
            ) from None

    def read(self, boxes: list[Box]) -> Tensor:
        parts = torch.empty((len(boxes), *self._box_shape(boxes[0])), dtype=self.dtype)
        for part, box in zip(parts, boxes, strict=True):
            self._each_run(box, part, os.preadv)
        return parts.to(self.device).float()

    def write(self, box: Box, values: Tensor) -> None:
        self._each_run(box, values.to("cpu", self.dtype).contiguous(), os.pwritev)

    def add(self, box: Box, values: Tensor) -> None:
        self.write(box, self.read([box])[0] + values)

    def _box_shape(self, box: Box) -> tuple[int, ...]:
        sliced = zip(box, self.shape, strict=False)
        sides = [len(range(*part.indices(side))) for part, side in sliced]
        return (*sides, *self.shape[len(box) :])

    def _each_run(
        self, box: Box, values: Tensor, move: Callable[[int, list[Any], int], int]
    ) -> None:
        """Move each stretch of a box that lies in one piece in the file."""
        *outer, last = (
            range(*part.indices(side)) for part, side in zip(box, self.shape, strict=False)
        )
        strides = [prod(self.shape[axis + 1 :]) * self.dtype.itemsize for axis in range(len(box))]
        run = len(last) * strides[-1]
        content = values.reshape(-1).view(torch.uint8).numpy()
        for number, index in enumerate(product(*outer)):
            place = sum(i * stride for i, stride in zip((*index, last.start), strides, strict=True))
            done = 0
            while done < run:
                piece = content[number * run + done : (number + 1) * run]
                moved = move(self.file, [piece], place + done)
                if moved == 0:
                    raise StorageError("scratch file: ended early; check the disk.")
                done += moved


# An array of zeros at first, read and written by boxes.
Kept = InMemory | OnDisk


class Store:
    """Keeps arrays in three places, and moves those outside the device ahead of their use."""

    def __init__(self, device: torch.device, scratch: Path | None = None) -> None:
        self.device = device
        self.scratch = scratch or Path(tempfile.gettempdir())
        self._mover = ThreadPoolExecutor(1, thread_name_prefix="t2v-store")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._writing: Future | None = None

    def keep(self, shape: tuple[int, ...], dtype: torch.dtype, where: Where) -> Kept:
        """A new array of zeros."""
        if where == "disk":
            return OnDisk(shape, dtype, self.device, self.scratch)
        home = self.device if where == "device" else torch.device("cpu")
        return InMemory(shape, dtype, self.device, home)

    def fetched(self, loads: Iterable[Callable[[], Fetched]]) -> Iterator[Fetched]:
        """What each load returns, in order; the next one runs while the last one is in use."""
        waiting: Future | None = None
        for load in loads:
            coming = self._mover.submit(self._aside, load)
            if waiting is not None:
                yield self._received(waiting.result())
            waiting = coming
        if waiting is not None:
            yield self._received(waiting.result())

    def write_later(self, write: Callable[[], None]) -> None:
        """Have the thread write; at most one write is under way, and reads asked for later see
        it."""
        if self._writing is not None:
            self._writing.result()
        computed = None
        if self._stream is not None:
            computed = torch.cuda.Event()
            computed.record(torch.cuda.current_stream(self.device))
        self._writing = self._mover.submit(self._aside, write, computed)

    def close(self) -> None:
        """End the thread; an error of the last write is raised."""
        writing, self._writing = self._writing, None
        self._mover.shutdown()
        if writing is not None:
            writing.result()

    def _received(self, fetched: Fetched) -> Fetched:
        """The tensors, whose memory the thread's stream may not take back while they are read."""
        if self._stream is not None:
            for tensor in fetched.values():
                tensor.record_stream(torch.cuda.current_stream(self.device))
        return fetched

    def settle(self) -> None:
        """Wait until all that was computed is there for the thread to read."""
        if self._stream is not None:
            torch.cuda.synchronize(self.device)

    def _aside(self, work: Callable[[], T], computed: torch.cuda.Event | None = None) -> T:
        """Run in the thread; on a GPU on its own stream, and finished on return."""
        if self._stream is None:
            with torch.no_grad():
                return work()
        with torch.no_grad(), torch.cuda.stream(self._stream):
            if computed is not None:
                self._stream.wait_event(computed)
            result = work()
            self._stream.synchronize()
            return result
