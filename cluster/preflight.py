"""All nodes of a job checked before it trains, and the bad one named.

What fails on every node is the job's fault; what fails on some is theirs. A node that does not
come, falls silent or is reached by nobody cannot say so: the first node judges for all.
"""

import json
import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist
from rich.table import Table
from rich.text import Text

from cluster.checks import Check, failed
from cluster.fabric import slow_members
from cluster.gpus import Promise
from cluster.launcher import Place, start_launcher
from cluster.meeting import Meeting, agreed_clock, await_keys, knock, meet, open_door
from cluster.node_checks import check_node, node_name, skew_verdict
from data_pipeline.errors import NodeUnfit, StorageError
from data_pipeline.plain import plain
from data_pipeline.terminal import Terminal
from t2v.recipe.recipe import RunConfig

# Longer than any check of a healthy node takes; what comes later hangs.
CHECK_SECONDS = 120.0
# A node that is mended is tried again after a while, and a name in `bad_nodes` need not be removed.
BAD_NODE_DAYS = 7
STARTING_SECONDS = 60.0


@dataclass(frozen=True)
class NodeReport:
    """What one node tells the first."""

    node: str
    checks: list[Check]
    clock: float = 0.0  # when it heard the first node's call
    rates: dict[str, float] = field(default_factory=dict)
    closed: dict[str, str] = field(default_factory=dict)  # nodes that it does not reach


@dataclass(frozen=True)
class Judgement:
    """What the first node makes of all reports."""

    exit_code: int
    problems: list[str]
    bad_nodes: list[str]


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
    store = meet(meeting)
    rank = meeting.node_rank
    door, address = open_door(meeting)
    with door:
        store.set(f"door/{rank}", address)
        store.set(f"name/{rank}", node_name())
        heard: list[Check] = []
        own = threading.Thread(target=lambda: heard.extend(_checks(config, meeting, promise)))
        own.daemon = True  # one that hangs must not keep this process
        own.start()
        if rank == 0:
            return _judge_all(store, meeting, recipe, own, heard)
        if _await_key(store, "go", meeting.timeout_seconds + CHECK_SECONDS):
            _tell_of_itself(store, meeting, own, heard)
            if _await_key(store, "try", 2 * CHECK_SECONDS):
                _tell_of_fabric(store, meeting, recipe)
        return [], _judgement_of(store, meeting)


def _judge_all(
    store: dist.Store, meeting: Meeting, recipe: Sequence[str], own: threading.Thread, heard: list
) -> tuple[list[NodeReport], Judgement]:
    """The first node: who came, who answered, who took part; whoever falls silent ends the rest."""
    everyone, seconds = range(meeting.nnodes), min(meeting.timeout_seconds, CHECK_SECONDS)
    reports: list[NodeReport] = []
    absent = await_keys(store, "name", everyone, meeting.timeout_seconds)
    silence = f"did not come within {meeting.timeout_seconds:g} s"
    if not absent:
        store.set("go", "1")
        _tell_of_itself(store, meeting, own, heard)
        absent = await_keys(store, "report", everyone, seconds)
        silence = f"came, and did not answer within {seconds:.0f} s: it hangs or has died"
    there = [number for number in everyone if number not in absent]
    if not absent or silence.startswith("came"):
        reports = [parse_report(store.get(f"report/{n}").decode()) for n in there]
    if absent:  # links are counted by the numbers of all nodes
        reports = [replace(report, closed={}) for report in reports]
    judgement = judge(reports) if reports else Judgement(0, [], [])
    if not absent and not judgement.exit_code:
        store.set("try", "1")
        _tell_of_fabric(store, meeting, recipe)
        absent = await_keys(store, "fabric", everyone, seconds + STARTING_SECONDS)
        silence = "took part in no all-reduce and fell silent: it hangs or has died"
        there = [number for number in everyone if number not in absent]
        told = {n: json.loads(store.get(f"fabric/{n}")) for n in there}
        reports = [_with_fabric(r, told[n]) if n in told else r for n, r in enumerate(reports)]
        judgement = judge(reports) if not absent else judgement
    if absent:
        judgement = of_the_silent(meeting, absent, silence, judgement)
    store.set("judgement", json.dumps(asdict(judgement)))
    await_keys(store, "bye", [n for n in everyone if n and n not in absent], STARTING_SECONDS)
    return reports, judgement


