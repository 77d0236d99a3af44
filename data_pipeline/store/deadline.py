"""A deadline for work that may be stuck in C code, where no exception and no signal reaches it."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from data_pipeline.errors import DataError

Result = TypeVar("Result")


def within(seconds: float, work: Callable[[], Result]) -> Result:
    """What `work` returns or raises; DataError once it takes longer.

    Late work is abandoned: its thread ends with the process, which the loader kills.
    """
    task = _Task(work)
    thread = threading.Thread(target=task.run, daemon=True, name="decode")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise DataError(f"is stuck in decoding, for more than {seconds:g} seconds")
    if task.error is not None:
        raise task.error
    return task.results[0]


class _Task(Generic[Result]):
    """Work of another thread, and what came of it."""

    def __init__(self, work: Callable[[], Result]):
        self.work = work
        self.results: list[Result] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.results.append(self.work())
        except BaseException as error:  # raised again by the thread that waits
            self.error = error
