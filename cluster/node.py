"""The wrapper on each node of a job: it starts the ranks, hears the scheduler, and ends with the
exit code that the ranks meant.

A signal from the scheduler becomes the flag file `PREEMPT` in the run folder, which every rank of
every node polls: it also reaches ranks that are still starting, and NCCL, which takes SIGUSR1 for
its own, never sees a signal. The launcher turns every exit code into 1, so the code is taken from
the failure records and status.json.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TextIO

import psutil

from cluster.heartbeat import BEAT_SECONDS, beat, heartbeat_file
from cluster.status import PREEMPTED, NodeRecord, last_nodes, read_json, seconds_of
from data_pipeline.errors import ConfigError, StorageError
from data_pipeline.store import storage
from t2v.attempt.preemption import FLAG_FILE
from t2v.attempt.record import next_number, read_attempts

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
POLL_SECONDS = 0.2
# How long ranks may take to follow one that is gone: by then every collective has failed.
FOLLOW_SECONDS = 120.0
ROOT_CAUSE = re.compile(
    r"Root Cause.*?rank\s*:\s*(?P<rank>\d+).*?exitcode\s*:\s*(?P<code>-?\d+)", re.DOTALL
)
ENDPOINT = re.compile(r"(?P<host>[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?):(?P<port>\d{1,5})")


@dataclass(frozen=True)
class NodeJob:
    """One node's part of a job."""

    run_dir: Path
    train_arguments: tuple[str, ...]  # recipe and overrides of `t2v train`
    nnodes: int = 1
    nproc_per_node: int = 1
    rdzv_endpoint: str = "localhost:29400"
    rdzv_id: str = "t2v"
    node_rank: int = 0
    is_host: bool = False
    grace_seconds: float = 600.0
    rendezvous_timeout_seconds: float = 600.0

    @property
    def name(self) -> str:
        return f"node-{self.node_rank:05d}"

    @property
    def hosts_rendezvous(self) -> bool:
        """The first node does: in Kubernetes all are given the same words but their number."""
        return self.is_host or self.node_rank == 0


def run_node(job: NodeJob) -> int:
    """Start this node's ranks, see them through, and return the exit code of the run."""
    split_endpoint(job.rdzv_endpoint)
    requests = Requests()
    job.run_dir.mkdir(parents=True, exist_ok=True)
    since = last_word(job.run_dir)
    log_dir = next_log_dir(job.run_dir)
    log_dir.mkdir(parents=True, exist_ok=True)
    record = NodeRecord(node=job.name, host=socket.gethostname(), started=time.time())
    write_record(log_dir, record)
    if job.hosts_rendezvous and not request_is_open(job.run_dir, since=since):
        (job.run_dir / FLAG_FILE).unlink(missing_ok=True)
    try:
        code, reason = see_through(job, log_dir, record, requests, since)
    except StorageError as failure:
        code, reason = failure.exit_code, str(failure)
    write_record(log_dir, replace(record, ended=time.time(), exit_code=code, reason=reason))
    print(f"{job.name}: {reason} (exit code {code}; logs: {log_dir})", flush=True)
    return code


def see_through(
    job: NodeJob, log_dir: Path, record: NodeRecord, requests: "Requests", since: float
) -> tuple[int, str]:
    """(exit code, why) once the ranks have ended."""
    host, _ = split_endpoint(job.rdzv_endpoint)
    if not wait_for_name(host, job.rendezvous_timeout_seconds, requests.heard):
        request_stop(job.run_dir)
        return PREEMPTED, "told to stop before the ranks began"
    with (log_dir / f"launcher-{job.name}.log").open("w", encoding="utf-8") as log:
        launcher = start_launcher(job, log_dir, log)
        returned = watch(job, launcher, requests, since)
    return exit_code_of(job, log_dir, record, returned, asked=requests.heard())


class Requests:
    """The scheduler's signals; the first is a request to stop, and so are all later ones."""

    def __init__(self) -> None:
        self.first: float | None = None
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def heard(self) -> bool:
        return self.first is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.first = self.first or time.monotonic()


