"""Words of others as plain text, whose every character can be seen, and not without end."""

import contextlib
import sys
from typing import TextIO

MOST_CHARACTERS = 10_000


def plain(text: object, *, most: int = MOST_CHARACTERS) -> str:
    """A text whose every character but line ends and tabs can be seen: others as in Python's
    literals, such as `\\x1b`."""
    whole = str(text)
    shown = "".join(
        sign if sign.isprintable() or sign in "\n\t" else sign.encode("unicode_escape").decode()
        for sign in whole[:most]
    )
    if len(whole) <= most:
        return shown
    return f"{shown} ... ({len(whole):,} characters)"


def say(text: object, *, to: TextIO | None = None, most: int = MOST_CHARACTERS) -> None:
    """Lines of plain text on stdout, or elsewhere; a run outlives whoever listened."""
    with contextlib.suppress(OSError):
        print(plain(text, most=most), file=to or sys.stdout, flush=True)
