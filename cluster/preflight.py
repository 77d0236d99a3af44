"""All nodes of a job checked before it trains, and the bad one named.

What fails on every node is the job's fault; what fails on some is theirs. A node that does not
come, falls silent or is reached by nobody cannot say so: the first node judges for all.
"""

import json
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist
from rich.table import Table
from rich.text import Text

from cluster.bad_nodes import node_name
from cluster.checks import CHECK_SECONDS, STARTING_SECONDS, Check
from cluster.driver import Promise
from cluster.judgement import (
    Judgement,
    NodeReport,
    judge,
    of_the_silent,
    parse_report,
    with_fabric,
)
from cluster.node_checks import check_node
from cluster.rendezvous import JUDGEMENT, Meeting, Seat, agreed_clock, await_keys, knock, seated
from cluster.torchrun import KILLED, Place, root_cause, start_launcher
from data_pipeline.errors import NodeUnfit, StorageError
from data_pipeline.printable import plain
from data_pipeline.terminal import Terminal
from t2v.recipe.recipe import RunConfig

POLL_SECONDS = 0.2
# What a node may take to end its ranks.
ENDING_SECONDS = 10.0
GONE = "came, and fell silent: it hangs or has died"


def check_alone(
    config: RunConfig, *, ranks: int, promise: Promise | None = None
) -> tuple[NodeReport, Judgement]:
    """This node by itself."""
    checks = check_node(config, ranks=ranks, promise=promise)
    report = NodeReport(node_name(), checks, time.time())
    return report, judge([report])


def check_together(
    config: RunConfig,
    meeting: Meeting,
    *,
    recipe: Sequence[str],
    promise: Promise | None = None,
) -> tuple[list[NodeReport], Judgement]:
    """This node among its peers; every node gets the judgement, and the first the reports.

    `recipe` is the file and the overrides, for the ranks that try the fabric.
    """
    ranks = meeting.nproc_per_node
    own = OwnChecks(lambda: check_node(config, ranks=ranks, promise=promise))
    if meeting.node_rank:
        return [], _take_part(meeting, own, recipe)
    with seated(meeting, node_name()) as seat:
        return _judge_all(seat, own, recipe)


class OwnChecks:
    """A node's checks of itself, beside whatever it waits for."""

    def __init__(self, check: Callable[[], list[Check]]) -> None:
        self._found: list[Check] = []
        self._thread = threading.Thread(target=lambda: self._found.extend(check()), daemon=True)
        self._thread.start()  # one that hangs does not keep this process

    def within(self, seconds: float) -> list[Check]:
        """What was found by then."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            found = f"no end within {seconds:.0f} s: a disk or the driver does not answer"
            return [Check("checks", "failed", found, StorageError.exit_code)]
        if not self._found:
            return [Check("checks", "failed", "ended with an error of their own: see its log", 1)]
        return list(self._found)


def phase_seconds(meeting: Meeting) -> float:
    """How long the checks, or the fabric's trial, may take."""
    return min(meeting.rendezvous_timeout_seconds, CHECK_SECONDS)


