"""A real SLURM of one controller and two node daemons on this machine, in a folder of its own.

It has a private key, socket, ports and names (an /etc/hosts of its own in a mount namespace),
touches no service of the system, and needs root, as the daemons start jobs as their users.
"""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel", "srun")
NODES = ("n1", "n2")
HOSTILE = """\
export PYTHONPATH=/evil T2V_FAULT=setup:0:1:kill GLOO_SOCKET_IFNAME=evil0 FROM_LOGIN=1
t2v() { return 9; }
export -f t2v
"""


def missing() -> str | None:
    """Why no SLURM can be started here, or None."""
    absent = [name for name in PROGRAMS if _program(name) is None]
    if absent:
        return f"no SLURM here: {', '.join(absent)} missing; apt install slurm-wlm munge"
    if os.geteuid():
        return "SLURM's daemons need root"
    done = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    return "node names need a mount namespace, which is refused here" if done.returncode else None


@dataclass
class SlurmCluster:
    """A running cluster."""

    folder: Path
    daemons: dict[str, subprocess.Popen]

    @property
    def environment(self) -> dict[str, str]:
        """What SLURM's commands need to find it."""
        return os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str) -> str:
        """Output of one of SLURM's commands."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{self.logs()}"
        return done.stdout.strip()

    def submit(self, script: Path, *options: str) -> str:
        """The id of a new job."""
        return self.run("sbatch", "--parsable", *options, str(script))

    def job(self, job_id: str) -> dict[str, str]:
        """What the controller says of a job."""
        fields = self.run("scontrol", "show", "job", job_id, "--oneliner").split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait_for(self, job_id: str, *states: str, seconds: float = 120) -> dict[str, str]:
        """The job, once it is in one of some states; a requeued one need not wait to begin."""
        deadline = time.monotonic() + seconds
        while (job := self.job(job_id))["JobState"] not in states:
            assert time.monotonic() < deadline, f"{job_id} is {job['JobState']}\n{self.logs()}"
            if job["JobState"] == "PENDING" and job.get("Reason") == "BeginTime":
                # A daemon refuses what it was told to kill within the same second.
                time.sleep(2.5)
                with contextlib.suppress(AssertionError):  # it may have begun just now
                    self.run("scontrol", "update", f"job={job_id}", "StartTime=now")
            time.sleep(0.3)
        return job

    def kill_node(self, node: str) -> None:
        """End a node's daemon and all that it has started, as a crash of the node would."""
        daemon = psutil.Process(self.daemons[node].pid)
        steps = [
            process
            for process in psutil.process_iter(["name", "environ"])
            if (process.info["environ"] or {}).get("SLURMD_NODENAME") == node
        ]
        for process in [daemon, *daemon.children(recursive=True), *steps]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.daemons[node].wait()

    def start_daemon(self, node: str) -> None:
        """Start a node daemon, again if need be."""
        mount = f"mount --bind {self.folder}/hosts /etc/hosts && "
        mount += f'mount --bind {self.folder}/profile.d /etc/profile.d && exec "$@"'
        command = [
            *("unshare", "--mount", "sh", "-c", mount, "sh"),
            *(_program("slurmd"), "-D", "-N", node, "-f", self.folder / "slurm.conf"),
        ]
        self.daemons[node] = _start(command, self.folder / f"slurmd-{node}.out", self.environment)

    def logs(self) -> str:
        """The ends of all logs, for the message of a failed test."""
        texts = [
            f"== {path.name}\n{path.read_text(errors='replace')[-2000:]}"
            for path in sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        ]
        return "\n".join(texts)


@contextlib.contextmanager
def slurm_cluster() -> Iterator[SlurmCluster]:
    """A cluster that is up; everything of it ends with the block."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    cluster = SlurmCluster(folder, {})
    try:
        _start_munge(cluster)
        (folder / "slurm.conf").write_text(_configuration(folder))
        (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        names = " ".join(["localhost", socket.gethostname(), *NODES])
        (folder / "hosts").write_text(f"127.0.0.1 {names}\n")
        # Jobs of this cluster have users whose login files would break them all.
        (folder / "profile.d").mkdir()
        (folder / "profile.d" / "hostile.sh").write_text(HOSTILE)
        controller = [_program("slurmctld"), "-D", "-c", "-f", folder / "slurm.conf"]
        cluster.daemons["controller"] = _start(
            controller, folder / "slurmctld.out", cluster.environment
        )
        for node in NODES:
            cluster.start_daemon(node)
        _wait_until_up(cluster)
        yield cluster
    finally:
        for job in _jobs(cluster):
            subprocess.run(["scancel", "--full", "-s", "KILL", job], env=cluster.environment)
        for daemon in reversed(cluster.daemons.values()):
            daemon.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(timeout=10)
            daemon.kill()
            daemon.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _start_munge(cluster: SlurmCluster) -> None:
    folder = cluster.folder
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    files = {"key-file": key, "socket": folder / "munge.socket", "pid-file": folder / "munge.pid",
             "log-file": folder / "munge.log", "seed-file": folder / "munge.seed"}  # fmt: skip
    command = [_program("munged"), "--foreground", *(f"--{k}={v}" for k, v in files.items())]
    cluster.daemons["munge"] = _start(command, folder / "munge.out", dict(os.environ))
    deadline = time.monotonic() + 20
    while not files["socket"].exists():
        assert time.monotonic() < deadline, cluster.logs()
        time.sleep(0.05)


def _configuration(folder: Path) -> str:
    host = socket.gethostname()
    controller_port, *node_ports = _free_ports(1 + len(NODES))
    ports = ",".join(map(str, node_ports))
    # Ranks meet at a port made from the job's number, and clusters of other tests share this host.
    first = secrets.randbelow(5000) + 1
    return f"""\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
FirstJobId={first}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,batch_sched_delay=0
JobRequeue=1
ReturnToService=2
KillWait=5
SlurmdTimeout=10
SlurmctldTimeout=10
MpiDefault=none
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports}] CPUs=2 RealMemory=16000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:2
"""


def _wait_until_up(cluster: SlurmCluster) -> None:
    deadline = time.monotonic() + 30
    while True:
        done = subprocess.run(
            ["sinfo", "--Node", "--noheader", "--format=%N %T"],
            env=cluster.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        states = [line.split()[1] for line in done.stdout.splitlines()]
        if len(states) == len(NODES) and set(states) == {"idle"}:
            return
        assert time.monotonic() < deadline, f"{done.stdout}{done.stderr}{cluster.logs()}"
        time.sleep(0.2)


def _jobs(cluster: SlurmCluster) -> list[str]:
    done = subprocess.run(
        ["squeue", "--noheader", "--format=%i"],
        env=cluster.environment | {"SLURM_TIME_FORMAT": "standard"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return done.stdout.split()


def _start(command: list, output: Path, environment: dict[str, str]) -> subprocess.Popen:
    with output.open("ab") as file:
        return subprocess.Popen(
            [str(part) for part in command],
            stdout=file,
            stderr=file,
            env=environment,
            process_group=0,
        )


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
