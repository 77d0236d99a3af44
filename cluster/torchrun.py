"""How the ranks of a node are started: one way for preflight, which tries it, and for training.

Nodes meet at the first one, which keeps rank 0; each is told which of its interfaces leads to the
others, for what a host calls itself may be an address that nobody else reaches.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

import psutil

from data_pipeline.cpus import usable_cpus
from data_pipeline.errors import ConfigError
from data_pipeline.orphans import end_with_parent

ENDPOINT = re.compile(r"(?P<host>[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?):(?P<port>\d{1,5})")
ROOT_CAUSE = re.compile(
    r"Root Cause.*?rank\s*:\s*(?P<rank>\d+).*?exitcode\s*:\s*(?P<code>-?\d+)", re.DOTALL
)
# What ends a rank from outside, or by its hardware; an abort may be a library's own timeout.
KILLED = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS)
# No packet is sent there (RFC 5737): the kernel only says by which interface it would go.
ANYWHERE = "203.0.113.1"


@dataclass(frozen=True, kw_only=True)
class Place:
    """One node's place in a job."""

    nnodes: int = 1
    nproc_per_node: int = 1
    rdzv_endpoint: str = "localhost:29400"
    rdzv_id: str = "t2v"
    node_rank: int = 0
    grace_seconds: float = 600.0
    rendezvous_timeout_seconds: float = 600.0


def launcher_command(place: Place, module: str, arguments: Sequence[str]) -> list[str]:
    """The command line of torchrun: no restarts of its own, for a gang is only ever whole."""
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        f"--nnodes={place.nnodes}",
        f"--nproc-per-node={place.nproc_per_node}",
        f"--node-rank={place.node_rank}",
        "--max-restarts=0",
        # Ranks follow the numbers of nodes; others would follow their addresses.
        "--rdzv-backend=static",
        f"--rdzv-endpoint={place.rdzv_endpoint}",
        f"--rdzv-id={place.rdzv_id}",
        f"--rdzv-conf=timeout={int(place.rendezvous_timeout_seconds)}",
        f"--log-dir={os.devnull}",  # else an empty folder among the temporary ones for each start
        f"--shutdown-timeout={max(int(place.grace_seconds) - 30, 30)}",
        *("-m", module, *arguments),
    ]


def start_launcher(
    place: Place,
    module: str,
    arguments: Sequence[str],
    log: TextIO,
    *,
    stdout: TextIO | None = None,
) -> subprocess.Popen:
    """torchrun, its stderr in a file, in a process group of its own: a terminal's Ctrl-C must reach
    the ranks as a request, not as a signal."""
    return subprocess.Popen(
        launcher_command(place, module, arguments),
        stdout=stdout,
        stderr=log,
        env=launcher_environment(place),
        process_group=0,
        preexec_fn=begin_launcher,
    )


def launcher_environment(place: Place) -> dict[str, str]:
    """This process's variables, and those that ranks need and nobody has set."""
    environment = dict(os.environ)
    threads = max(1, usable_cpus() // place.nproc_per_node)
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    environment.setdefault("PYTHONUNBUFFERED", "1")
    environment.setdefault("PYTHONFAULTHANDLER", "1")
    if place.nnodes > 1 and "GLOO_SOCKET_IFNAME" not in environment:
        environment["GLOO_SOCKET_IFNAME"] = own_interface(place)
    return environment


def begin_launcher() -> None:
    """Before torchrun begins. A scheduler may signal every process of a job (`scancel` without
    `--batch`): that must not kill torchrun, and with it the ranks as they save, which arm handlers
    of their own. Where whoever started it is killed, torchrun asks its ranks to stop."""
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(signal.SIGTERM)


def end_group(launcher: subprocess.Popen, number: signal.Signals) -> None:
    """Signal a launcher and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(launcher.pid, number)


def root_cause(log: str) -> tuple[int, int] | None:
    """(rank, exit code) of the rank that a launcher saw fail first, by what it wrote."""
    seen = ROOT_CAUSE.search(log)
    return (int(seen["rank"]), int(seen["code"])) if seen else None


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Host and port of a meeting point."""
    match = ENDPOINT.fullmatch(endpoint)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise ConfigError(
            f"--rdzv-endpoint: {endpoint!r} is wrong because it is not HOST:PORT; give the first "
            "node's name and a free port."
        )
    return match["host"], int(match["port"])


def own_interface(place: Place) -> str:
    """The interface by which this node and the others reach each other: the one that the site gives
    NCCL, or else the way to the first node, or from it to another."""
    if named := matching(os.environ.get("NCCL_SOCKET_IFNAME", ""), list(addresses())):
        return named
    host, _ = split_endpoint(place.rdzv_endpoint)
    peers = os.environ.get("T2V_NODE_NAMES", "").split()
    for target in (host, *reversed(peers), ANYWHERE):
        for address in route_to(target):
            for name, owned in addresses().items():
                if address in owned:
                    return name
    outward = [name for name in addresses() if not is_inward(name)]
    return outward[0] if outward else "lo"  # all nodes are this host


def matching(rule: str, names: Sequence[str]) -> str | None:
    """The first of some interfaces that NCCL would take by its own rule: names begin with one of a
    list, or after `=` are one of it; after `^` they are not."""
    inverted, rule = rule.startswith("^"), rule.removeprefix("^")
    exact, rule = rule.startswith("="), rule.removeprefix("=")
    wanted = [name.partition(":")[0] for name in rule.split(",") if name]
    if not wanted:
        return None
    for name in names:
        is_wanted = name in wanted if exact else name.startswith(tuple(wanted))
        if is_wanted != inverted and not (inverted and is_inward(name)):
            return name
    return None


def addresses() -> dict[str, list[str]]:
    """The internet addresses of this host's interfaces that are up."""
    is_up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [a.address.partition("%")[0] for a in found if a.family in families]
        for name, found in psutil.net_if_addrs().items()
        if name in is_up and any(a.family in families for a in found)
    }


def address_of(interface: str) -> str:
    """The first address of an interface, as others are told it; ConfigError where it has none."""
    found = addresses().get(interface)
    if not found:
        raise ConfigError(
            f"{interface}: is no interface of this node with an address; it has "
            f"{', '.join(addresses())}; correct GLOO_SOCKET_IFNAME, or `interface` in the profile."
        )
    return found[0]


def is_inward(name: str) -> bool:
    """Whether an interface leads to this host alone."""
    return name == "lo" or name.startswith(("docker", "virbr", "cni", "veth-docker"))


def route_to(host: str) -> list[str]:
    """Own addresses from which packets to a host would go; none for one that is this host."""
    found = []
    try:
        targets = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    except socket.gaierror:
        return []
    for family, kind, protocol, _, target in targets:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.connect(target)
                own = probe.getsockname()[0]
            except OSError:
                continue
        if not own.startswith("127.") and own not in ("::1", "0.0.0.0", "::"):
            found.append(own)
    return found
