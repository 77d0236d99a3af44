"""The run folder: one owner at a time, and a status anyone may read."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from data_pipeline.errors import RunLocked
from data_pipeline.printable import say

State = Literal["starting", "running", "done", "preempted", "failed"]
LOCK = "run.lock"
REFRESH_SECONDS = 1.0
HEARTBEAT_SECONDS = 3.0
# An owner on another host whose heart has not beaten for so long is dead. Beats are watched, not
# dated: clocks of hosts differ.
STALE_SECONDS = 15.0
RECORD_BYTES = 512
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Own the run folder; RunLocked names the process that does.

    On one host the kernel's lock tells the truth: it goes with its process, however that ends, and
    is not inherited by the loader's workers. Between hosts a disk may not pass locks on, so an
    owner's heart beats in the file too.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    file = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as failure:
            if failure.errno not in NO_LOCKS:
                raise _in_use(run_dir, _read(file)) from None
        _wait_for_silence(run_dir, file)
        me = {**whoami(), "nonce": uuid.uuid4().hex}
        stop = threading.Event()
        _write(file, {**me, "beat": 0})
        heart = threading.Thread(target=_beat, args=(file, me, stop), name="heart", daemon=True)
        heart.start()
        try:
            yield
        finally:
            stop.set()
            heart.join()
            with contextlib.suppress(OSError):  # a full disk does not change how a run ended
                if _read(file).get("nonce") == me["nonce"]:
                    _write(file, {})
    finally:
        os.close(file)


def _beat(file: int, me: dict[str, Any], stop: threading.Event) -> None:
    beat = 0
    while not stop.wait(HEARTBEAT_SECONDS):
        beat += 1
        with contextlib.suppress(OSError):
            if _read(file).get("nonce") != me["nonce"]:
                return  # another has taken over; who may commit is told by the run record
            _write(file, {**me, "beat": beat})


def _wait_for_silence(run_dir: Path, file: int) -> None:
    """RunLocked if an owner on another host is alive; one that left no farewell gets its time."""
    found = _read(file)
    if not found or found.get("host") == socket.gethostname():
        return
    say(
        f"{run_dir}: was left locked by {_name(found)}; waiting up to {STALE_SECONDS:.0f} s for a "
        "sign of life."
    )
    deadline = time.monotonic() + STALE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(0.2)
        now = _read(file)
        if not now:
            return
        if now != found:
            raise _in_use(run_dir, now)


def _in_use(run_dir: Path, owner: dict[str, Any]) -> RunLocked:
    return RunLocked(
        f"{run_dir}: is in use by {_name(owner)}; wait for it, stop it, or choose another run_dir."
    )


def _name(owner: dict[str, Any]) -> str:
    if "pid" not in owner:
        return "another process"
    return f"process {owner['pid']} on {owner.get('host')}"


def _read(file: int) -> dict[str, Any]:
    """What the lock's file says; through the locked descriptor, for closing any other one of the
    same file would drop the lock."""
    try:
        found = json.loads(os.pread(file, RECORD_BYTES, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _write(file: int, content: dict[str, Any]) -> None:
    # One write of one size: no reader sees half a record.
    os.pwrite(file, json.dumps(content).encode().ljust(RECORD_BYTES), 0)
    os.fsync(file)


class StatusFile:
    """status.json: the run's state, its facts (step, total_steps, ...), who wrote it and when."""

    def __init__(self, run_dir: Path, **facts: Any) -> None:
        self.path = run_dir / "status.json"
        self.state: State = "starting"
        self.facts: dict[str, Any] = {"exit_code": None, "reason": None, **facts}
        self.written = 0.0
        self.is_mine: Callable[[], bool] = lambda: True

    def write(self, state: State, **facts: Any) -> None:
        """Replace the file; a reader sees the old one or the new."""
        self.note(facts)
        if not self.is_mine():
            return
        self.state, self.written = state, time.monotonic()
        status = {"state": state, **self.facts, **whoami(), "updated": timestamp()}
        content = json.dumps(status).encode() + b"\n"
        staging = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            staging.write_bytes(content)
            staging.replace(self.path)
        except OSError:
            if state in ("starting", "running") or not self.path.exists():
                raise
            self._write_over(content)  # or a run that a full disk has ended would seem to go on
        finally:
            with contextlib.suppress(OSError):
                staging.unlink(missing_ok=True)

    def _write_over(self, content: bytes) -> None:
        """Into the room that the file has on its disk already."""
        with self.path.open("r+b", buffering=0) as file:
            file.write(content.ljust(os.fstat(file.fileno()).st_size))

    def refresh(self, **facts: Any) -> None:
        """Note facts; write them if the file is older than a second."""
        self.note(facts)
        if time.monotonic() - self.written >= REFRESH_SECONDS:
            self.write(self.state)

    def note(self, facts: dict[str, Any]) -> None:
        """Keep facts for the next time; a new checkpoint was made now."""
        if facts.get("last_checkpoint") not in (None, self.facts.get("last_checkpoint")):
            facts = {"last_checkpoint_at": timestamp(), **facts}
        self.facts |= facts


def timestamp() -> str:
    """Now, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def whoami() -> dict[str, Any]:
    """This process, for others to find."""
    return {"host": socket.gethostname(), "pid": os.getpid()}
