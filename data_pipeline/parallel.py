"""A function over many items in worker processes, results in the items' order."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from typing import TypeVar

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.orphans import end_with

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 3  # items under way per worker; bounds the memory of results that wait


def map_in_order(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    *,
    named: Callable[[Item], str] = str,
) -> Iterator[Result]:
    """`map` by so many processes; by this one where `workers` is 1. Messages name items by
    `named`."""
    if workers <= 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("forkserver")
    resource_tracker.ensure_running()  # which would make this process hear Ctrl-C again
    with held_back(signal.SIGINT):
        forkserver.ensure_running()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_quietly)
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            # What submits may start a worker, which must not be forgotten.
            with held_back(signal.SIGINT):
                waiting.append((item, pool.submit(function, item)))
            if len(waiting) >= AHEAD * workers:
                yield waiting[0][1].result()
                waiting.popleft()
        while waiting:
            yield waiting[0][1].result()
            waiting.popleft()
    except BrokenProcessPool:
        # A pool breaks as a whole: at a result, or already where the next item is handed in.
        suspect = named(waiting[0][0]) if waiting else "the first item"
        raise DataError(
            f"{suspect}: a worker process died at it or soon after; look for lack of memory, or "
            "find the file that kills the decoder with one worker."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def refuse_bad_task(task: tuple[int, int]) -> None:
    """ConfigError unless a task is (number, count) with numbers from 0 on."""
    if not 0 <= task[0] < task[1]:
        raise ConfigError(
            f"task: value {task[0]}/{task[1]} is wrong because tasks count from 0 to N-1; "
            "give I/N with I below N."
        )


@contextmanager
def held_back(*signals: signal.Signals) -> Iterator[None]:
    """Hear signals only behind the block, those that come meanwhile, too; processes that are
    started in it hear none until they say so."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_quietly() -> None:
    """Workers of a killed parent would wait forever, and at Ctrl-C each would tell where it was."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    end_with(parent.pid)
