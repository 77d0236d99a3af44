"""What failed first, on which rank, and what may help: records for programs, a page for people."""

import contextlib
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from pydantic import ValidationError

from data_pipeline.printable import plain
from data_pipeline.strict import Strict
from t2v.attempt.alarm import RECORD
from t2v.engine.device import Pace, to_host

WAITS = {to_host.__code__, Pace.wait.__code__}  # where a host waits for its device
HANG = 71
LONGEST_QUOTE = 100_000  # characters: the stacks of many threads

ADVICE = {
    65: "Look at quarantine.jsonl, then repair the datasets with `t2v data verify --repair`, or "
    "raise data.max_drop_rate.",
    66: "Put back what is missing, or correct its path in the recipe.",
    70: "Lower optimizer.learning_rate or optimizer.max_grad_norm, and look at the samples below "
    "and at the skipped_samples in metrics.jsonl.",
    73: "Let the attempt that owns the run folder go on, or choose another run_dir.",
    74: "Free space and inodes, check rights and quota; fewer checkpoints are kept with a lower "
    "checkpoint.keep_last.",
    78: "Correct the recipe or its inputs as the reason says.",
}
HANG_ADVICE = {
    "setup": "Check that every node started and reaches the others; a slow start needs a longer "
    "watchdog.setup_seconds.",
    "data": "Check storage and the samples below; slow reads need more data.num_workers, or a "
    "longer watchdog.data_seconds.",
    "step": "Check the named rank's device and network; if steps are just slow, raise "
    "watchdog.step_seconds.",
    "checkpoint": "Check the disk of the run folder; a slow one needs a longer "
    "watchdog.checkpoint_seconds.",
}
CRASH_ADVICE = "The stack below says where; the logs of the rank say more."
OUT_OF_MEMORY = ("OutOfMemory", "out of memory", "can't allocate memory")
MEMORY_ADVICE = (
    "Lower micro_batch_size, set engine.activation_checkpointing, or use more GPUs: `t2v plan` "
    "says what fits."
)


class Failure(Strict):
    """Why a rank ended."""

    rank: int
    host: str
    exit_code: int
    reason: str
    section: str
    step: int
    at: str
    stack: str
    samples: tuple[str, ...] = ()
    memory_gib: float = 0.0


def record_failure(folder: Path, failure: Failure) -> None:
    """Leave a rank's record; a disk that fails too must not hide the first failure."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / RECORD.format(failure.rank)
        staging = path.with_suffix(".part")
        staging.write_text(failure.model_dump_json(indent=1) + "\n", encoding="utf-8")
        staging.replace(path)


def first_failure(folder: Path) -> Failure | None:
    """The record of the rank that failed first."""
    found = [_read_record(path) for path in folder.glob("failure-rank-*.json")]
    return min((f for f in found if f is not None), key=lambda f: (f.at, f.rank), default=None)


def _read_record(path: Path) -> Failure | None:
    try:
        return Failure.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError):
        return None


def all_stacks() -> dict[str, str]:
    """The stack of every thread of this process, innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return {
        names.get(ident, str(ident)): "".join(traceback.format_stack(frame))
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    }


def is_waiting(frame: FrameType) -> bool:
    """Whether a thread, by its innermost frame, waits for another rank: in a collective, or, where
    these are launched and not waited for, for its device."""
    innermost: FrameType | None = frame
    for _ in range(6):
        if innermost is None:
            return False
        if "torch/distributed/" in innermost.f_code.co_filename or innermost.f_code in WAITS:
            return True
        innermost = innermost.f_back
    return False


def failure_page(failure: Failure, *, run_dir: Path, logs: Path, attempt: int) -> str:
    """failure.md: everything needed to decide what to do next."""
    samples = "\n".join(f"- `{quoted(name)}`" for name in failure.samples)
    reason = quoted(failure.reason)
    return f"""# Attempt {attempt} failed

{reason.splitlines()[0] if reason else "no reason was given"}

| | |
|---|---|
| rank that failed first | {failure.rank} on {quoted(failure.host)} |
| exit code | {failure.exit_code} |
| section | {quoted(failure.section)} |
| step | {failure.step} |
| when | {failure.at} |
| memory of that rank | {failure.memory_gib:.2f} GiB at its peak |
| records of all ranks | {logs} |
| metrics | {run_dir / "metrics.jsonl"} |

## What may help

{advice(failure)}

## Samples that rank was at

{samples or "- none were being read"}

## Reason

```
{reason}
```

## Stack

```
{quoted(failure.stack).rstrip() or "none"}
```
"""


def quoted(text: str) -> str:
    """Words of others between our quotes."""
    return plain(text, most=LONGEST_QUOTE).replace("`", "'")


def advice(failure: Failure) -> str:
    """The knob to turn, by exit code and section."""
    if failure.exit_code == HANG:
        return HANG_ADVICE.get(failure.section, CRASH_ADVICE)
    if any(words in failure.reason for words in OUT_OF_MEMORY):
        return MEMORY_ADVICE
    return ADVICE.get(failure.exit_code, CRASH_ADVICE)


def peak_memory_gib() -> float:
    """Most memory this process has held on its host."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether a condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)
    return True