def of_the_silent(
    meeting: Meeting, absent: Sequence[int], silence: str, judgement: Judgement
) -> Judgement:
    """Nodes that say nothing are bad, but for all of several others: then it is the first node, or
    what lies between."""
    problems = [f"{meeting.name(number)}: {silence}" for number in absent]
    everyone_else = meeting.nnodes > 2 and len(absent) == meeting.nnodes - 1
    if everyone_else or not meeting.knows_names():
        return Judgement(
            StorageError.exit_code, [*problems, *judgement.problems], judgement.bad_nodes
        )
    bad = [*judgement.bad_nodes, *(meeting.name(number) for number in absent)]
    return Judgement(NodeUnfit.exit_code, [*problems, *judgement.problems], bad)


def _checks(config: RunConfig, meeting: Meeting, promise: Promise | None) -> list[Check]:
    return check_node(config, ranks=meeting.place.nproc_per_node, promise=promise)


def _tell_of_itself(
    store: dist.Store, meeting: Meeting, own: threading.Thread, heard: list[Check]
) -> None:
    clock = agreed_clock(store, meeting)
    closed = knock(store, meeting)
    own.join(CHECK_SECONDS - 1)
    checks = list(heard)
    if own.is_alive():
        found = f"no end within {CHECK_SECONDS - 1:.0f} s: a disk or the driver does not answer"
        checks = [Check("checks", "failed", found, StorageError.exit_code)]
    elif not checks:
        checks = [Check("checks", "failed", "ended with an error of their own: see its log", 1)]
    report = NodeReport(node_name(), checks, clock, closed=closed)
    store.set(f"report/{meeting.node_rank}", json.dumps(asdict(report)))


def _tell_of_fabric(store: dist.Store, meeting: Meeting, recipe: Sequence[str]) -> None:
    place = replace(meeting.place, rdzv_endpoint=next_port(meeting.place.rdzv_endpoint))
    found = try_fabric(place, recipe, min(meeting.timeout_seconds, CHECK_SECONDS))
    store.set(f"fabric/{meeting.node_rank}", json.dumps(found))


def _with_fabric(report: NodeReport, told: dict[str, Any]) -> NodeReport:
    if "failure" in told:
        lost = Check("all-reduce", "failed", told["failure"], StorageError.exit_code)
        return replace(report, checks=[*report.checks, lost])
    together = Check("all-reduce", "ok", f"{gigabytes(told.get('all', 0.0))} over all ranks")
    return replace(report, checks=[*report.checks, together], rates=told)


def try_fabric(place: Place, recipe: Sequence[str], seconds: float) -> dict[str, Any]:
    """What this node's ranks saw of the fabric, the slowest of them counting; or its failure."""
    with tempfile.TemporaryDirectory(prefix="t2v-fabric-") as folder:
        log = Path(folder, "launcher.log")
        arguments = [folder, str(seconds), str(place.nproc_per_node), *recipe]
        with log.open("w", encoding="utf-8") as file:
            launcher = start_launcher(place, "cluster.fabric", arguments, file, stdout=file)
            try:
                launcher.wait(seconds + STARTING_SECONDS / 2)
            except subprocess.TimeoutExpired:
                for process in psutil.Process(launcher.pid).children(recursive=True):
                    process.kill()
                launcher.kill()
                launcher.wait()
                return {"failure": f"no end within {seconds + STARTING_SECONDS / 2:.0f} s"}
        found = [json.loads(path.read_text()) for path in Path(folder).glob("rank-*.json")]
        if launcher.returncode or len(found) != place.nproc_per_node:
            return {"failure": last_error(log.read_text(encoding="utf-8", errors="replace"))}
    return {name: min(one[name] for one in found) for name in found[0]}


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


def _judgement_of(store: dist.Store, meeting: Meeting) -> Judgement:
    try:
        if not _await_key(store, "judgement", 4 * CHECK_SECONDS):
            raise dist.DistError("it does not judge")
        judgement = Judgement(**json.loads(store.get("judgement")))
        store.set(f"bye/{meeting.node_rank}", "1")
    except (dist.DistError, RuntimeError) as failure:
        raise StorageError(
            f"{meeting.name(0)}: the first node is gone because "
            f"{str(failure).splitlines()[0]}; look at its log."
        ) from None
    return judgement


