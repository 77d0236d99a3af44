"""Whatever can block has a deadline: a thread that ends a stuck run and names who hangs, and where.

A rank that hangs makes all others wait for it, so whoever runs out of time first need not be the
culprit. It rings an alarm; every rank answers with its position; the rank that is behind, or does
not answer, is the one.
"""

import faulthandler
import os
import socket
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from pydantic import Field

from data_pipeline.strict import Strict
from t2v.attempt.alarm import heard_alarm, ring
from t2v.attempt.collectives import leave_record, progress, recorded
from t2v.attempt.culprit import ANSWER_SECONDS, Position, culprit, exchange, tell_hang
from t2v.attempt.failure import (
    HANG,
    Failure,
    all_stacks,
    first_failure,
    is_waiting,
    peak_memory_gib,
    wait_until,
)
from t2v.attempt.trace import given_trace

POLL_SECONDS = 0.5
# Thirty years; beyond, timers overflow, and a watchdog that died of that would watch nothing.
LONGEST_SECONDS = 1e9
CLOSING_SECONDS = 90.0
FOLLOW_SECONDS = 6.0
# Longer than any answer takes: only a thread that never lets go of the interpreter comes this far.
STUCK_SECONDS = 90.0
# A section is no hang before it took so many times the longest of the last ones.
TIMES, LAST = 10, 64


class WatchdogConfig(Strict):
    """How long each part of a run may take before it counts as a hang; all but setup less than
    engine.collective_timeout_seconds, or those that wait fail before who hangs is found out."""

    setup_seconds: float = Field(
        default=1800.0,
        gt=0,
        le=LONGEST_SECONDS,
        description="from the start to the end of the first step",
    )
    data_seconds: float = Field(
        default=300.0, gt=0, le=LONGEST_SECONDS, description="waiting for a step's samples"
    )
    step_seconds: float = Field(
        default=300.0, gt=0, le=LONGEST_SECONDS, description="forward, backward and update"
    )
    checkpoint_seconds: float = Field(
        default=540.0,
        gt=0,
        le=LONGEST_SECONDS,
        description="waiting for a checkpoint to be copied or finished",
    )

    def deadline(self, section: str) -> float:
        """Seconds a section may take."""
        return getattr(self, f"{section}_seconds")


class Measured:
    """How long the sections of a run have taken lately."""

    def __init__(self) -> None:
        self._seconds: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=LAST))

    def add(self, section: str, seconds: float, *, is_first_step: bool) -> None:
        """Note a section that has ended. The first one of a run compiles: it counts once, and not
        many times."""
        known = self._seconds[section]
        known.append(seconds / TIMES if is_first_step and not known else seconds)

    def deadline(self, section: str) -> float:
        """Seconds that a section surely does not take; 0 where nothing is known."""
        return TIMES * max(self._seconds[section], default=0.0)


