"""What the launcher starts on a node, once per GPU: `t2v train`, its output in a file of its own,
and a parent that outlives it and says how it ended.

Rank 0 speaks to the job's log. Nothing here imports torch. A rank that is killed leaves no word,
and the launcher tells of it only once it has ended the others, who would each take the consequence
for the cause: so the parent rings the alarm at once, in the name of the dead.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from data_pipeline.orphans import end_with_parent
from t2v.attempt.alarm import RECORD, heard_alarm, ring
from t2v.attempt.run_folder import timestamp
from t2v.attempt.trace import VARIABLE, new_trace

POLL_SECONDS = 0.5
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LAST_WORDS_BYTES = 65536
SAVED = 75
RECORDER = "TORCH_FR_DUMP_TEMP_FILE"


def main(folder: str, *arguments: str) -> int:
    """Run `t2v train` to its end; the launcher's own streams stay free for the launcher."""
    logs, rank = Path(folder), int(os.environ.get("RANK", "0"))
    log = None
    if rank == 0:
        os.dup2(1, 2)  # the launcher's stderr is a file of its own
    else:
        log = logs / f"rank-{rank:05d}.log"
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)
    trace, file = new_trace()
    # Where a hang ends in the hands of NCCL's own watchdog, it leaves the last collectives there.
    os.environ.setdefault(RECORDER, str(logs / "nccl-trace-rank-"))
    child = subprocess.Popen(
        [sys.executable, "-m", "t2v.cli", "train", *arguments],
        env=os.environ | {VARIABLE: str(file)},
        pass_fds=(file,),
        preexec_fn=end_with_parent,
    )
    code, was_told = see_through(child)
    if code and code != SAVED and not was_told:
        with contextlib.suppress(OSError):
            tell_of_death(logs, rank, code, trace.read(), log)
    return 128 - code if code < 0 else code


def see_through(child: subprocess.Popen) -> tuple[int, bool]:
    """How a rank ended, and whether it was told to: what the launcher asks of us we ask of it, and
    so we do where the launcher itself is gone."""
    launcher, told = os.getppid(), threading.Event()

    def pass_on(number: int, _frame: FrameType | None) -> None:
        told.set()
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(number)

    for number in SIGNALS:
        signal.signal(number, pass_on)
    while True:
        try:
            return child.wait(POLL_SECONDS), told.is_set()
        except subprocess.TimeoutExpired:
            if launcher is not None and os.getppid() != launcher:
                pass_on(signal.SIGTERM, None)
                launcher = None


def tell_of_death(
    logs: Path, rank: int, code: int, place: dict[str, Any], log: Path | None
) -> None:
    """Wake the other ranks and leave the record of one that left none itself."""
    if (logs / RECORD.format(rank)).exists() or (code > 0 and heard_alarm(logs)):
        return
    exit_code = 128 - code if code < 0 else code
    reason = f"rank {rank} on {socket.gethostname()} {how(code)}"
    last = last_words(log) if log and code > 0 else ""
    record = {
        "rank": rank,
        "host": socket.gethostname(),
        "exit_code": exit_code,
        "reason": f"{reason}: {last}" if last else reason,
        "section": str(place.get("section", "start")),
        "step": int(place.get("step", 0)),
        "at": timestamp(),
        "stack": "",
        "samples": [str(name) for name in place.get("samples", ())],
    }
    # Before the alarm: whoever hears it looks for the record.
    staging = (logs / RECORD.format(rank)).with_suffix(".part")
    staging.write_text(json.dumps(record), encoding="utf-8")
    staging.replace(logs / RECORD.format(rank))
    ring(logs, rank=rank, is_hang=False, exit_code=exit_code, reason=reason)
    if rank == 0:
        # Only now, for it takes a while, and a parent that waits needs no more than it must.
        from t2v.attempt.failure import Failure
        from t2v.attempt.last_word import end_for_the_dead

        end_for_the_dead(logs, Failure.model_validate_json(json.dumps(record)))


def how(code: int) -> str:
    """`was killed by SIGKILL, ...`."""
    if code > 0:
        return f"ended with {code}; its log says why"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    hint = ""
    if -code == signal.SIGKILL:
        hint = ", by an operator, the scheduler, or the kernel for want of memory"
    return f"was killed by {name}{hint}"


def last_words(log: Path) -> str:
    """The last line of a rank's log."""
    with log.open("rb") as file:
        file.seek(max(log.stat().st_size - LAST_WORDS_BYTES, 0))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
