"""Where the nodes of a job compare notes before it begins: a store that the first one keeps."""

import contextlib
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

from cluster.torchrun import Place, address_of, own_interface, split_endpoint
from data_pipeline.errors import StorageError

PREFIX, JUDGEMENT = "preflight", "judgement"
POLL_SECONDS = 0.1
# A packet that has not come back by then never will.
CONNECT_SECONDS = 5.0
# A node gives a sign of life every so often; one that gave none for so long hangs, or has died.
BEAT_SECONDS, SILENT_SECONDS = 1.0, 30.0


class Meeting(Place):
    """The nodes of a job before it begins, at a port of their own, and who of them this one is."""

    @property
    def silent_seconds(self) -> float:
        """Without a sign of life, a node hangs or has died."""
        return min(self.rendezvous_timeout_seconds, SILENT_SECONDS)

    @property
    def names(self) -> dict[int, str]:
        """Of all nodes by number, where a batch script tells them."""
        names = os.environ.get("T2V_NODE_NAMES", "").split()
        return dict(enumerate(names)) if len(names) == self.nnodes else {}


def meet(meeting: Meeting, *, is_host: bool) -> dist.Store:
    """The store that the first node keeps."""
    host, port = split_endpoint(meeting.rdzv_endpoint)
    try:
        store = dist.TCPStore(
            host,
            port,
            is_master=is_host,
            wait_for_workers=False,
            timeout=timedelta(seconds=meeting.rendezvous_timeout_seconds),
        )
    except (dist.DistError, RuntimeError) as failure:
        raise StorageError(
            f"{host}:{port}: the nodes cannot meet because "
            f"{str(failure).splitlines()[0].rstrip('.')}; check the first node and its port."
        ) from None
    return dist.PrefixStore(PREFIX, store)


class Pulse:
    """A thread's signs of life in the store, by a connection of its own, for whoever waits for a
    key holds the other one; and how long those of the others stay away."""

    def __init__(self, meeting: Meeting) -> None:
        self.meeting, self.is_over = meeting, threading.Event()
        self.seen = {number: (0, time.monotonic()) for number in range(meeting.nnodes)}
        self._stop, self._looked = threading.Event(), time.monotonic()
        self._store = meet(meeting, is_host=False)
        threading.Thread(target=self._beat, name="pulse", daemon=True).start()

    def __enter__(self) -> "Pulse":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()

    def silent(self, numbers: Iterable[int]) -> list[int]:
        """Which of some nodes came, and gave no sign for too long. The first node asks for all; the
        others know only of it, for it is the store that answers them, or does not."""
        # Where this process itself stood still, the first node's last look is as old.
        now = time.monotonic() if self.meeting.node_rank else self._looked
        patience = self.meeting.silent_seconds
        return [n for n in numbers if self.seen[n][0] and now - self.seen[n][1] > patience]

    def _beat(self) -> None:
        me, everyone = self.meeting.node_rank, range(self.meeting.nnodes)
        store, beats = self._store, 0
        try:
            while not self._stop.wait(BEAT_SECONDS):
                beats += 1
                store.set(f"beat/{me}", str(beats))
                if me == 0:
                    is_full = store.check([f"beat/{n}" for n in everyone])
                    came = [n for n in everyone if is_full or store.check([f"beat/{n}"])]
                    counts = iter(
                        [int(found) for found in store.multi_get([f"beat/{n}" for n in came])]
                    )
                else:
                    came, counts = [0], iter([beats])
                    if store.check([JUDGEMENT]):
                        self.is_over.set()
                for number, count in zip(came, counts, strict=True):
                    if count > self.seen[number][0]:
                        self.seen[number] = (count, time.monotonic())
                self._looked = time.monotonic()
        except (dist.DistError, RuntimeError):  # the first node's process is gone
            self.seen[0] = (1, -math.inf)


@dataclass(frozen=True)
class Seat:
    """A node's place at the meeting."""

    meeting: Meeting
    store: dist.Store
    pulse: Pulse
    doors: dict[int, str] = field(default_factory=dict)

    def find_doors(self) -> None:
        """Of the two nodes after this one, once all have come."""
        me, count = self.meeting.node_rank, self.meeting.nnodes
        for number in sorted({(me + step) % count for step in (1, 2)} - {me}):
            self.doors[number] = self.store.get(f"door/{number}").decode()

    def names(self, numbers: Iterable[int]) -> dict[int, str]:
        """Of some nodes: what the batch script calls them, or what they have called themselves."""
        came = [n for n in numbers if self.store.check([f"name/{n}"])]
        told = self.store.multi_get([f"name/{n}" for n in came]) if came else []
        own = dict(zip(came, (name.decode() for name in told), strict=True))
        return own | {n: name for n, name in self.meeting.names.items() if n in numbers}


@contextlib.contextmanager
def seated(meeting: Meeting, name: str) -> Iterator[Seat]:
    """Come to the meeting under a name, with a door of the very interface that ranks will use."""
    store = meet(meeting, is_host=meeting.node_rank == 0)
    named = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    address = address_of(named or own_interface(meeting))
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    door = socket.create_server((address, 0), family=family, backlog=128)
    with door, Pulse(meeting) as pulse:
        store.set(f"door/{meeting.node_rank}", f"{address} {door.getsockname()[1]}")
        store.set(f"name/{meeting.node_rank}", name)
        yield Seat(meeting, store, pulse)


def await_keys(
    store: dist.Store,
    name: str,
    numbers: Iterable[int],
    timeout_seconds: float,
    silent: Callable[[Iterable[int]], list[int]] = lambda numbers: [],
) -> list[int]:
    """Wait for a key of each of some nodes; the numbers of those that did not set it in time, or of
    those that are waited for and have fallen silent."""
    deadline = time.monotonic() + timeout_seconds
    missing = list(numbers)
    while missing := [number for number in missing if not store.check([f"{name}/{number}"])]:
        if gone := silent(missing):
            return gone
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    return missing


def agreed_clock(store: dist.Store, meeting: Meeting) -> float:
    """This node's time when the first node called, to the 20 ms of a poll."""
    if meeting.node_rank == 0:
        store.set("call/0", "now")
    deadline = time.monotonic() + meeting.rendezvous_timeout_seconds
    while not store.check(["call/0"]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return time.time()


def knock(found: dict[int, str]) -> dict[str, str]:
    """Which of some doors do not open, and where they were looked for."""
    closed = {}
    for number, door in found.items():
        address, port = door.split()
        try:
            socket.create_connection((address, int(port)), timeout=CONNECT_SECONDS).close()
        except OSError as failure:
            closed[str(number)] = f"{address} ({failure.strerror or failure})"
    return closed
