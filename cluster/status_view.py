"""The status of runs for people and programs: one of them in full, or many at a glance."""

import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.table import Table

from cluster.status import RunStatus, run_status
from data_pipeline.errors import InputMissing
from data_pipeline.terminal import Terminal


def statuses(folders: Sequence[Path]) -> list[RunStatus]:
    """The status of each run among some folders; InputMissing where none of them is one."""
    found, refusals = [], []
    for folder in folders:
        try:
            found.append(run_status(folder))
        except InputMissing as refusal:
            refusals.append(refusal)
    if not found:
        raise refusals[0]
    return found


def watch(folders: Sequence[Path], *, every_seconds: float) -> None:
    """Show runs anew every so often, until none of them goes on."""
    console = Terminal()
    with Live(console=console, auto_refresh=False, screen=False) as live:
        while True:
            found = statuses(folders)
            live.update(shown(found), refresh=True)
            if all(status.has_ended for status in found):
                return
            time.sleep(every_seconds)


def shown(found: Sequence[RunStatus]) -> Table:
    """One run in full, or many at a glance."""
    return one_run(found[0]) if len(found) == 1 else many_runs(found)


def many_runs(found: Iterable[RunStatus]) -> Table:
    """A line for each run."""
    columns = ("run", "state", "step", "samples/s", "goodput", "time left", "checkpoint")
    table = Table(*columns, "restarts", "last word")
    for status in found:
        age = spell(status.last_checkpoint_age_seconds)
        table.add_row(
            Path(status.run_dir).name,
            f"{status.state} ({status.exit_code})" if status.exit_code else status.state,
            f"{status.step} of {status.total_steps}" if status.total_steps else str(status.step),
            f"{status.samples_per_second:.1f}" if status.samples_per_second else "",
            f"{status.goodput:.0%}" if status.goodput is not None else "",
            spell(status.eta_seconds),
            f"{status.last_checkpoint}, {age}" if status.last_checkpoint is not None else "",
            str(status.restarts),
            _last_word(status) + (" (stale)" if status.is_stale else ""),
        )
    return table


def print_statuses(found: Sequence[RunStatus], console: Terminal | None = None) -> None:
    """A table for a terminal."""
    # What is no terminal is as wide as it must be: a log, or a program that looks for a word.
    width = None if sys.stdout.isatty() else 160
    (console or Terminal(width=width)).print(shown(found))


def one_run(status: RunStatus) -> Table:
    """All that is known of a run."""
    table = Table(show_header=False, title=status.run_dir)
    state = status.state
    if status.exit_code is not None:
        state += f" (exit code {status.exit_code})"
    if status.is_stale:
        state += f", but silent for {spell(status.silent_seconds)}: is the job still there?"
    rows = [
        ("state", state),
        ("reason", status.reason),
        ("step", f"{status.step} of {status.total_steps}" if status.total_steps else status.step),
        ("rate", f"{status.samples_per_second:.1f} samples/s" if status.samples_per_second else ""),
        ("time left", spell(status.eta_seconds)),
        ("last checkpoint", _checkpoint_text(status)),
        ("restarts", status.restarts),
        ("failures without progress", status.failures_without_progress or ""),
        ("samples replaced", _data_text(status)),
        ("steps skipped", status.skipped_steps or ""),
        ("slow", straggler_text(status.straggler)),
        ("GPUs", "; ".join(status.gpu_events)),
        ("last word", _last_word(status)),
        ("if it has ended", status.decision),
    ]
    for name, value in rows:
        if value not in ("", None):
            table.add_row(name, str(value))
    return table


def to_json(status: RunStatus) -> str:
    """The status for a program."""
    return json.dumps(asdict(status))


def spell(seconds: float | None) -> str:
    """`3 h 12 min`; empty for None."""
    if seconds is None:
        return ""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min"


def straggler_text(found: dict[str, Any] | None) -> str:
    """`rank 3 on n2: others waited for it 31 % of 100 steps`; empty for none."""
    if found is None:
        return ""
    return (
        f"rank {found['rank']} on {found['host']}: others waited for it {found['share']:.0%} of "
        f"{found['steps']} steps"
    )


def _last_word(status: RunStatus) -> str:
    return "" if status.silent_seconds is None else f"{spell(status.silent_seconds)} ago"


def _checkpoint_text(status: RunStatus) -> str:
    if status.last_checkpoint is None:
        return "none yet"
    return f"step {status.last_checkpoint}, {spell(status.last_checkpoint_age_seconds)} old"


def _data_text(status: RunStatus) -> str:
    if not status.quarantined_share:
        return str(status.quarantined)
    return f"{status.quarantined} ({status.quarantined_share:.3%})"
