"""Being told to stop: SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, or a file named PREEMPT in the run folder,
or PREEMPT-JOB for the one job of that name.

Nothing here imports torch: handlers are armed before that long import, during which a signal would
otherwise end the process at once. A thread hears of signals while the main thread is deep in C
code, where Python's handlers cannot run.
"""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType

from data_pipeline.printable import say

EXIT_CODE = 75
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
FLAG_FILE = "PREEMPT"
# A launcher and its scheduler may both pass on the one request they got.
ECHO_SECONDS = 1.0
# A process with nothing to save has this long to notice a request by itself.
NOTICE_SECONDS = 4.0


class _Ear:
    """What this process has heard."""

    def __init__(self) -> None:
        self.heard = False
        self.something_to_save = False
        self.on_leaving: Callable[[], None] | None = None
        self.flags: tuple[Path, ...] = ()
        # Ranks whose launcher was killed have nobody to tell them to stop, or to end them.
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.write_end, False)
        self.thread = threading.Thread(target=self._listen, name="preemption", daemon=True)

    def _listen(self) -> None:
        first: float | None = None
        since: float | None = None
        while True:
            ready, _, _ = select.select([self.read_end], [], [], 0.5)
            now = time.monotonic()
            numbers = os.read(self.read_end, 64) if ready else b""
            if ready and not numbers:
                os.close(self.read_end)
                return
            if set(numbers) & set(SIGNALS):
                self.heard = True
                if first is not None and now - first > ECHO_SECONDS:
                    self._leave()
                first = first or now
            if self.launcher is not None and os.getppid() != self.launcher:
                self.heard = True
            # `exists` is false where a disk does not answer.
            if self.something_to_save or not (self.heard or any(map(os.path.exists, self.flags))):
                since = None
            elif since is None:
                since = now
            elif now - since > NOTICE_SECONDS:
                self._leave()

    def _leave(self) -> None:
        """End at once; what was committed stands."""
        try:
            if self.on_leaving is not None:
                self.on_leaving()
        finally:
            os._exit(EXIT_CODE)


_ear: _Ear | None = None


def arm() -> None:
    """From now on the first signal is a request, and a second one ends the process at once."""
    global _ear
    if _ear is None:
        _ear = _Ear()
        signal.set_wakeup_fd(_ear.write_end, warn_on_full_buffer=False)
        _ear.thread.start()
        for number in wanted(SIGNALS):
            signal.signal(number, _receive)


def wanted(numbers: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Signals, less that of a terminal which goes where `nohup` has it ignored."""
    is_deaf = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in numbers if not (is_deaf and number == signal.SIGHUP)]


def disarm() -> None:
    """Signals do again what they do by default; an unanswered request is forgotten."""
    global _ear
    for number in wanted(SIGNALS):
        signal.signal(number, signal.SIG_DFL)
    if _ear is not None:
        signal.set_wakeup_fd(-1)
        os.close(_ear.write_end)
        _ear.thread.join()
        _ear = None


def wait_for_save() -> None:
    """From now on there is something to save: one request alone never ends the process."""
    if _ear is not None:
        _ear.something_to_save = True


@contextlib.contextmanager
def leaving(run_dir: Path, action: Callable[[], None]) -> Iterator[None]:
    """Do something quick where a request ends the process at once."""
    if _ear is not None:
        _ear.something_to_save, _ear.on_leaving = False, action
        _ear.flags = flags(run_dir)
    try:
        yield
    finally:
        if _ear is not None:
            # What is left to do is to close; a request must neither hurry it nor be recorded.
            _ear.something_to_save, _ear.on_leaving = True, None


def heard() -> bool:
    """Whether this process was told to stop by a signal."""
    return _ear is not None and _ear.heard


def requested(run_dir: Path) -> bool:
    """Whether this process was told to stop; ranks must still agree on when."""
    return heard() or any(map(os.path.exists, flags(run_dir)))


def acknowledge(run_dir: Path) -> None:
    """The request is answered: the next attempt must not see its flag file. One that another owns
    changes nothing about how this attempt ended."""
    for flag in flags(run_dir):
        try:
            flag.unlink(missing_ok=True)
        except OSError as failure:
            say(f"{flag}: stays because {failure.strerror}; remove it, or the next start ends.")


def flags(run_dir: Path) -> tuple[Path, ...]:
    """The files that ask this process to stop: an operator's, and its own job's."""
    job = os.environ.get("TORCHELASTIC_RUN_ID")
    return (run_dir / FLAG_FILE, *([own_flag(run_dir, job)] if job else []))


def own_flag(run_dir: Path, job: str) -> Path:
    """The request to one job on a run folder, as its scheduler and its wrappers make it: another
    job on the same folder must neither be stopped by it nor take it away."""
    return run_dir / f"{FLAG_FILE}-{job}"


def forget_old_requests(run_dir: Path, attempt: int) -> None:
    """The owner of a run takes away what earlier attempts were asked: flags older than their last
    word. All times are the shared disk's."""
    told = [run_dir / "status.json", *run_dir.glob("logs/attempt-*/node-*.json")]
    own = f"attempt-{attempt:04d}"
    words = [path.stat().st_mtime for path in told if path.exists() and path.parent.name != own]
    for flag in run_dir.glob(f"{FLAG_FILE}*"):
        with contextlib.suppress(FileNotFoundError):
            if flag.stat().st_mtime < max(words, default=0.0):
                flag.unlink()


def _receive(number: int, frame: FrameType | None) -> None:
    if _ear is not None:
        _ear.heard = True
