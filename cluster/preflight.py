"""All nodes of a job checked before it trains, and the bad one named.

What fails on every node is the job's fault; what fails on some is theirs.
"""

import json
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from cluster.fabric import measure, slow_members
from cluster.node_checks import Check, check_node, failed, node_name, skew_verdict
from data_pipeline.errors import StorageError, UserError
from t2v.recipe.recipe import RunConfig

PREFIX = "preflight"


class BadNode(UserError):
    """A node that a job should avoid."""

    exit_code = 69


@dataclass(frozen=True)
class Meeting:
    """Where the nodes of a job compare notes, and who of them this one is."""

    nnodes: int
    node_rank: int
    host: str
    port: int
    timeout_seconds: float = 120.0


@dataclass(frozen=True)
class NodeReport:
    """What one node tells the first."""

    node: str
    checks: list[Check]
    clock: float  # when it heard the first node's call
    rates: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Judgement:
    """What the first node makes of all reports."""

    exit_code: int
    problems: list[str]
    bad_nodes: list[str]


def check_alone(config: RunConfig, *, ranks: int) -> tuple[NodeReport, Judgement]:
    """This node by itself."""
    report = NodeReport(node_name(), check_node(config, ranks=ranks), time.time())
    return report, judge([report])


def check_together(
    config: RunConfig, meeting: Meeting, *, ranks: int
) -> tuple[list[NodeReport], Judgement]:
    """This node among its peers; every node gets the same judgement."""
    checks = check_node(config, ranks=ranks)
    store = meet(meeting)
    name, rank = node_name(), meeting.node_rank
    store.set(f"name/{rank}", name)
    absent = await_keys(store, "name", meeting)
    if absent:
        # The others cannot be asked; each of those present comes to the same answer.
        numbers = ", ".join(numbered(number, meeting) for number in absent)
        raise StorageError(
            f"preflight: of {meeting.nnodes} nodes, number {numbers} did not come within "
            f"{meeting.timeout_seconds:.0f} s; look at their logs."
        )
    clock = agreed_clock(store, meeting)
    rates = measured_rates(meeting, ranks=ranks)
    checks += rates.pop("checks", [])
    report = NodeReport(name, checks, clock, rates)
    store.set(f"report/{rank}", json.dumps(asdict(report)))
    await_keys(store, "report", meeting)
    reports = [
        parse_report(store.get(f"report/{number}").decode()) for number in range(meeting.nnodes)
    ]
    store.set(f"bye/{rank}", "1")
    if rank == 0:
        await_keys(store, "bye", meeting)  # the store ends with this process
    return reports, judge(reports)


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
        theirs = len({node for node, _ in failing}) < len(reports)
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
    return Judgement(code or (BadNode.exit_code if bad else 0), problems, list(bad))


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


def meet(meeting: Meeting) -> dist.Store:
    """The store of the first node."""
    try:
        store = dist.TCPStore(
            meeting.host,
            meeting.port,
            is_master=meeting.node_rank == 0,
            wait_for_workers=False,
            timeout=timedelta(seconds=meeting.timeout_seconds),
        )
    except (dist.DistError, RuntimeError) as failure:
        raise StorageError(
            f"{meeting.host}:{meeting.port}: the nodes cannot meet because "
            f"{str(failure).splitlines()[0].rstrip('.')}; check the first node and its port."
        ) from None
    return dist.PrefixStore(PREFIX, store)


def await_keys(store: dist.Store, name: str, meeting: Meeting) -> list[int]:
    """Wait for a key of every node; the numbers of those that did not set it in time."""
    deadline = time.monotonic() + meeting.timeout_seconds
    missing = list(range(meeting.nnodes))
    while missing:
        missing = [number for number in missing if not store.check([f"{name}/{number}"])]
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return missing


def numbered(number: int, meeting: Meeting) -> str:
    """A node's number, and its name where a batch script tells those of all nodes."""
    names = os.environ.get("T2V_NODE_NAMES", "").split()
    return f"{number} ({names[number]})" if len(names) == meeting.nnodes else str(number)


def agreed_clock(store: dist.Store, meeting: Meeting) -> float:
    """This node's time when the first node called, to the 20 ms of a poll."""
    if meeting.node_rank == 0:
        store.set("call/0", "now")
    while not store.check(["call/0"]):
        time.sleep(0.02)
    return time.time()


def measured_rates(meeting: Meeting, *, ranks: int) -> dict[str, Any]:
    """What this node's ranks saw of the fabric, the slowest of them counting."""
    try:
        if ranks == 1:
            found = [_measure(meeting, 0, ranks)]
        else:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(ranks, mp_context=context) as pool:
                found = list(pool.map(_measure, [meeting] * ranks, range(ranks), [ranks] * ranks))
    except (dist.DistError, RuntimeError, ArithmeticError) as failure:
        reason = str(failure).splitlines()[0]
        return {"checks": [Check("all-reduce", "failed", reason, StorageError.exit_code)]}
    rates = {name: min(one[name] for one in found) for name in found[0]}
    together = Check("all-reduce", "ok", f"{gigabytes(rates['all'])} over all ranks")
    return {**rates, "on_gpu": float(torch.cuda.is_available()), "checks": [together]}


def _measure(meeting: Meeting, local: int, ranks: int) -> dict[str, float]:
    """One rank's measurement; it meets the others at the first node's store."""
    store = dist.TCPStore(meeting.host, meeting.port, is_master=False, wait_for_workers=False)
    return measure(
        dist.PrefixStore("fabric", store),
        meeting.node_rank * ranks + local,
        meeting.nnodes * ranks,
        ranks_per_node=ranks,
        timeout_seconds=meeting.timeout_seconds,
    )


def parse_report(text: str) -> NodeReport:
    """A report as its node wrote it."""
    content = json.loads(text)
    checks = [Check(**check) for check in content.pop("checks")]
    return NodeReport(checks=checks, **content)


def own_exit_code(judgement: Judgement, node: str) -> int:
    """A job's fault is every node's; a node's fault is its own."""
    if judgement.exit_code != BadNode.exit_code:
        return judgement.exit_code
    return BadNode.exit_code if node in judgement.bad_nodes else 0


def print_reports(reports: list[NodeReport], judgement: Judgement) -> None:
    """A table of all nodes and what is wrong."""
    table = Table("node", "check", "", "found")
    marks = {"ok": "ok", "warning": "[yellow]warning[/]", "failed": "[red]failed[/]"}
    for report in reports:
        for check in report.checks:
            table.add_row(report.node, check.name, marks[check.verdict], check.found)
    Console().print(table)
    for problem in judgement.problems:
        print(problem)


def to_json(reports: list[NodeReport], judgement: Judgement) -> str:
    """All findings for a program."""
    nodes = [asdict(report) for report in reports]
    return json.dumps({**asdict(judgement), "nodes": nodes})


def gigabytes(rate: float) -> str:
    """`12.3 GB/s`."""
    return f"{rate / 1e9:.2f} GB/s"