def _judge_all(
    seat: Seat, own: OwnChecks, recipe: Sequence[str]
) -> tuple[list[NodeReport], Judgement]:
    """The first node: who came, who answered, who took part; whoever falls silent ends the rest."""
    meeting, store, silent = seat.meeting, seat.store, seat.pulse.silent
    everyone, seconds = range(meeting.nnodes), phase_seconds(meeting)
    reports: list[NodeReport] = []
    judgement = Judgement(0, [], [])
    absent = await_keys(store, "name", everyone, meeting.rendezvous_timeout_seconds)
    silence = f"did not come within {meeting.rendezvous_timeout_seconds:g} s"
    if not absent:
        silence = GONE
        store.set("go", "1")
        _tell_of_itself(seat, own)
        absent = await_keys(store, "report", everyone, seconds, silent)
        there = [number for number in everyone if number not in absent]
        there = [number for number in there if store.check([f"report/{number}"])]
        reports = [parse_report(store.get(f"report/{n}").decode()) for n in there]
        if absent:  # links are counted by the numbers of all nodes
            reports = [replace(report, closed={}) for report in reports]
        judgement = judge(reports) if reports else judgement
    if not absent and not judgement.exit_code:
        store.set("try", "1")
        until = time.monotonic() + seconds + STARTING_SECONDS
        _tell_of_fabric(seat, recipe, lambda: bool(silent(everyone)))
        left = max(until - time.monotonic(), ENDING_SECONDS)
        absent = await_keys(store, "fabric", everyone, left, silent)
        if not absent:
            told = {n: json.loads(store.get(f"fabric/{n}")) for n in everyone}
            reports = with_fabric(reports, told)
            judgement = judge(reports)
    if absent:
        names = seat.names(everyone)
        judgement = of_the_silent(names, meeting.nnodes, absent, silence, judgement)
    store.set(JUDGEMENT, json.dumps(asdict(judgement)))
    others = [number for number in everyone if number and number not in absent]
    await_keys(store, "bye", others, STARTING_SECONDS, silent)
    return reports, judgement


def _take_part(meeting: Meeting, own: OwnChecks, recipe: Sequence[str]) -> Judgement:
    """Another node: a first one that falls silent may leave calls to its store without an end, so
    these are made by a thread that need not come back."""
    seats: list[Seat] = []
    found: list[Judgement] = []
    refused: list[Exception] = []

    def work() -> None:
        try:
            with seated(meeting, node_name()) as seat:
                seats.append(seat)
                found.append(_follow(seat, own, recipe))
        except Exception as failure:
            refused.append(failure)

    working = threading.Thread(target=work, daemon=True)
    working.start()
    latest = time.monotonic() + meeting.rendezvous_timeout_seconds + STARTING_SECONDS
    while working.is_alive():
        working.join(POLL_SECONDS)
        if seats and seats[0].pulse.silent([0]):
            working.join(ENDING_SECONDS)
            break
        if not seats and time.monotonic() > latest:
            raise _first_is_gone(meeting.names.get(0), "it does not answer")
    if found:
        return found[0]
    if refused and not (seats and isinstance(refused[0], dist.DistError | RuntimeError)):
        raise refused[0]
    return _without_the_first(seats[0])


def _follow(seat: Seat, own: OwnChecks, recipe: Sequence[str]) -> Judgement:
    """What the first node asks of another one, and makes of it."""
    meeting, store = seat.meeting, seat.store
    if _await_key(store, "go", meeting.rendezvous_timeout_seconds + CHECK_SECONDS):
        _tell_of_itself(seat, own)
        if _await_key(store, "try", 2 * CHECK_SECONDS):
            pulse = seat.pulse
            _tell_of_fabric(seat, recipe, lambda: pulse.is_over.is_set() or bool(pulse.silent([0])))
    if not _await_key(store, JUDGEMENT, 4 * CHECK_SECONDS):
        raise _first_is_gone(meeting.names.get(0), "it does not judge")
    judgement = Judgement(**json.loads(store.get(JUDGEMENT)))
    store.set(f"bye/{meeting.node_rank}", "1")
    return judgement


def _without_the_first(seat: Seat) -> Judgement:
    """The first node fell silent: it is bad if this one reaches another; else it may be this one
    that is cut off. The second node tells of it."""
    name, others = seat.meeting.names.get(0), {n: door for n, door in seat.doors.items() if n}
    if name is None or len(knock(others)) == len(others):
        raise _first_is_gone(name, "its store does not answer")
    return Judgement(NodeUnfit.exit_code, [f"{name}: {GONE}"], [name], judge=1)


def _first_is_gone(name: str | None, why: str) -> StorageError:
    who = name or "node number 0"
    return StorageError(f"{who}: the first node is gone because {why}; look at its log.")