def start_launcher(job: NodeJob, log_dir: Path, log: TextIO) -> subprocess.Popen:
    """torchrun, its stderr in a file, in a process group of its own: a terminal's Ctrl-C must reach
    the ranks as a request, not as a signal."""
    environment = dict(os.environ)
    threads = max(1, (os.cpu_count() or 1) // job.nproc_per_node)
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    environment.setdefault("PYTHONUNBUFFERED", "1")
    environment.setdefault("PYTHONFAULTHANDLER", "1")
    return subprocess.Popen(
        launcher_command(job, log_dir),
        stderr=log,
        env=environment,
        process_group=0,
        preexec_fn=ignore_user_signals,
    )


def ignore_user_signals() -> None:
    """A scheduler may signal every process of a job (`scancel` without `--batch`): that must not
    kill torchrun, and with it the ranks as they save. Ranks arm handlers of their own."""
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def launcher_command(job: NodeJob, log_dir: Path) -> list[str]:
    """The command line of torchrun: no restarts of its own, for a gang is only ever whole."""
    timeout = int(job.rendezvous_timeout_seconds)
    is_host = int(job.hosts_rendezvous)
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        f"--nnodes={job.nnodes}",
        f"--nproc-per-node={job.nproc_per_node}",
        "--max-restarts=0",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={job.rdzv_endpoint}",
        f"--rdzv-id={job.rdzv_id}",
        f"--rdzv-conf=is_host={is_host},join_timeout={timeout},read_timeout={timeout}",
        f"--shutdown-timeout={max(int(job.grace_seconds) - 30, 30)}",
        *("-m", "cluster.rank", str(log_dir), *job.train_arguments),
        # Ranks and wrapper must look at the same flag file, wherever relative paths begin.
        f"run_dir={json.dumps(str(job.run_dir))}",
    ]


def watch(job: NodeJob, launcher: subprocess.Popen, requests: Requests, since: float) -> int:
    """See the launcher through: pass requests on, beat, and bound how long anything may linger.

    `since` is when an earlier attempt was last heard of; older requests were for it.
    """
    heartbeat, next_beat = heartbeat_file(), 0.0
    first_gone: float | None = None
    most, passed_on = 0, False
    while launcher.poll() is None:
        now = time.monotonic()
        ranks = ranks_of(launcher)
        most = max(most, len(ranks))
        # Again while no rank has begun: the start of the node that hosts may have removed it.
        if requests.heard() and not (passed_on and most):
            request_stop(job.run_dir)
            passed_on = True
        if not most and request_is_open(job.run_dir, since=since):
            end_group(launcher, signal.SIGTERM)  # no rank here has begun: none can answer
            launcher.wait()
            return PREEMPTED
        if most and len(ranks) < most:
            first_gone = first_gone or now
        overdue = requests.first is not None and now - requests.first > job.grace_seconds
        if overdue or (first_gone is not None and now - first_gone > FOLLOW_SECONDS):
            for rank in ranks:
                end_process(rank)
        if now >= next_beat:
            status = read_json(job.run_dir / "status.json")
            state = status.get("state", "starting") if most else "starting"
            with contextlib.suppress(OSError):  # a full disk there must not end the run
                beat(heartbeat, state=state, step=status.get("step", 0))
            next_beat = now + BEAT_SECONDS
        time.sleep(POLL_SECONDS)
    return launcher.returncode


