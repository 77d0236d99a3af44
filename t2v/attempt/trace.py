"""Where a rank is, kept in memory that outlives it: whoever is killed cannot say so himself.

The process that starts a rank makes the memory and names it in `T2V_TRACE`; it reads there what a
rank was at when it died without a word.
"""

import contextlib
import json
import mmap
import os
from collections.abc import Iterable
from typing import Any

VARIABLE, NAME = "T2V_TRACE", "t2v-trace"
BYTES = 1 << 16


class Trace:
    """The last place a rank told: its section, step and samples."""

    def __init__(self, file: int) -> None:
        self.memory = mmap.mmap(file, BYTES)

    def tell(self, section: str, step: int, samples: Iterable[str] = ()) -> None:
        """This rank is now here; names of samples are left out where they are too many."""
        place = {"section": section, "step": step, "samples": list(samples)}
        content = json.dumps(place).encode()
        if len(content) >= BYTES:
            content = json.dumps(place | {"samples": []}).encode()
        self.memory[: len(content) + 1] = content + b"\0"

    def read(self) -> dict[str, Any]:
        """What was told last; empty where nothing was, or the rank died in the midst of a word."""
        try:
            return json.loads(self.memory[: self.memory.find(b"\0")])
        except ValueError:
            return {}


def new_trace() -> tuple[Trace, int]:
    """Memory for a rank that is about to start, and the file to hand to it."""
    file = os.memfd_create(NAME)
    os.ftruncate(file, BYTES)
    return Trace(file), file


def given_trace() -> Trace | None:
    """The memory that this rank was given, if any."""
    file = os.environ.get(VARIABLE, "")
    # Processes that a rank starts inherit the variable, but not the file of that number.
    with contextlib.suppress(OSError):
        if file.isdecimal() and NAME in os.readlink(f"/proc/self/fd/{file}"):
            return Trace(int(file))
    return None
