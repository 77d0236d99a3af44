"""Preflight and training agree on hosts of every kind, and name the one that is half dead."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from t2v.recipe.recipe import dump_config
from tests.local_hosts import Host, local_hosts, missing
from tests.test_loop import config_of, dataset, status_of

__all__ = ["dataset"]  # a fixture

REASON = missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.dist,
    pytest.mark.timeout(900),
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]
# Of a preflight; and what a busy machine may take to start three of them, and to end them.
TIMEOUT, STARTING_SECONDS = 40, 60
LOCAL = "127.0.0.1 localhost\n"
# What a host's own line of its hosts file says; the others know each other by their addresses.
OWN_LINES = {
    "its address": "{address} {name}\n",
    "Debian's": "127.0.1.1 {name}.site {name}\n",
    "loopback": "127.0.0.1 {name}\n",
    "a name known only to itself": "{address} {name}\n127.0.1.1 my-{name}\n",
    "nothing": "{address} {name}\n",
}


def introduce(hosts: list[Host], kind: str) -> None:
    """Write everybody's hosts file."""
    for host in hosts:
        others = "".join(f"{o.address} {o.name}\n" for o in hosts if o is not host)
        host.know(LOCAL + OWN_LINES[kind].format(**vars(host)) + others)
    if kind in ("a name known only to itself", "nothing"):
        for host in hosts:  # what it calls itself, no other has heard of
            host.name = f"my-{host.name}"


def start(hosts: list[Host], verb: str, recipe: Path, *options: str) -> list[subprocess.Popen]:
    names = " ".join(f"n{number + 1}" for number in range(len(hosts)))
    environment = {k: v for k, v in os.environ.items() if not k.endswith("SOCKET_IFNAME")}
    environment |= {"OMP_NUM_THREADS": "1", "T2V_NODE_NAMES": names}
    started = []
    for number, host in enumerate(hosts):
        command = [
            *(sys.executable, "-m", "t2v.cli", verb, "--nnodes", str(len(hosts))),
            *("--node-rank", str(number), "--rdzv-endpoint", "n1:29400", *options),
            *("--", str(recipe)),
        ]
        own = {"SLURMD_NODENAME": f"n{number + 1}", "T2V_HEARTBEAT": f"/tmp/beat-{host.space}"}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(host.start(command, env=environment | own, **streams))
    return started


def end(processes: list[subprocess.Popen], seconds: float = 240) -> list[tuple[int, str]]:
    deadline, ends = time.monotonic() + seconds, []
    for process in processes:
        output, _ = process.communicate(timeout=max(deadline - time.monotonic(), 1))
        ends.append((process.returncode, output))
    return ends


def recipe_of(dataset: Path, tmp_path: Path, **changes) -> Path:
    recipe = tmp_path / "recipe.yaml"
    config = config_of(dataset, tmp_path / "run", engine={"kind": "fsdp"}, **changes)
    recipe.write_text(dump_config(config))
    return recipe


@pytest.mark.parametrize("kind", OWN_LINES)
def test_preflight_and_training_agree_whatever_hosts_call_themselves(dataset, tmp_path, kind):
    recipe = recipe_of(dataset, tmp_path)
    with local_hosts(2) as hosts:
        introduce(hosts, kind)
        found = end(start(hosts, "preflight", recipe, "--json", "--timeout-seconds", "60"))
        assert [code for code, _ in found] == [0, 0], found
        told = json.loads(found[0][1].splitlines()[-1])
        assert all(node["rates"]["all"] > 0 for node in told["nodes"])
        trained = end(start(hosts, "node", recipe, "--run-dir", str(tmp_path / "run")))
        assert [code for code, _ in trained] == [0, 0], trained
        status = status_of(tmp_path / "run")
        assert (status["state"], status["host"]) == ("done", hosts[0].name)  # rank 0 is its own


def has_begun(process: psutil.Process) -> bool:
    """Whether it is `t2v` itself by now, and not what starts it."""
    return "t2v.cli" in process.cmdline()


def tries_the_fabric(process: psutil.Process) -> bool:
    """Whether a rank of its is there, in the midst of the preflight."""
    return any(
        "cluster.fabric" in words and "torch.distributed.run" not in words
        for words in (words_of(one) for one in all_of(process))
    )


@pytest.mark.parametrize(
    ("number", "when", "how"),
    [
        (2, has_begun, signal.SIGSTOP),
        (2, tries_the_fabric, signal.SIGSTOP),
        (2, tries_the_fabric, signal.SIGKILL),
        (0, tries_the_fabric, signal.SIGSTOP),
    ],
    ids=["hangs as it starts", "hangs", "dies", "the first hangs"],
)
def test_of_three_hosts_the_one_that_falls_silent_is_named_in_time(
    dataset, tmp_path, monkeypatch, number, when, how
):
    recipe = recipe_of(dataset, tmp_path, global_batch_size=6)
    monkeypatch.setenv("T2V_BAD_NODES", str(tmp_path / "bad_nodes"))
    with local_hosts(3) as hosts:
        introduce(hosts, "Debian's")
        started = start(hosts, "preflight", recipe, "--timeout-seconds", str(TIMEOUT))
        process = psutil.Process(started[number].pid)
        wait_for(lambda: when(process))
        since = time.monotonic()
        try:
            for one in all_of(process):
                one.send_signal(how)
            found = end([other for other in started if other is not started[number]])
        finally:
            for one in all_of(process):
                one.kill()
            started[number].communicate()
    seconds, name = time.monotonic() - since, f"n{number + 1}"
    assert found[0][0] == 69, found
    assert f"{name}: " in found[0][1]
    # The others come while this machine is busy with all of them; then their time begins.
    assert seconds < TIMEOUT + STARTING_SECONDS, found
    (line,) = (tmp_path / "bad_nodes").read_text().splitlines()
    assert line.split()[0] == name


def words_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def all_of(process: psutil.Process) -> list[psutil.Process]:
    """A process that lives and all that it has started."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def wait_for(condition) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
