"""Where the nodes of a job compare notes before it begins: a store that the first one keeps."""

import os
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from cluster.launcher import Place, address_of, own_interface, split_endpoint
from data_pipeline.errors import StorageError

PREFIX = "preflight"
POLL_SECONDS = 0.1
# A packet that has not come back by then never will.
CONNECT_SECONDS = 5.0


@dataclass(frozen=True)
class Meeting:
    """The nodes of a job, and who of them this one is."""

    place: Place  # where they meet, a port of its own
    timeout_seconds: float = 120.0

    @property
    def nnodes(self) -> int:
        return self.place.nnodes

    @property
    def node_rank(self) -> int:
        return self.place.node_rank

    def name(self, number: int) -> str:
        """A node's name, where a batch script tells those of all nodes, or its number."""
        names = os.environ.get("T2V_NODE_NAMES", "").split()
        return names[number] if len(names) == self.nnodes else f"node number {number}"

    def knows_names(self) -> bool:
        """Whether nodes that say nothing can be named."""
        return len(os.environ.get("T2V_NODE_NAMES", "").split()) == self.nnodes


def meet(meeting: Meeting) -> dist.Store:
    """The store of the first node."""
    host, port = split_endpoint(meeting.place.rdzv_endpoint)
    try:
        store = dist.TCPStore(
            host,
            port,
            is_master=meeting.node_rank == 0,
            wait_for_workers=False,
            timeout=timedelta(seconds=meeting.timeout_seconds),
        )
    except (dist.DistError, RuntimeError) as failure:
        raise StorageError(
            f"{host}:{port}: the nodes cannot meet because "
            f"{str(failure).splitlines()[0].rstrip('.')}; check the first node and its port."
        ) from None
    return dist.PrefixStore(PREFIX, store)


def await_keys(
    store: dist.Store, name: str, numbers: Iterable[int], timeout_seconds: float
) -> list[int]:
    """Wait for a key of each of some nodes; the numbers of those that did not set it in time."""
    deadline = time.monotonic() + timeout_seconds
    missing = list(numbers)
    while missing:
        missing = [number for number in missing if not store.check([f"{name}/{number}"])]
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS if missing else 0.0)
    return missing


def agreed_clock(store: dist.Store, meeting: Meeting) -> float:
    """This node's time when the first node called, to the 20 ms of a poll."""
    if meeting.node_rank == 0:
        store.set("call/0", "now")
    deadline = time.monotonic() + meeting.timeout_seconds
    while not store.check(["call/0"]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return time.time()


def open_door(meeting: Meeting) -> tuple[socket.socket, str]:
    """A port of the very interface that ranks will use, and its address for others."""
    named = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    address = address_of(named or own_interface(meeting.place))
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    door = socket.create_server((address, 0), family=family, backlog=128)
    return door, f"{address} {door.getsockname()[1]}"


def knock(store: dist.Store, meeting: Meeting) -> dict[str, str]:
    """Which of the two nodes after this one do not open, and where they were looked for."""
    closed = {}
    others = {(meeting.node_rank + step) % meeting.nnodes for step in (1, 2)}
    for number in sorted(others - {meeting.node_rank}):
        address, port = store.get(f"door/{number}").decode().split()
        try:
            socket.create_connection((address, int(port)), timeout=CONNECT_SECONDS).close()
        except OSError as failure:
            closed[str(number)] = f"{address} ({failure.strerror or failure})"
    return closed
