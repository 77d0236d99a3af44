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
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import psutil

from cluster.bad_nodes import node_name
from cluster.ending import exit_code_of
from cluster.gpu_events import GpuWatch
from cluster.heartbeat import BEAT_SECONDS, beat, heartbeat_file
from cluster.node_records import (
    only_told,
    tell,
    tell_failed_start,
    tell_of_bad_place,
    tell_site,
    tell_whom_to_avoid,
    write_record,
)
from cluster.requeue import PREEMPTED
from cluster.status import NodeRecord, last_nodes
from cluster.torchrun import (
    Place,
    begin_launcher,
    end_group,
    split_endpoint,
    start_launcher,
)
from data_pipeline.errors import ConfigError, StorageError, UserError
from data_pipeline.printable import say
from t2v.attempt import preemption
from t2v.attempt.files import read_mapping, seconds_of
from t2v.attempt.preemption import FLAG_FILE, own_flag
from t2v.attempt.record import (
    FAILURES_IN_A_ROW,
    count_anew,
    failed_starts,
    job_id,
    next_number,
    pause_seconds,
    read_attempts,
)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
POLL_SECONDS = 0.2
# Beyond the port where ranks meet.
PREFLIGHT_PORTS = 100
# What preflight may take to end once it is told to.
ENDING_SECONDS = 10.0
# How long ranks may take to follow one that is gone: by then every collective has failed.
FOLLOW_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class NodeJob(Place):
    """One node's part of a job."""

    run_dir: Path
    train_arguments: tuple[str, ...]  # recipe and overrides of `t2v train`
    preflight: tuple[str, ...] | None = None  # its options, where nodes check each other first
    on_end: str | None = None  # a program of the site's, with arguments

    @property
    def name(self) -> str:
        return f"node-{self.node_rank:05d}"

    @property
    def flag(self) -> Path:
        """The request to stop this job alone: another one's on the same folder goes on."""
        return own_flag(self.run_dir, self.rdzv_id)

    def is_asked_to_stop(self, since: float) -> bool:
        """Whether an operator, or another node of this job, asks for it; a flag older than an
        earlier attempt's last word was meant for that one."""
        return any(
            os.path.exists(flag) and not is_older(flag, since)
            for flag in (self.run_dir / FLAG_FILE, self.flag)
        )


def run_node(job: NodeJob) -> int:
    """Start this node's ranks, see them through, and return the exit code of the run."""
    split_endpoint(job.rdzv_endpoint)
    requests = Requests()
    job.run_dir.mkdir(parents=True, exist_ok=True)
    since = last_word(job.run_dir)
    number = next_number(read_attempts(job.run_dir))
    log_dir = log_folder(job.run_dir, number)
    log_dir.mkdir(parents=True, exist_ok=True)
    host, name = socket.gethostname(), node_name()
    record = NodeRecord(node=job.name, host=host, started=time.time(), name=name)
    write_record(log_dir, record)
    with only_told():
        tell_of_bad_place(name)
    gpus = GpuWatch(lambda events: tell(log_dir, replace(record, gpu_events=events)))
    if job.node_rank == 0 and is_older(job.flag, since):
        job.flag.unlink(missing_ok=True)
    try:
        pause_after_failures(job, requests.heard)
        code, reason = begin(job, log_dir, record, requests, since)
    except UserError as failure:
        code, reason = failure.exit_code, str(failure)
    events, is_broken = gpus.close()
    ending = replace(record, ended=time.time(), exit_code=code, reason=reason, gpu_events=events)
    tell(log_dir, ending)
    if code:
        with only_told():
            tell_failed_start(job.run_dir, number, code, reason)
        with only_told():
            tell_whom_to_avoid(job, job.run_dir, log_dir, record, is_broken=is_broken)
    if job.on_end and job.node_rank == 0:
        tell_site(job.on_end, job.run_dir)
    say(f"{job.name}: {reason} (exit code {code}; logs: {log_dir})")
    return code


def begin(
    job: NodeJob, log_dir: Path, record: NodeRecord, requests: "Requests", since: float
) -> tuple[int, str]:
    """Check this node among its peers, then train; (exit code, why)."""
    if is_done(job):
        return 0, "done already: a pod that is made anew waits for nobody"
    if job.preflight is not None:
        code = run_preflight(job, requests, since)
        if code == PREEMPTED:
            return code, "told to stop before the ranks began"
        if code:
            return code, "preflight failed; the first node's log says what of which node"
    return see_through(job, log_dir, record, requests, since)


def is_done(job: NodeJob) -> bool:
    """Whether this very job has finished its run, and this node of it is only started again."""
    status = read_mapping(job.run_dir / "status.json")
    return status.get("state") == "done" and status.get("job_id") == job.rdzv_id


