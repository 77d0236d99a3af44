"""Views of a run's metrics: TensorBoard, the terminal; the failure of one ends only it."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipeline.printable import say
from data_pipeline.terminal import Terminal
from t2v.watching.lines import numbers

PLAIN_LINE_SECONDS = 10.0


class View(Protocol):
    """What may be shown the lines of metrics.jsonl."""

    def write(self, values: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Guarded:
    """A view whose failure, at whatever moment, ends the view and never the run."""

    def __init__(self, name: str, make: Callable[[], View]) -> None:
        self.name = name
        self.view: View | None = None
        self._try(lambda: self._begin(make))

    def write(self, values: dict[str, Any]) -> None:
        if (view := self.view) is not None:
            self._try(lambda: view.write(values))

    def close(self) -> None:
        if (view := self.view) is not None:
            self._try(view.close)

    def _begin(self, make: Callable[[], View]) -> None:
        self.view = make()

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as failure:
            self.view = None
            say(f"{self.name}: ends here because {failure!r}; metrics.jsonl goes on.")


class TensorBoardView:
    """Event files in the run folder; those of steps that were undone are hidden."""

    def __init__(self, run_dir: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def write(self, values: dict[str, Any]) -> None:
        for name, value in numbers(values).items():
            if name != "step":
                self.writer.add_scalar(name, value, values["step"])

    def close(self) -> None:
        self.writer.close()


class ProgressView:
    """A bar on a terminal, a plain line now and then elsewhere."""

    def __init__(self, total_steps: int, step: int) -> None:
        self.total_steps = total_steps
        self.next_line = 0.0
        self.bar = None
        if sys.stdout.isatty():
            self.bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=Terminal(),
            )
            self.task = self.bar.add_task("training", total=total_steps, completed=step, text="")
            self.bar.start()

    def write(self, values: dict[str, Any]) -> None:
        text = progress_text(values)
        if self.bar is not None:
            self.bar.update(self.task, completed=values["step"], text=text)
        elif "held_out_loss" in values or time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + PLAIN_LINE_SECONDS
            say(f"step {values['step']}/{self.total_steps}  {text}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def progress_text(values: dict[str, Any]) -> str:
    """A line of metrics.jsonl in a few words."""
    if "held_out_loss" in values:
        return f"held-out loss {_number(values['held_out_loss'], '.4f')}"
    text = (
        f"loss {_number(values['loss'], '.4f')}  grad {_number(values['grad_norm'], '.3g')}  "
        f"{values['samples_per_second']:.1f} samples/s  "
        f"data wait {values['data_wait_share']:.0%}"
    )
    mfu = values.get("mfu")
    return text if mfu is None else f"{text}  MFU {mfu:.1%}"


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)
