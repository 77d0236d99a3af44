"""What the wrapper of a node writes down and says of its part of an attempt."""

import contextlib
import json
import os
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from cluster.bad_nodes import note_bad_nodes, read_bad_nodes
from cluster.ending import culprits
from cluster.status import NodeRecord, run_status
from cluster.torchrun import Place
from data_pipeline.errors import UserError
from data_pipeline.printable import plain, say
from data_pipeline.store import storage
from t2v.attempt.record import append_attempt, failed_start_line, read_attempts

# What a site's own program may take at the end of an attempt.
SITE_SECONDS = 60.0


@contextlib.contextmanager
def only_told() -> Iterator[None]:
    """What an attempt leaves behind never changes how it ended: a full disk is named."""
    try:
        yield
    except (OSError, UserError) as failure:
        say(f"a record is missing because {failure}")


def write_record(log_dir: Path, record: NodeRecord) -> None:
    content = json.dumps(asdict(record)).encode()
    storage.write_atomic(log_dir / f"{record.node}.json", content)


def tell(log_dir: Path, record: NodeRecord) -> None:
    """Replace this node's record, if the disk allows."""
    with only_told():
        write_record(log_dir, record)


def tell_of_bad_place(name: str) -> None:
    """Say that a scheduler has placed a job where its run should not be: pods of a JobSet are made
    anew by the template they had, and a job that waits may not be told."""
    path = Path(os.environ.get("T2V_BAD_NODES") or os.devnull)
    if name in read_bad_nodes(path):
        say(
            f"{name}: was found bad, see {path}, and this attempt is on it all the same; launch it "
            "anew to avoid that node, or keep jobs off it"
        )


def tell_failed_start(run_dir: Path, number: int, code: int, reason: str) -> None:
    """A line in the run record for an attempt that ended before any rank owned the run: it counts,
    and the next one has another number and folder. The first node to end writes it."""
    if all(line["attempt"] < number for line in read_attempts(run_dir)):
        append_attempt(run_dir, failed_start_line(number, code, reason))


def tell_whom_to_avoid(
    place: Place, run_dir: Path, log_dir: Path, record: NodeRecord, *, is_broken: bool
) -> None:
    """Write nodes into the run's list for the next attempt: this one by its driver's word, and the
    first node those that its ranks have found."""
    if is_broken:
        note_bad_nodes([record.name])
    if place.node_rank == 0:
        found = culprits(run_dir, log_dir, record, place.nproc_per_node)
        for name, days in found.items():
            note_bad_nodes([name], days=days)


def tell_site(program: str, run_dir: Path) -> None:
    """Run the site's program about an attempt that has ended; whatever it does changes nothing."""
    try:
        status = run_status(run_dir)
        told = {
            "T2V_RUN_DIR": str(run_dir),
            "T2V_STATE": status.state,
            "T2V_EXIT_CODE": str(status.exit_code if status.exit_code is not None else ""),
            "T2V_REASON": plain(status.reason or ""),
            "T2V_DECISION": status.decision,
        }
        subprocess.run(
            shlex.split(program), env=os.environ | told, timeout=SITE_SECONDS, check=True
        )
    except (OSError, UserError, subprocess.SubprocessError) as failure:
        say(f"on_end: {failure}")
