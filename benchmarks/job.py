"""All ranks of a run as a scheduler starts them: together, and none is left when one fails."""

import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Protocol

from data_pipeline.orphans import end_with_parent

ROOT = Path(__file__).parent.parent
GRACE_SECONDS = 60.0


class Rank(Protocol):
    """A process of a job."""

    returncode: int | None

    def poll(self) -> int | None: ...

    def send_signal(self, sig: int, /) -> None: ...


def spawn(arguments: list[str], environment: dict[str, str], output: BinaryIO) -> Rank:
    """A rank as a new process, which ends with this one."""
    return subprocess.Popen(
        [sys.executable, "-m", "t2v.cli", *arguments],
        env=os.environ | environment, stdout=output, stderr=output, cwd=ROOT,
        preexec_fn=end_with_parent,
    )  # fmt: skip


class Fork:
    """A rank as a fork of this process, which has imported everything, as a start at leisure would.
    It must have no threads."""

    def __init__(self, arguments: list[str], environment: dict[str, str], output: BinaryIO) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            end_with_parent()
            os.environ.update(environment)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            import torch

            from t2v.cli import main

            torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
            code = main(arguments)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def send_signal(self, sig: int, /) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)


class Job:
    """All ranks of a run, until they end."""

    def __init__(
        self,
        recipe: Path,
        *options: str,
        ranks: int,
        faults: str = "",
        log: Path,
        start: Callable[[list[str], dict[str, str], BinaryIO], Rank] = spawn,
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
                start(
                    ["train", str(recipe), *options],
                    shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    output,
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
