"""Progress bars of long work; silent where nobody watches."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.markup import escape
from rich.progress import track

from data_pipeline.printable import plain
from data_pipeline.terminal import Terminal

Item = TypeVar("Item")


def progress(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """The items, with a bar on a terminal's stderr."""
    if not sys.stderr.isatty():
        yield from items
        return
    shown = escape(plain(description))  # a bar reads its markup itself
    yield from track(items, shown, total=total, console=Terminal(stderr=True))
