"""How an attempt ended, by what its ranks, its launcher and its status left, and by whose fault."""

from pathlib import Path
from typing import Any

from cluster.bad_nodes import BROKEN_DAYS, SLOW_DAYS
from cluster.rank import how
from cluster.status import (
    NodeRecord,
    records_in,
    sound,
    straggler_of,
)
from cluster.torchrun import root_cause
from t2v.attempt.files import read_mapping, seconds_of
from t2v.attempt.record import PREEMPTED

HANG = 71
# Of a step: below, a slow node costs less than the search for another one.
AVOIDED_SHARE = 0.2


def exit_code_of(
    run_dir: Path, log_dir: Path, record: NodeRecord, returned: int, *, asked: bool
) -> tuple[int, str]:
    """(exit code, why) of an attempt whose launcher returned `returned`.

    Best word first: the earliest failure record, the run's status, what the launcher saw of its
    own ranks.
    """
    since = int(record.started)
    if returned == 0:
        return 0, "done"
    status = read_mapping(run_dir / "status.json")
    is_fresh = (seconds_of(status.get("updated")) or 0.0) >= since
    if is_fresh and status.get("state") == "done":
        return 0, "done"
    first = first_failure(log_dir, since)
    if first and first["exit_code"] != PREEMPTED:
        rank, reason = f"rank {first.get('rank')}", str(first.get("reason"))
        said = reason if reason.startswith(f"{rank} ") else f"{rank}: {reason}"
        return int(first["exit_code"]), said
    if is_fresh and status.get("state") == "preempted":
        return PREEMPTED, f"preempted at step {status.get('step')}, saved"
    if is_fresh and status.get("state") == "failed" and status.get("exit_code"):
        return int(status["exit_code"]), str(status.get("reason"))
    if returned == PREEMPTED:
        return PREEMPTED, "told to stop before the ranks began"
    seen = root_cause(launcher_log(record, log_dir))
    if seen is None:
        if asked:
            return PREEMPTED, "told to stop; nothing newer was saved"
        return 1, f"the launcher ended with {returned}: {last_words(record, log_dir)}"
    rank, code = seen
    return 128 - code if code < 0 else code, f"rank {rank} {how(code)}"


def launcher_log(record: NodeRecord, log_dir: Path) -> str:
    path = log_dir / f"launcher-{record.node}.log"
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def last_words(record: NodeRecord, log_dir: Path) -> str:
    """The launcher's last error in one line, or where to look."""
    lines = [line for line in launcher_log(record, log_dir).splitlines() if "Error: " in line]
    return lines[-1].strip()[-300:] if lines else "its log says why"


def first_failure(log_dir: Path, since: float) -> dict[str, Any]:
    """The earliest failure that a rank of this attempt has recorded; empty where none has."""
    failures = [read_mapping(path) for path in log_dir.glob("failure-rank-*.json")]
    fresh = [f for f in failures if f.get("exit_code") and (seconds_of(f.get("at")) or 0) >= since]
    return min(fresh, key=lambda failure: seconds_of(failure["at"]) or 0.0, default={})


def culprits(run_dir: Path, log_dir: Path, record: NodeRecord, ranks: int) -> dict[str, float]:
    """Nodes of `ranks` ranks that the next attempt should avoid, and for how many days: that of a
    rank that hung in a step while those of other nodes waited for it, and that of a rank which was
    slow to the end. A hang among the ranks of one node may be the program's own."""
    names = {node.node: node.name for node in records_in(log_dir)}

    def node_of(rank: int) -> str:
        return names.get(f"node-{rank // ranks:05d}", "")

    found = {}
    since = int(record.started)
    status = sound(read_mapping(run_dir / "status.json"))
    is_fresh = (seconds_of(status.get("updated")) or 0.0) >= since
    slow = straggler_of(status) if is_fresh else None
    if slow is not None and slow["share"] >= AVOIDED_SHARE and status.get("state") != "done":
        found[node_of(int(slow["rank"]))] = SLOW_DAYS
    failure = first_failure(log_dir, since)
    hung = failure.get("exit_code") == HANG and failure.get("section") == "step"
    if hung and len(names) > 1 and isinstance(failure.get("rank"), int):
        found[node_of(failure["rank"])] = BROKEN_DAYS
    return {name: days for name, days in found.items() if name}
