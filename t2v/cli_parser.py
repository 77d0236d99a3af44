"""What every verb of the command line has in common."""

import argparse

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
