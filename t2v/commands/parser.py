"""What every verb of the command line has in common."""

import argparse
import math
import re

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


def positive(text: str) -> int:
    """A whole number from 1."""
    return _whole(text, least=1)


def count(text: str) -> int:
    """A whole number from 0."""
    return _whole(text, least=0)


def seconds(text: str) -> float:
    """A time that ends: not negative, and neither nan nor inf."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; give seconds, from 0")
    return number


def plain_name(text: str) -> str:
    """A name that is part of a file's."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name; use letters, digits and . _ -")
    return text


def _whole(text: str, *, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least}; give one")
    return number
