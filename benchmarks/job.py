"""All ranks of a run as a scheduler starts them: together, and none is left when one fails."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
GRACE_SECONDS = 60.0


class Job:
    """All ranks of a run, until they end."""

    def __init__(
        self, recipe: Path, *options: str, ranks: int, faults: str = "", log: Path
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.fault_log = log.with_suffix(".faults")
        self.fault_log.unlink(missing_ok=True)
        self.ended: float | None = None
        shared = {
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "T2V_FAULT": faults,
            "T2V_FAULT_LOG": str(self.fault_log),
        }
        self.started = time.time()
        with log.open("ab") as output:
            self.ranks = [
                subprocess.Popen(
                    [sys.executable, "-m", "t2v.cli", "train", str(recipe), *options],
                    env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=output,
                    stderr=output,
                    cwd=ROOT,
                )
                for rank in range(ranks)
            ]

    def kill(self, number: int = signal.SIGKILL) -> None:
        """A signal to every rank that lives."""
        for rank in self.ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    @property
    def is_over(self) -> bool:
        """Whether every rank has ended; where one failed, the others are told to, then made to."""
        codes = [rank.poll() for rank in self.ranks]
        if all(code is not None for code in codes):
            return True
        if any(codes):
            self.ended = self.ended or time.time()
            if time.time() - self.ended > GRACE_SECONDS:
                self.kill()
        return False

    @property
    def exit_code(self) -> int:
        """What the job as a whole ended with: preempted only if no rank failed."""
        codes = [rank.returncode for rank in self.ranks if rank.returncode]
        return next((code for code in codes if code != 75), codes[0] if codes else 0)

    def fault_times(self) -> list[float]:
        """When planned faults struck."""
        if not self.fault_log.exists():
            return []
        lines = [line.split() for line in self.fault_log.read_text().splitlines()]
        return [float(at) for at, what in lines if not what.endswith("nan")]
