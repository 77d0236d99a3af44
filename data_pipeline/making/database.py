"""The embedded database that lists are read into: it lies on disk, ends with its block, and its
queries end at a signal."""

import re
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import duckdb

from data_pipeline.errors import StorageError

MEMORY = "1GB"
INTERRUPTED = "Query interrupted"
FULL = ("Could not write", "No space left", "failed to offload")


@contextmanager
def open_database() -> Iterator[duckdb.DuckDBPyConnection]:
    """An empty database that is gone with the block. A signal in the midst of a query, which it
    tells as an error of its own, does what it does elsewhere; Ctrl-C is a KeyboardInterrupt."""
    signals: list[int] = []
    with tempfile.TemporaryDirectory(prefix="t2v-lists-") as folder:
        try:
            with (
                duckdb.connect(
                    f"{folder}/lists.db",
                    config={
                        "autoinstall_known_extensions": False,
                        "autoload_known_extensions": False,
                        "memory_limit": MEMORY,
                        "temp_directory": f"{folder}/spilled",
                    },
                ) as database,
                interrupted_by_signals(database, signals),
            ):
                database.execute("SET enable_progress_bar = false")
                yield database
        except (duckdb.Error, RuntimeError) as error:
            if isinstance(error, duckdb.InterruptException) or str(error) == INTERRUPTED:
                for number in signals:
                    signal.raise_signal(number)
                raise KeyboardInterrupt from error
            _refuse_full_disk(error)
            raise


@contextmanager
def interrupted_by_signals(
    database: duckdb.DuckDBPyConnection, signals: list[int]
) -> Iterator[None]:
    """End a query at a signal, and put it into `signals`: DuckDB looks for one only now and then,
    in some queries never, and forgets what its handler raised; others wait for its return."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard, told = socket.socketpair()
    told.setblocking(False)

    def listen() -> None:
        while number := heard.recv(1):
            if number[0] in (signal.SIGINT, signal.SIGTERM):
                signals.append(number[0])
                database.interrupt()

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    before = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        told.close()
        listener.join()
        heard.close()


def quoted(name: str) -> str:
    """A name of a column in SQL."""
    return '"' + name.replace('"', '""') + '"'


def text(value: str) -> str:
    """A text in SQL."""
    return "'" + value.replace("'", "''") + "'"


def reason(error: duckdb.Error) -> str:
    """What the database complains about, in one line."""
    if isinstance(error, duckdb.InterruptException):
        raise error
    _refuse_full_disk(error)
    first = str(error).strip().splitlines()[0].partition("Error: ")[2].rstrip(".")
    return re.sub(' in file "[^"]*"', "", first) or type(error).__name__


def _refuse_full_disk(error: Exception) -> None:
    """StorageError where it is the disk below the database that is full."""
    if any(words in str(error) for words in FULL):
        folder = tempfile.gettempdir()
        raise StorageError(
            f"{folder}: is full; make room, or set TMPDIR to another disk."
        ) from None