def judge(reports: list[NodeReport]) -> Judgement:
    """Who or what is at fault; a pure function of the reports."""
    problems: list[str] = []
    bad: dict[str, None] = {}
    code = 0
    names = dict.fromkeys(check.name for report in reports for check in failed(report.checks))
    for name in names:
        failing = [
            (report.node, check)
            for report in reports
            for check in failed(report.checks)
            if check.name == name
        ]
        is_alone = len(reports) == 1
        theirs = len({node for node, _ in failing}) < len(reports)
        theirs = theirs or any(is_alone and check.is_of_node for _, check in failing)
        if not theirs and all(check.exit_code for _, check in failing):
            code = code or failing[0][1].exit_code
            problems.append(f"every node: {name}: {failing[0][1].found}")
            continue
        for node, check in failing:
            bad[node] = None
            problems.append(f"{node}: {name}: {check.found}")
    for report, problem in comparisons(reports):
        bad[report.node] = None
        problems.append(f"{report.node}: {problem}")
    cut_off, open_question = unreached(reports)
    for number in cut_off:
        bad[reports[number].node] = None
    problems += open_question
    if open_question and not cut_off:
        code = code or StorageError.exit_code
    return Judgement(code or (NodeUnfit.exit_code if bad else 0), problems, list(bad))


def unreached(reports: list[NodeReport]) -> tuple[list[int], list[str]]:
    """Nodes none of whose links work, where others' do; and a line for each link that does not."""
    links, broken = set(), {}
    for number, report in enumerate(reports):
        for step in (1, 2):
            other = (number + step) % len(reports)
            if other != number:
                links.add(frozenset((number, other)))
        for other, where in report.closed.items():
            broken[frozenset((number, int(other)))] = (
                f"{report.node}: does not reach {reports[int(other)].node} at {where}"
            )
    of = {n: [link for link in links if n in link] for n in range(len(reports))}
    cut_off = [n for n, own in of.items() if own and all(link in broken for link in own)]
    is_clear = 0 < len(cut_off) < len(reports) - 1
    return (cut_off if is_clear else []), list(broken.values())


def comparisons(reports: list[NodeReport]) -> list[tuple[NodeReport, str]]:
    """What only shows between nodes: other versions, another clock, a slow link."""
    found = []
    usual_clock = statistics.median_low(report.clock for report in reports)
    told = [next((c.found for c in r.checks if c.name == "versions"), "") for r in reports]
    usual = max(dict.fromkeys(told), key=told.count)
    for report, versions in zip(reports, told, strict=True):
        if versions != usual:
            found.append((report, f"has {versions}, the others {usual}"))
        if skew_verdict(report.clock - usual_clock) == "failed":
            found.append((report, f"its clock differs by {report.clock - usual_clock:+.1f} s"))
    for number in slow_members(pair_rates(reports)):
        best = max(rate for pair, rate in pair_rates(reports).items() if number in pair)
        found.append((reports[number], f"slow: {gigabytes(best)} with its best partner"))
    return found


def pair_rates(reports: list[NodeReport]) -> dict[tuple[int, int], float]:
    """Bytes per second of each pair of nodes, on GPUs: a busy CPU's sums tell of its load only."""
    rates: dict[tuple[int, int], float] = {}
    for report in reports:
        if not report.rates.get("on_gpu"):
            continue
        for name, rate in report.rates.items():
            first, dash, second = name.partition("-")
            if dash:
                pair = (int(first), int(second))
                rates[pair] = min(rate, rates.get(pair, rate))
    return rates


def parse_report(text: str) -> NodeReport:
    """A report as its node wrote it."""
    content = json.loads(text)
    checks = [Check(**check) for check in content.pop("checks")]
    return NodeReport(checks=checks, **content)


def own_exit_code(judgement: Judgement, node: str, *, speaks: bool) -> int:
    """A job's fault is every node's; a node's fault is its own, and the first node's to say, for
    one that has died cannot."""
    if judgement.exit_code != NodeUnfit.exit_code or speaks or node in judgement.bad_nodes:
        return judgement.exit_code
    return 0


def note_bad_nodes(judgement: Judgement) -> None:
    """Write bad nodes into the file that `T2V_BAD_NODES` names, for the scheduler to avoid for
    some days: a name and an end per line."""
    path = os.environ.get("T2V_BAD_NODES")
    if path and judgement.bad_nodes:
        end = datetime.now(UTC) + timedelta(days=BAD_NODE_DAYS)
        with Path(path).open("a", encoding="utf-8") as file:
            for name in filter(str.strip, judgement.bad_nodes):
                file.write(f"{name} {end.isoformat(timespec='seconds')}\n")


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


def gigabytes(rate: float) -> str:
    """`12.3 GB/s`."""
    return f"{rate / 1e9:.2f} GB/s"
