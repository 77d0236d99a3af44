"""wandb as a mirror of metrics.jsonl, in a process that nothing waits for.

The process follows the file. Whether wandb is online is wandb's own affair (`WANDB_MODE`, its login
and settings); offline where it knows no key. Steps that were undone and done anew are not logged
twice, and what could not be logged is logged by the next attempt.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from data_pipeline.printable import say
from data_pipeline.store import storage
from t2v.watching.lines import numbers, parse_line

STATE = "wandb.json"
POLL_SECONDS = 0.5
FINISH_SECONDS = 10.0  # that the end of a run waits for what is still to be sent
NICEST = 19


class WandbMirror:
    """Training's side: it starts the process, and ends it."""

    def __init__(self, run_dir: Path, project: str, name: str) -> None:
        self.log = run_dir / "logs" / "wandb.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            # A session of its own: a scheduler's signals are the run's affair.
            self.process = subprocess.Popen(
                [sys.executable, "-m", "t2v.watching.wandb_mirror", str(run_dir), project, name],
                stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    def write(self, values: dict[str, Any]) -> None:
        """The line is in the file already."""
        if self.process.poll() is not None:
            self._end()
            raise ChildProcessError(f"exit code {self.process.returncode}; see {self.log}")

    def close(self) -> None:
        """The file is complete; wait a little for its end to be sent."""
        self._close_stdin()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(2 * FINISH_SECONDS)
        self._end()
        if self.process.returncode:
            raise TimeoutError(f"its last lines wait for the next attempt; see {self.log}")

    def _close_stdin(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def _end(self) -> None:
        """End the process and whatever it has started."""
        self._close_stdin()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def mirror(run_dir: Path, project: str, name: str) -> None:
    """Log the lines of a run until stdin ends, then what is left of them, within a bound."""
    ended = threading.Event()
    threading.Thread(target=_wait_for_end, args=(ended,), daemon=True).start()
    state = _known(run_dir)
    run = _begin(run_dir, project, name, state["id"])
    for lines in _follow(run_dir / "metrics.jsonl", ended):
        new = [values for values in lines if values["step"] > state["step"]]
        for values in new:
            run.log(numbers(values), step=values["step"])
        if new:
            _keep(run_dir, state | {"step": new[-1]["step"]})
    run.finish()


def _begin(run_dir: Path, project: str, name: str, run_id: str) -> Any:
    import wandb

    def begin(mode: Literal["offline"] | None = None) -> Any:
        return wandb.init(
            project=project,
            name=name,
            id=run_id,
            resume="allow",
            dir=str(run_dir),
            settings=wandb.Settings(silent=True, console="off", x_stats_pid=os.getppid()),
            mode=mode,
        )

    if "WANDB_MODE" not in os.environ and not wandb.login(prompt=False, verify=False):
        return begin(mode="offline")
    try:
        return begin()
    except wandb.Error as failure:
        say(f"wandb: goes on offline because {failure}")
        return begin(mode="offline")


def _known(run_dir: Path) -> dict[str, Any]:
    """The run's id for wandb, and the last step that was logged."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((run_dir / STATE).read_bytes())
    state = {"id": uuid.uuid4().hex, "step": 0}
    _keep(run_dir, state)
    return state


def _keep(run_dir: Path, state: dict[str, Any]) -> None:
    storage.write_atomic(run_dir / STATE, json.dumps(state).encode())


def _follow(path: Path, ended: threading.Event) -> Iterator[list[dict]]:
    """Whole lines of a file as they come, several at a time."""
    rest = b""
    with path.open("rb") as file:
        while True:
            is_over = ended.is_set()  # asked before the last look
            *lines, rest = (rest + file.read()).split(b"\n")
            parsed = (parse_line(line + b"\n") for line in lines)
            yield [values for values in parsed if values is not None]
            if is_over:
                return
            ended.wait(POLL_SECONDS)


def _wait_for_end(ended: threading.Event) -> None:
    """Stdin ends with the run, however that ends; then this process has a while to finish."""
    while os.read(0, 1):
        pass
    ended.set()
    time.sleep(FINISH_SECONDS)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    os.nice(NICEST)
    mirror(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
