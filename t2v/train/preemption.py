"""Being told to stop: SIGTERM, SIGUSR1, SIGUSR2, or a file named PREEMPT in the run folder.

Nothing here imports torch: handlers are armed before that long import, during which a signal would
otherwise end the process at once.
"""

import os
import signal
from pathlib import Path
from types import FrameType

EXIT_CODE = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
FLAG_FILE = "PREEMPT"

_received: list[int] = []


def arm() -> None:
    """From now on the first signal is a request, and the second ends the process at once."""
    for number in SIGNALS:
        signal.signal(number, _receive)


def disarm() -> None:
    """Signals do again what they do by default; an unanswered request is forgotten."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    _received.clear()


def requested(run_dir: Path) -> bool:
    """Whether this process was told to stop; ranks must still agree on when."""
    return bool(_received) or (run_dir / FLAG_FILE).exists()


def acknowledge(run_dir: Path) -> None:
    """The request is answered: the next attempt must not see its flag file."""
    (run_dir / FLAG_FILE).unlink(missing_ok=True)


def _receive(number: int, frame: FrameType | None) -> None:
    if _received:
        os._exit(EXIT_CODE)
    _received.append(number)
