"""A process that has no reason to live without its parent ends with it."""

import ctypes
import os
import select
import signal
import threading
import time

KILLED = 128 + signal.SIGKILL
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """From now on the kernel signals this process when the one that started it ends, however that
    ends; where it has ended already, this one does so now. Kept through `exec`."""
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "prctl"):  # Linux
        libc.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(KILLED)


def end_with(process: int) -> None:
    """From now on this process ends when another one of this host does. For one that is no child
    of it, such as a worker that a server process made: the server lives as long as its workers."""

    def wait() -> None:
        try:
            select.select([os.pidfd_open(process)], [], [])
        except ProcessLookupError:
            os._exit(KILLED)
        except (AttributeError, OSError):  # an old kernel, or a sandbox that has no such call
            while _lives(process):
                time.sleep(1.0)
        os._exit(KILLED)

    threading.Thread(target=wait, name="end with its owner", daemon=True).start()


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
