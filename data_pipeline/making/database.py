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
    """An empty database that is gone with the block. Ctrl-C in the midst of a query, which it tells
    as an error of its own, is a KeyboardInterrupt."""
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
                interrupted_by_signals(database),
            ):
                database.execute("SET enable_progress_bar = false")
                yield database
        except duckdb.InterruptException as error:
            raise KeyboardInterrupt from error
        except duckdb.Error as error:
            _refuse_full_disk(error)
            raise
        except RuntimeError as error:
            if str(error) == INTERRUPTED:
                raise KeyboardInterrupt from error
            raise


@contextmanager
def interrupted_by_signals(database: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """End a query at a signal: DuckDB looks for one only now and then, in some queries never, and
    Python's own handlers wait for its return."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard, told = socket.socketpair()
    told.setblocking(False)

    def listen() -> None:
        while number := heard.recv(1):
            if number[0] in (signal.SIGINT, signal.SIGTERM):
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
        raise KeyboardInterrupt from error
    _refuse_full_disk(error)
    first = str(error).strip().splitlines()[0].partition("Error: ")[2].rstrip(".")
    if "state machine" in first:
        return "some of its lines end in CR LF and others in LF"
    return re.sub(' in file "[^"]*"', "", first) or type(error).__name__


def _refuse_full_disk(error: duckdb.Error) -> None:
    """StorageError where it is the disk below the database that is full."""
    if any(words in str(error) for words in FULL):
        folder = tempfile.gettempdir()
        raise StorageError(
            f"{folder}: is full; make room, or set TMPDIR to another disk."
        ) from None
