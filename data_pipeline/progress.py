"""Progress bars of long work; silent where nobody watches."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")


def progress(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """The items, with a bar on a terminal's stderr."""
    if not sys.stderr.isatty():
        yield from items
        return
    yield from track(items, description, total=total, console=Console(stderr=True))