def exit_code_of(
    job: NodeJob, log_dir: Path, record: NodeRecord, returned: int, *, asked: bool
) -> tuple[int, str]:
    """(exit code, why) of an attempt whose launcher returned `returned`.

    Best word first: the earliest failure record, the run's status, what the launcher saw of its
    own ranks.
    """
    since = int(record.started)
    if returned == 0:
        return 0, "done"
    status = read_json(job.run_dir / "status.json")
    is_fresh = (seconds_of(status.get("updated")) or 0.0) >= since
    if is_fresh and status.get("state") == "done":
        return 0, "done"
    failures = [read_json(path) for path in log_dir.glob("failure-rank-*.json")]
    fresh = [f for f in failures if f.get("exit_code") and (seconds_of(f.get("at")) or 0) >= since]
    if fresh:
        first = min(fresh, key=lambda failure: seconds_of(failure["at"]) or 0.0)
        if first["exit_code"] != PREEMPTED:
            return int(first["exit_code"]), f"rank {first.get('rank')}: {first.get('reason')}"
    if is_fresh and status.get("state") == "preempted":
        return PREEMPTED, f"preempted at step {status.get('step')}, saved"
    if is_fresh and status.get("state") == "failed" and status.get("exit_code"):
        return int(status["exit_code"]), str(status.get("reason"))
    if returned == PREEMPTED:
        return PREEMPTED, "told to stop before the ranks began"
    seen = ROOT_CAUSE.search(launcher_log(job, log_dir))
    if seen is None:
        if asked:
            return PREEMPTED, "told to stop; nothing newer was saved"
        return 1, f"the launcher ended with {returned}: {last_words(job, log_dir)}"
    code = int(seen["code"])
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        return 128 - code, f"rank {seen['rank']} was killed by {name}"
    return code, f"rank {seen['rank']} ended with {code}; its log says why"


def launcher_log(job: NodeJob, log_dir: Path) -> str:
    path = log_dir / f"launcher-{job.name}.log"
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def last_words(job: NodeJob, log_dir: Path) -> str:
    """The launcher's last error in one line, or where to look."""
    lines = [line for line in launcher_log(job, log_dir).splitlines() if "Error: " in line]
    return lines[-1].strip()[-300:] if lines else "its log says why"


def next_log_dir(run_dir: Path) -> Path:
    """Where the attempt that begins now keeps its logs; every node finds the same, for the number
    is only raised once all nodes have met."""
    return run_dir / "logs" / f"attempt-{next_number(read_attempts(run_dir)):04d}"


def write_record(log_dir: Path, record: NodeRecord) -> None:
    content = json.dumps(asdict(record)).encode()
    storage.write_atomic(log_dir / f"{record.node}.json", content)


def request_stop(run_dir: Path) -> None:
    """Ask all ranks of all nodes to save and stop."""
    (run_dir / FLAG_FILE).touch()


def last_word(run_dir: Path) -> float:
    """When an earlier attempt, its ranks or its wrappers, was last heard of; 0: never."""
    told = seconds_of(read_json(run_dir / "status.json").get("updated")) or 0.0
    return max([told, *(node.ended or 0.0 for node in last_nodes(run_dir))])


def request_is_open(run_dir: Path, *, since: float) -> bool:
    """Whether this attempt is asked to stop; a flag older than an earlier attempt's last word was
    meant for that one."""
    try:
        return (run_dir / FLAG_FILE).stat().st_mtime >= since
    except FileNotFoundError:
        return False


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Host and port of a meeting point."""
    match = ENDPOINT.fullmatch(endpoint)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise ConfigError(
            f"--rdzv-endpoint: {endpoint!r} is wrong because it is not HOST:PORT; give the first "
            "node's name and a free port."
        )
    return match["host"], int(match["port"])


def wait_for_name(host: str, patience_seconds: float, told_to_stop: Callable[[], bool]) -> bool:
    """Wait until a host name resolves: in Kubernetes it does so only once its pod has an address.
    False if told to stop first."""
    deadline = time.monotonic() + patience_seconds
    while not told_to_stop():
        try:
            socket.getaddrinfo(host, None)
            return True
        except socket.gaierror as failure:
            if time.monotonic() > deadline:
                raise StorageError(
                    f"{host}: is no known host after {patience_seconds:.0f} s because "
                    f"{failure.strerror}; check that the first node runs and its service has "
                    "publishNotReadyAddresses."
                ) from None
        time.sleep(1.0)
    return False


def ranks_of(launcher: subprocess.Popen) -> list[psutil.Process]:
    """The launcher's children that live."""
    try:
        children = psutil.Process(launcher.pid).children()
        return [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
    except psutil.NoSuchProcess:
        return []


def end_process(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def end_group(launcher: subprocess.Popen, number: signal.Signals) -> None:
    try:
        os.killpg(launcher.pid, number)
    except ProcessLookupError:
        return
