"""Hosts of our own on this machine: network namespaces joined by a bridge, each with its own name
and its own idea of everybody's address. Needs root and iproute2.
"""

import contextlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


def missing() -> str | None:
    """Why hosts cannot be made here, or None."""
    if os.geteuid() != 0:
        return "hosts of our own need root"
    for tool in ("ip", "unshare", "hostname"):
        if shutil.which(tool) is None:
            return f"hosts of our own need {tool} (iproute2, util-linux)"
    name = f"t2v-{uuid.uuid4().hex[:8]}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return "network namespaces are not allowed here"
    linked = subprocess.run(
        ["ip", "-n", name, "link", "add", "name", "a0", "type", "veth", "peer", "name", "b0"],
        capture_output=True,
    )
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return "veth devices are not allowed here" if linked.returncode else None


@dataclass
class Host:
    """A host: processes started in it see its network, its name and its hosts file."""

    space: str
    name: str
    address: str

    def start(self, command: list[str], **options) -> subprocess.Popen:
        """A process of this host."""
        inside = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name]
        return subprocess.Popen(["ip", "netns", "exec", self.space, *inside, *command], **options)

    def know(self, hosts: str) -> None:
        """Its /etc/hosts from now on."""
        Path("/etc/netns", self.space, "hosts").write_text(hosts)

    def cut(self) -> None:
        """Take it off the network."""
        subprocess.run(["ip", "-n", self.space, "link", "set", "eth0", "down"], check=True)


@contextmanager
def local_hosts(count: int) -> Iterator[list[Host]]:
    """Hosts n1, n2, ... that reach each other at 10.77.0.1, ...; none reaches this machine."""
    tag = uuid.uuid4().hex[:6]
    bridge = f"t2v-{tag}-net"
    hosts = [Host(f"t2v-{tag}-{n}", f"n{n}", f"10.77.0.{n}") for n in range(1, count + 1)]
    with contextlib.ExitStack() as exits:
        for space in (bridge, *(host.space for host in hosts)):
            _ip("netns", "add", space)
            exits.callback(_ip, "netns", "del", space)
        _ip("-n", bridge, "link", "add", "name", "br0", "type", "bridge")
        _ip("-n", bridge, "link", "set", "br0", "up")
        for number, host in enumerate(hosts):
            folder = Path("/etc/netns", host.space)
            folder.mkdir(parents=True)
            exits.callback(shutil.rmtree, folder)
            port = f"port{number}"
            _ip("-n", host.space, "link", "add", "name", "eth0", "type", "veth",
                "peer", "name", port, "netns", bridge)  # fmt: skip
            _ip("-n", bridge, "link", "set", port, "master", "br0", "up")
            _ip("-n", host.space, "addr", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", host.space, "link", "set", device, "up")
            host.know("127.0.0.1 localhost\n")
        yield hosts


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
