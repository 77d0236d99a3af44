"""`t2v checkpoint`: list, prove, compare, export."""

import argparse
import json
from pathlib import Path

from data_pipeline.errors import InputMissing
from t2v.cli_parser import add_verb


def add_checkpoint_verbs(verbs) -> None:
    """The verbs below `t2v checkpoint`."""
    checkpoint = verbs.add_parser("checkpoint", help="list, prove, compare and export checkpoints")
    inner = checkpoint.add_subparsers(metavar="VERB", required=True)

    verb = add_verb(inner, "ls", ls, "steps, sizes and states of a run",
                    "t2v checkpoint ls runs/base_36x64")  # fmt: skip
    verb.add_argument("run_dir")

    verb = add_verb(inner, "verify", verify, "check every digest",
                    "t2v checkpoint verify runs/base_36x64/checkpoints/step-00001000")  # fmt: skip
    verb.add_argument("checkpoint", help="a step folder, or a run folder: its newest step")


def ls(options: argparse.Namespace) -> None:
    from t2v.train.finding import list_checkpoints, print_checkpoints

    folder = Path(options.run_dir)
    if not folder.is_dir():
        raise InputMissing(f"{folder}: no such run folder; give one with checkpoints in it.")
    print_checkpoints(list_checkpoints(folder))


def verify(options: argparse.Namespace) -> None:
    from t2v.train.finding import step_of, verify_checkpoint

    folder = step_of(options.checkpoint)
    manifest = verify_checkpoint(folder)
    print(json.dumps({"checkpoint": str(folder), "step": manifest.step, "valid": True}))
