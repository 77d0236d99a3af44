"""What the driver tells of a node's GPUs while ranks compute: Xid errors in the kernel's log,
memory errors, and lowered clocks. Where a source is not there, or may not be read, it says nothing.
"""

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from cluster.driver import ANSWER_SECONDS, Gpu, ask_driver
from data_pipeline.printable import plain

KERNEL_LOG = "/dev/kmsg"
LOOK_SECONDS = 60.0
MOST_EVENTS, RECORD_BYTES = 50, 8192
# `NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, name=python, GPU has fallen off the bus.`
XID = re.compile(r"NVRM: Xid \((?:PCI:)?(?P<gpu>[0-9a-fA-F:.]+)\): (?P<number>\d+),? ?(?P<text>.*)")
# Those that NVIDIA's catalogue answers by a reset of the GPU or a repair of the node; others, as 13
# or 31, are mostly the program's own.
BROKEN_XIDS = frozenset({46, 48, 62, 64, 74, 79, 95, 110, 119, 120, 136, 140, 143})
FIELDS = ("pci.bus_id", "ecc.errors.uncorrected.volatile.total", "clocks_throttle_reasons.active")
# Bits of nvmlClocksThrottleReasons; the cap of power by software (0x4) is everyday life.
THROTTLES = {
    0x08: "hardware slowdown",
    0x20: "too hot, by software",
    0x40: "too hot, by hardware",
    0x80: "power brake",
}


@dataclass(frozen=True)
class GpuEvent:
    """One thing that the driver told; `is_broken` where the node should not go on like that."""

    text: str
    is_broken: bool = False
    place: str = ""  # on the PCI bus, where it is told by that


@dataclass(frozen=True)
class GpuState:
    """What nvidia-smi says of one GPU."""

    index: str
    place: str
    memory_errors: int | None  # uncorrected since the driver was loaded; None: not counted
    throttles: frozenset[str]


def parse_xids(log: str) -> list[GpuEvent]:
    """The Xid errors in lines of a kernel's log."""
    found = []
    for match in map(XID.search, log.splitlines()):
        if match is not None:
            number = int(match["number"])
            text = plain(match["text"], most=200).rstrip(". ")
            said = f"GPU {match['gpu']}: Xid {number}" + (f", {text}" if text else "")
            found.append(GpuEvent(said, number in BROKEN_XIDS, place(match["gpu"])))
    return found


def states_of(gpus: Iterable[Gpu]) -> list[GpuState]:
    """What a driver tells of `FIELDS`; what it does not, as `[N/A]`, is no event."""
    bus, memory, clocks = FIELDS
    found = []
    for gpu in gpus:
        bits = int(gpu[clocks], 16) if re.fullmatch(r"0x[0-9a-fA-F]+", gpu[clocks]) else 0
        throttles = frozenset(name for bit, name in THROTTLES.items() if bits & bit)
        count = int(gpu[memory]) if gpu[memory].isdecimal() else None
        found.append(GpuState(gpu["index"], place(gpu[bus]), count, throttles))
    return found


def place(bus: str) -> str:
    """A GPU on the PCI bus as the kernel and nvidia-smi both could write it: `0:3b:00`."""
    *domain, number, device = bus.lower().split(":")
    return ":".join([domain[-1].lstrip("0") or "0" if domain else "0", number, device[:2]])


def changes(before: Iterable[GpuState], after: Iterable[GpuState]) -> list[GpuEvent]:
    """What happened between two looks; what was there before is not news."""
    known = {state.index: state for state in before}
    found = []
    for state in after:
        old = known.get(state.index, replace(state, throttles=frozenset()))
        more = (state.memory_errors or 0) - (old.memory_errors or 0)
        if more > 0:
            found.append(GpuEvent(f"GPU {state.index}: {more} uncorrected memory errors", True))
        if begun := sorted(state.throttles - old.throttles):
            found.append(GpuEvent(f"GPU {state.index}: its clocks were lowered: {begun[0]}"))
    return found


class GpuWatch:
    """A thread that collects events and tells of each that is news: a driver that does not answer
    must not hold the ranks up."""

    def __init__(self, tell: Callable[[tuple[str, ...]], None]) -> None:
        self._tell = tell
        self._events: list[GpuEvent] = []
        self._places: set[str] = set()
        self._log = open_log(KERNEL_LOG)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="gpus", daemon=True)
        self._thread.start()

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(event.text for event in self._events)

    def close(self) -> tuple[tuple[str, ...], bool]:
        """All events, and whether one means that the node is broken; the kernel may only now have
        told why a rank has died."""
        self._stop.set()
        self._thread.join(ANSWER_SECONDS)
        self._read_log()
        if self._log is not None:
            os.close(self._log)
            self._log = None
        return self.texts, any(event.is_broken for event in self._events)

    def _watch(self) -> None:
        states = states_of(ask_driver(FIELDS) or [])
        self._places = {state.place for state in states}
        while not self._stop.wait(LOOK_SECONDS):
            self._read_log()
            if states:
                now = states_of(ask_driver(FIELDS) or [])
                self._note(changes(states, now))
                states = now or states

    def _read_log(self) -> None:
        if self._log is not None:
            events, ours = parse_xids(read_log(self._log)), self._places
            self._note(event for event in events if not ours or event.place in ours)

    def _note(self, events: Iterable[GpuEvent]) -> None:
        fresh = [event for event in dict.fromkeys(events) if event.text not in self.texts]
        if fresh := fresh[: MOST_EVENTS - len(self._events)]:
            self._events += fresh
            self._tell(self.texts)


def open_log(path: str) -> int | None:
    """The kernel's log from now on; None where it is not for us."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        os.lseek(file, 0, os.SEEK_END)
    return file


def read_log(file: int) -> str:
    """All that has come since the last time, a record per line."""
    records = []
    while True:
        try:
            record = os.read(file, RECORD_BYTES)
        except BrokenPipeError:  # some were overwritten; the next ones are there
            continue
        except OSError:
            break
        if not record:
            break
        records.append(record.decode(errors="replace"))
    return "".join(records)