class Watchdog:
    """A thread beside training; `enter` tells it where training is. No measured deadline is longer
    than `longest`, after which ranks no longer wait for each other."""

    def __init__(self, config: WatchdogConfig, *, longest: float = LONGEST_SECONDS) -> None:
        self.config, self.longest = config, longest
        self.measured = Measured()
        self.section, self.step, self.entered = "setup", 0, 0
        self.samples: tuple[str, ...] = ()
        self.trace = given_trace()
        self.since = time.monotonic()
        self.rank, self.world_size = int(os.environ.get("RANK", "0")), 1
        self.folder: Path | None = None
        self.on_end: Callable[[Failure | None, int], None] = lambda failure, exit_code: None
        self._first_step: int | None = None
        self._closing: tuple[float, int] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def serve(
        self,
        folder: Path,
        *,
        rank: int,
        world_size: int,
        on_end: Callable[[Failure | None, int], None],
    ) -> None:
        """From now on ranks meet in an attempt's folder; `on_end` is called before a sudden end."""
        self.rank, self.world_size, self.on_end, self.folder = rank, world_size, on_end, folder

    def enter(self, section: str, step: int, samples: Iterable[str] = ()) -> None:
        """Training is now in a section of the step after `step`."""
        now = time.monotonic()
        if self._first_step is None:
            self._first_step = step
        elif self.section != "setup":
            is_first = self.step == self._first_step
            self.measured.add(self.section, now - self.since, is_first_step=is_first)
        self.samples = tuple(samples)
        self.section, self.step, self.since = section, step, now
        self.entered += 1
        if self.trace is not None:
            self.trace.tell(section, step, self.samples)

    def close(self, exit_code: int, seconds: float = CLOSING_SECONDS) -> None:
        """The run is ending; it has some seconds to do so by itself."""
        if self._closing is None:
            self._closing = (time.monotonic() + seconds, exit_code)

    def _deadline(self) -> float:
        measured = min(self.measured.deadline(self.section), self.longest)
        seconds = max(self.config.deadline(self.section), measured)
        if self._first_step in (None, self.step):  # compiles, and fills the loader's queues
            return max(seconds, self.config.setup_seconds)
        return seconds

    def _watch(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            now = time.monotonic()
            if self._closing is not None:
                deadline, exit_code = self._closing
                if now > deadline:
                    os._exit(exit_code)
                continue
            left = self.since + self._deadline() - now
            faulthandler.dump_traceback_later(max(left, 0.0) + STUCK_SECONDS, exit=True, file=2)
            alarm = heard_alarm(self.folder) if self.folder is not None else None
            if alarm is not None and alarm["rank"] != self.rank and not alarm["is_hang"]:
                self._follow(alarm["exit_code"])
            elif left < 0 or (alarm is not None and alarm["is_hang"]):
                self._end_hang()

    def _follow(self, exit_code: int) -> None:
        """Another rank failed: the main thread has a while to notice, for it may do so alike."""
        if self._stop.wait(FOLLOW_SECONDS) or self._closing is not None:
            return
        assert self.folder is not None
        self.on_end(first_failure(self.folder), exit_code)
        os._exit(exit_code)

    def _end_hang(self) -> None:
        """Find out with the other ranks who hangs; that one speaks; all end."""
        dumps = recorded()
        position = position_of(self, progress(dumps))
        if self.folder is None:
            tell_hang(None, position)
            os._exit(HANG)
        at = ring(self.folder, rank=self.rank, is_hang=True, exit_code=HANG)
        leave_record(self.folder, self.rank, dumps)
        positions = exchange(self.folder, position, self.world_size)
        rank = culprit(positions, self.world_size)
        speaker = min((p.rank for p in positions), key=lambda r: (r != rank, r))
        if self.rank == speaker:
            told = next((p for p in positions if p.rank == rank), position)
            tell_hang(self.folder, told, rank=rank, at=at)
        else:
            folder = self.folder
            wait_until(lambda: first_failure(folder) is not None, ANSWER_SECONDS)
        if self._stop.is_set():
            return
        self.on_end(first_failure(self.folder), HANG)
        os._exit(HANG)


def position_of(watchdog: Watchdog, collectives: Mapping[str, tuple[int, int, int]]) -> Position:
    """Where this rank is."""
    stacks = all_stacks()
    main = stacks.pop("MainThread", "")
    others = "".join(f"\nThread {name}:\n{stack}" for name, stack in stacks.items())
    return Position(
        rank=watchdog.rank,
        host=socket.gethostname(),
        section=watchdog.section,
        step=watchdog.step,
        entered=watchdog.entered,
        seconds=time.monotonic() - watchdog.since,
        waits=any(map(is_waiting, sys._current_frames().values())),
        collectives=dict(collectives),
        memory_gib=peak_memory_gib(),
        samples=watchdog.samples,
        stack=f"Thread MainThread:\n{main}{others}",
    )


def failure_here(watchdog: Watchdog, exit_code: int, reason: str, stack: str, at: str) -> Failure:
    """A failure of this rank, where the watchdog knows training to be."""
    return Failure(
        rank=watchdog.rank,
        host=socket.gethostname(),
        exit_code=exit_code,
        reason=reason,
        section=watchdog.section,
        step=watchdog.step,
        at=at,
        stack=stack,
        samples=watchdog.samples,
        memory_gib=peak_memory_gib(),
    )