def run_preflight(job: NodeJob, requests: "Requests", since: float) -> int:
    """The exit code of `t2v preflight` on this node, at a port of its own."""
    host, port = split_endpoint(job.rdzv_endpoint)
    if not wait_for_name(host, job.rendezvous_timeout_seconds, requests.heard):
        return PREEMPTED
    command = [
        *(sys.executable, "-m", "t2v.cli", "preflight", "--nnodes", str(job.nnodes)),
        *("--nproc-per-node", str(job.nproc_per_node), "--node-rank", str(job.node_rank)),
        *("--rdzv-endpoint", f"{host}:{port + PREFLIGHT_PORTS}"),
        *("--timeout-seconds", str(job.rendezvous_timeout_seconds), *(job.preflight or ())),
        # `--clear-failures` is training's alone.
        *("--", *(word for word in job.train_arguments if not word.startswith("--"))),
        f"run_dir={json.dumps(str(job.run_dir))}",
    ]
    checking = subprocess.Popen(command, process_group=0, preexec_fn=begin_launcher)
    next_beat = 0.0
    while checking.poll() is None:
        if requests.heard() or job.is_asked_to_stop(since):
            end_group(checking, signal.SIGTERM)  # and with it the ranks that try the fabric
            with contextlib.suppress(subprocess.TimeoutExpired):
                checking.wait(ENDING_SECONDS)
            end_group(checking, signal.SIGKILL)
            checking.wait()
            return PREEMPTED
        if time.monotonic() >= next_beat:
            with contextlib.suppress(OSError):
                beat(heartbeat_file(), state="starting", step=0)
            next_beat = time.monotonic() + BEAT_SECONDS
        time.sleep(POLL_SECONDS)
    return checking.returncode if checking.returncode >= 0 else 128 - checking.returncode


def see_through(
    job: NodeJob, log_dir: Path, record: NodeRecord, requests: "Requests", since: float
) -> tuple[int, str]:
    """(exit code, why) once the ranks have ended."""
    host, _ = split_endpoint(job.rdzv_endpoint)
    if not wait_for_name(host, job.rendezvous_timeout_seconds, requests.heard):
        with only_told():
            job.flag.touch()
        return PREEMPTED, "told to stop before the ranks began"
    with (log_dir / f"launcher-{job.name}.log").open("w", encoding="utf-8") as log:
        arguments = [
            *(str(log_dir), *job.train_arguments),
            # Ranks and wrapper must look at the same flag file, wherever relative paths begin.
            f"run_dir={json.dumps(str(job.run_dir))}",
        ]
        launcher = start_launcher(job, "cluster.rank", arguments, log)
        returned = watch(job, launcher, requests, since)
    return exit_code_of(job.run_dir, log_dir, record, returned, asked=requests.heard())


def pause_after_failures(job: NodeJob, told_to_stop: Callable[[], bool]) -> None:
    """Back off after starts of this job that failed before the run began; ConfigError after three
    alike, which also begins the count anew for whoever starts it again."""
    failed = failed_starts(read_attempts(job.run_dir))
    if not failed or failed[-1].get("job_id") != job_id():
        return
    if len(failed) >= FAILURES_IN_A_ROW:
        if job.node_rank == 0:
            count_anew(job.run_dir)
        raise ConfigError(
            f"{job.run_dir}: is not started again because its last {len(failed)} starts failed "
            f"alike before the run began: {failed[-1].get('reason')}; correct the cause, then "
            "launch it again."
        )
    pause = pause_seconds(len(failed))
    left = (seconds_of(failed[-1].get("at")) or 0.0) + pause - time.time()
    # Never longer than that, whatever a clock that was set back says.
    until = time.monotonic() + min(left, pause)
    while time.monotonic() < until and not told_to_stop():
        time.sleep(POLL_SECONDS)


class Requests:
    """The scheduler's signals; the first is a request to stop, and so are all later ones."""

    def __init__(self) -> None:
        self.first: float | None = None
        for number in preemption.wanted(SIGNALS):
            signal.signal(number, self._receive)

    def heard(self) -> bool:
        return self.first is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.first = self.first or time.monotonic()


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
        # Again while no rank has begun: the start of the first node may have removed it.
        if requests.heard() and not (passed_on and most):
            ask_to_stop(job, ranks)
            passed_on = True
        if not most and job.is_asked_to_stop(since):
            end_group(launcher, signal.SIGTERM)  # no rank here has begun: none can answer
            launcher.wait()
            return PREEMPTED
        if most and len(ranks) < most:
            first_gone = first_gone or now
        overdue = requests.first is not None and now - requests.first > job.grace_seconds
        if overdue or (first_gone is not None and now - first_gone > FOLLOW_SECONDS):
            for rank in ranks:
                with contextlib.suppress(psutil.NoSuchProcess):
                    rank.kill()  # its child goes with it
        if now >= next_beat:
            with contextlib.suppress(OSError):  # a disk that fails here must not end the run
                status = read_mapping(job.run_dir / "status.json")
                state = status.get("state", "starting") if most else "starting"
                beat(heartbeat, state=state, step=status.get("step", 0))
            next_beat = now + BEAT_SECONDS
        time.sleep(POLL_SECONDS)
    return launcher.returncode


def log_folder(run_dir: Path, attempt: int) -> Path:
    """Where an attempt keeps its logs; every node finds the same, for the number of the one that
    begins is only raised once nodes have met, or failed to."""
    return run_dir / "logs" / f"attempt-{attempt:04d}"


def ask_to_stop(job: NodeJob, ranks: list[psutil.Process]) -> None:
    """Ask every rank of the job; those of this node alone where the disk does not take the word."""
    try:
        job.flag.touch()
    except OSError as failure:
        say(f"{job.flag}: {failure}; the ranks of this node are told by SIGTERM")
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.terminate()


def last_word(run_dir: Path) -> float:
    """When an earlier attempt, its ranks or its wrappers, was last heard of; 0: never."""
    told = seconds_of(read_mapping(run_dir / "status.json").get("updated")) or 0.0
    return max([told, *(node.ended or 0.0 for node in last_nodes(run_dir))])


def is_older(path: Path, seconds: float) -> bool:
    """Whether a file is there and older than a time."""
    try:
        return path.stat().st_mtime < seconds
    except OSError:
        return False


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
