"""What every verb of the command line has in common."""

import argparse
import math
import re
import sys
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

EXIT_CODES = """\
exit codes:
  0 done   2 usage   65 too much bad data   66 input missing   69 this node is bad
  70 numeric failure   71 hang   73 run locked   74 storage   75 preempted: requeue me
  78 recipe or inputs do not fit together
"""


def add_verb(verbs, name: str, run, help: str, example: str) -> argparse.ArgumentParser:
    """A verb with its help, an example and the exit codes."""
    parser = verbs.add_parser(
        name,
        help=help,
        description=help,
        epilog=f"example:\n  {example}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_config(parser: argparse.ArgumentParser) -> None:
    """The arguments of a verb that reads a recipe."""
    parser.add_argument("config", help="a recipe, such as configs/base_36x64.yaml")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")


def word(what: str, give: str) -> Callable[[Callable[[str], T]], Callable[[str], T]]:
    """Turns the ValueError of a function that reads a word of the command line into one line."""

    def told(read: Callable[[str], T]) -> Callable[[str], T]:
        def reading(text: str) -> T:
            try:
                return read(text)
            except ValueError:
                raise argparse.ArgumentTypeError(f"{text!r} is no {what}; give {give}") from None

        return reading

    return told


@word("whole number from 1", "one")
def positive(text: str) -> int:
    return int(_between(int(text), 1))


@word("whole number from 0", "one")
def count(text: str) -> int:
    return int(_between(int(text), 0))


@word("time", "seconds, from 0")
def seconds(text: str) -> float:
    """A time that ends."""
    return _between(float(text), 0)


@word("amount of memory", "GiB above 0")
def gib(text: str) -> float:
    return _between(float(text), sys.float_info.min)


@word("name", "letters, digits and . _ -")
def plain_name(text: str) -> str:
    """A name that is part of a file's."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", text):
        raise ValueError
    return text


def _between(number: float, least: float) -> float:
    if not least <= number < math.inf:
        raise ValueError
    return number
