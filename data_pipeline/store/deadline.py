"""A deadline for work that may be stuck in C code, where no exception and no signal reaches it."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from data_pipeline.errors import DataError

Result = TypeVar("Result")


def within(seconds: float, work: Callable[[], Result]) -> Result:
    """What `work` returns or raises; DataError once it takes longer.

    Late work is abandoned: its thread ends with the process, which the loader kills.
    """
    outcome: Future[Result] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # raised again by the thread that waits
            outcome.set_exception(error)

    thread = threading.Thread(target=run, daemon=True, name="decode")
    thread.start()
    thread.join(seconds)  # to its very end: what C code leaves to threads must be gone, too
    if thread.is_alive():
        raise DataError(f"is stuck in decoding, for more than {seconds:g} seconds")
    return outcome.result()