def _tell_of_itself(seat: Seat, own: OwnChecks) -> None:
    clock = agreed_clock(seat.store, seat.meeting)
    seat.find_doors()
    closed = knock(seat.doors)
    checks = own.within(phase_seconds(seat.meeting) - 1)
    report = NodeReport(node_name(), checks, clock, closed=closed)
    seat.store.set(f"report/{seat.meeting.node_rank}", json.dumps(asdict(report)))


def _tell_of_fabric(seat: Seat, recipe: Sequence[str], is_over: Callable[[], bool]) -> None:
    place = replace(seat.meeting, rdzv_endpoint=next_port(seat.meeting.rdzv_endpoint))
    found = try_fabric(place, recipe, phase_seconds(seat.meeting), is_over)
    seat.store.set(f"fabric/{place.node_rank}", json.dumps(found))


def try_fabric(
    place: Place, recipe: Sequence[str], seconds: float, is_over: Callable[[], bool]
) -> dict[str, Any]:
    """What this node's ranks saw of the fabric, the slowest of them counting; or their failure.

    Ranks wait for each other half the time: those that still run at its end hang by themselves.
    """
    with tempfile.TemporaryDirectory(prefix="t2v-fabric-") as folder:
        log = Path(folder, "launcher.log")
        arguments = [folder, str(seconds / 2), str(place.nproc_per_node), *recipe]
        deadline = time.monotonic() + seconds + STARTING_SECONDS / 2
        with log.open("w", encoding="utf-8") as file:
            launcher = start_launcher(place, "cluster.fabric", arguments, file, stdout=file)
            while launcher.poll() is None:
                time.sleep(POLL_SECONDS)
                is_late = time.monotonic() > deadline
                if is_late or is_over():
                    end_ranks(launcher)
                    return {"failure": "its ranks hang" if is_late else "", "is_cause": is_late}
        found = [json.loads(path.read_text()) for path in Path(folder).glob("rank-*.json")]
        if launcher.returncode or len(found) != place.nproc_per_node:
            said = log.read_text(encoding="utf-8", errors="replace")
            cause = root_cause(said)
            if cause is not None and -cause[1] in KILLED:
                return {"failure": f"rank {cause[0]} was killed", "is_cause": True}
            return {"failure": last_error(said)}
    return {name: min(one[name] for one in found) for name in found[0]}


def end_ranks(launcher: subprocess.Popen) -> None:
    """Kill a launcher and its ranks."""
    for process in psutil.Process(launcher.pid).children(recursive=True):
        process.kill()
    launcher.kill()
    launcher.wait()


def last_error(log: str) -> str:
    """The line of a launcher's log that says most."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    told = [line for line in lines if "Error" in line and "ChildFailedError" not in line]
    return (told or lines or ["it said nothing"])[-1][:300]


def next_port(endpoint: str) -> str:
    """The port beside a meeting's own, for what is started there."""
    host, _, port = endpoint.rpartition(":")
    return f"{host}:{int(port) + 1}"


def _await_key(store: dist.Store, name: str, seconds: float) -> bool:
    """Whether a key is set before the judgement is."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if store.check([name]):
            return True
        if store.check(["judgement"]):
            return False
        time.sleep(0.1)
    return False


def print_reports(reports: list[NodeReport], judgement: Judgement) -> None:
    """A table of all nodes and what is wrong."""
    table = Table("node", "check", "", "found")
    colours = {"ok": "", "warning": "yellow", "failed": "red"}
    for report in reports:
        for check in report.checks:
            table.add_row(
                report.node, check.name, Text(check.verdict, colours[check.verdict]), check.found
            )
    Terminal().print(table)
    for problem in judgement.problems:
        print(plain(problem))


def to_json(reports: list[NodeReport], judgement: Judgement) -> str:
    """All findings for a program."""
    nodes = [asdict(report) for report in reports]
    return json.dumps({**asdict(judgement), "nodes": nodes})
