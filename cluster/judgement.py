"""Who or what is at fault, by what the nodes of a job report of themselves and each other."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.checks import Check, failed
from cluster.fabric import slow_members
from cluster.node_checks import skew_verdict
from data_pipeline.errors import NodeUnfit, StorageError


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
    """What the first node makes of all reports, or the next one where the first fell silent."""

    exit_code: int
    problems: list[str]
    bad_nodes: list[str]
    judge: int = 0


def judge(reports: list[NodeReport]) -> Judgement:
    """Who or what is at fault; a pure function of the reports."""
    problems: list[str] = []
    bad: dict[str, None] = {}
    code = 0
    found: dict[str, list[tuple[str, Check]]] = {}
    for report in reports:
        for check in failed(report.checks):
            found.setdefault(check.name, []).append((report.node, check))
    for name, failing in found.items():
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


def of_the_silent(
    names: Mapping[int, str], nnodes: int, absent: Sequence[int], silence: str, judgement: Judgement
) -> Judgement:
    """Nodes that say nothing are bad, but for all of several others: then it is the first node, or
    what lies between. `names` are those that are known."""
    told = [f"{names.get(n, f'node number {n}')}: {silence}" for n in absent]
    problems = [*told, *judgement.problems]
    everyone_else = nnodes > 2 and len(absent) == nnodes - 1
    if everyone_else or not all(n in names for n in absent):
        return Judgement(StorageError.exit_code, problems, judgement.bad_nodes)
    bad = [*judgement.bad_nodes, *(names[n] for n in absent)]
    return Judgement(NodeUnfit.exit_code, problems, bad)


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


def with_fabric(
    reports: Sequence[NodeReport], told: Mapping[int, dict[str, Any]]
) -> list[NodeReport]:
    """Reports with what each node's ranks saw of the fabric. Where ranks of some nodes hang or were
    killed, the others could only fail."""
    causes = [n for n, found in told.items() if found.get("is_cause")]
    are_told_apart = 0 < len(causes) < len(reports)
    return [
        _with_rates(report, told[n], is_consequence=are_told_apart and n not in causes)
        for n, report in enumerate(reports)
    ]


def _with_rates(report: NodeReport, told: dict[str, Any], *, is_consequence: bool) -> NodeReport:
    rates, verdict = told, "ok"
    found = f"{gigabytes(told.get('all', 0.0))} over all ranks"
    if "failure" in told:
        rates, found = {}, told["failure"]
        verdict = "warning" if is_consequence else "failed"
    check = Check("all-reduce", verdict, found, StorageError.exit_code)
    return replace(report, checks=[*report.checks, check], rates=rates)


def gigabytes(rate: float) -> str:
    """`12.3 GB/s`."""
    return f"{rate / 1e9:.2f} GB/s"
