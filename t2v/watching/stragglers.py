"""Which rank the others wait for, and what it costs.

All ranks of a step take as long as the slowest, so their times tell nothing. Who waits does: a
thread looks at random moments whether its rank waits for others, on a GPU the recorder of NCCL
tells how long collectives took, and every so many steps ranks compare. No step is touched.
"""

import contextlib
import math
import random
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from traceback import walk_stack
from types import FrameType
from typing import Any

from data_pipeline.printable import say
from t2v.attempt.collectives import collective_seconds
from t2v.attempt.failure import is_waiting
from t2v.attempt.record import append_attempt
from t2v.attempt.run_folder import StatusFile, timestamp
from t2v.engine.world import World

LOOK_SECONDS, RECORDER_SECONDS = 0.2, 60.0
LEAST_SHARE, LEAST_LOOKS = 0.1, 50
# Of the chance by which looks differ: with thousands of ranks, some rank is always off by three.
DEVIATIONS = 5.0
AGREEING = {World.total.__code__, World.gather.__code__}


@dataclass(frozen=True)
class Waited:
    """What a rank says of itself: the share of its time that it waited for others."""

    share: float
    looks: int
    host: str


class Waits:
    """A thread beside training that finds out how much its rank, the main thread, waits."""

    def __init__(self, world: World) -> None:
        self.is_cpu = world.device.type == "cpu"
        self.begin_anew()
        self.cost_seconds = 0.0  # of computing, of this thread itself
        self._last_ns = time.time_ns()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="waits", daemon=True)
        self._thread.start()

    def now(self) -> Waited:
        """Since the last time that all began anew."""
        host = self.waiting / max(self.looks, 1)
        device = self.device_seconds / self.device_span if self.device_span else 0.0
        return Waited(min(host + device, 1.0), self.looks, socket.gethostname())

    def begin_anew(self) -> None:
        self.looks = self.waiting = 0
        self.device_seconds = self.device_span = 0.0

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        rng, main = random.Random(), threading.main_thread().ident
        next_record = time.monotonic() + RECORDER_SECONDS
        # Random, or looks would keep step with the steps.
        while not self._stop.wait(LOOK_SECONDS * rng.uniform(0.5, 1.5)):
            frame = sys._current_frames().get(main or 0)
            if frame is not None:
                self.looks += 1
                self.waiting += is_waiting(frame) if self.is_cpu else agrees(frame)
            del frame  # it would keep what the main thread has let go of
            if not self.is_cpu and time.monotonic() >= next_record:
                seconds, span, self._last_ns = collective_seconds(self._last_ns)
                self.device_seconds += seconds
                self.device_span += span
                next_record = time.monotonic() + RECORDER_SECONDS
            self.cost_seconds = time.thread_time()


def agrees(frame: FrameType) -> bool:
    """Whether a host waits for other hosts; that it launches collectives is its own work."""
    return any(call.f_code in AGREEING for call, _ in walk_stack(frame))


def late_ranks(waited: Sequence[float], looks: int) -> dict[int, float]:
    """The ranks that others wait for, the worst first, and the share of time that each costs: what
    the median of the others waits more than it. Where most are slow, none is; and none is named for
    what `looks` random looks may show by chance."""
    ordered = sorted(waited)
    found = {}
    for rank, own in enumerate(waited) if len(ordered) > 1 else ():
        place = (len(ordered) - 2) // 2  # of the lower median of the others
        usual = ordered[place + (own <= ordered[place])]
        deviation = math.sqrt((usual * (1 - usual) + own * (1 - own)) / max(looks, 1))
        if usual - own >= max(LEAST_SHARE, DEVIATIONS * deviation):
            found[rank] = usual - own
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


@dataclass(frozen=True)
class Straggler:
    """The rank that costs most, for status.json and the run record."""

    rank: int
    host: str
    share: float  # of the time of these steps
    steps: int
    step: int  # at which it was found


class Stragglers:
    """All ranks compare every so many steps; rank 0 tells of the worst."""

    def __init__(self, run_dir: Path, world: World, status: StatusFile | None, every: int) -> None:
        self.run_dir, self.world, self.status, self.every = run_dir, world, status, every
        self.waits = Waits(world) if every > 0 and world.world_size > 1 else None
        self.steps = 0
        self.named: int | None = None

    def step(self, step: int) -> dict[str, Any]:
        """Account for a step; at the end of so many, what a line of metrics tells of them. The
        rank is -1 where none is late."""
        self.steps += 1
        if self.waits is None or self.steps % self.every:
            return {}
        all_waited = self.world.gather(self.waits.now())
        looks = min(waited.looks for waited in all_waited)
        if looks < LEAST_LOOKS:  # of quick steps; these count with the next ones
            return {}
        steps, self.steps = self.steps, 0
        self.waits.begin_anew()
        late = late_ranks([waited.share for waited in all_waited], looks)
        rank, share = next(iter(late.items()), (-1, 0.0))
        worst = None
        if late:
            worst = Straggler(rank, all_waited[rank].host, share, steps, step)
        self._tell(worst)
        return {"straggler_rank": rank, "straggler_share": share}

    def _tell(self, worst: Straggler | None) -> None:
        if self.status is None:
            return
        self.status.note({"straggler": asdict(worst) if worst else None})
        if worst is not None and worst.rank != self.named:
            say(
                f"rank {worst.rank} on {worst.host} is slow: others waited for it "
                f"{worst.share:.0%} of the last {worst.steps} steps"
            )
            attempt = self.status.facts.get("attempt", 0)
            line = {"attempt": attempt, "event": "straggler", "at": timestamp()}
            with contextlib.suppress(OSError):  # a full disk takes the word, not the run
                append_attempt(self.run_dir, line | asdict(worst))
        self.named = worst.rank if worst else None

    def close(self) -> None:
        if self.waits is not None:
            self.waits.close()
