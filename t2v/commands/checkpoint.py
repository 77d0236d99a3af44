"""`t2v checkpoint`: list, prove, compare, export."""

import argparse
import json
import math
from pathlib import Path

from data_pipeline.errors import ConfigError, InputMissing
from data_pipeline.printable import plain
from t2v.commands.parser import add_verb


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

    verb = add_verb(inner, "diff", diff, "compare two checkpoints; exit 0 when they are identical",
                    "t2v checkpoint diff runs/a runs/b/checkpoints/step-00001000")  # fmt: skip
    verb.add_argument("first", help="a step folder, or a run folder: its newest step")
    verb.add_argument("second")

    verb = add_verb(inner, "export", export, "weights as safetensors, proved by using them",
                    "t2v checkpoint export runs/t2v_64x288x512 weights --dtype bf16")  # fmt: skip
    verb.add_argument("checkpoint", help="a step folder, or a run folder: its newest valid step")
    verb.add_argument("out", help="a folder that is not there yet")
    verb.add_argument("--weights", choices=("ema", "raw"), default="ema")
    verb.add_argument(
        "--ema-length",
        type=float,
        help="relative length of another average, made of those that the run's checkpoints hold "
        "(ema_lengths), such as 0.075",
    )
    verb.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    verb.add_argument("--file-gib", type=float, default=5.0, help="largest file")
    verb.add_argument(
        "--no-self-test",
        action="store_true",
        help="do not run the model; for a machine whose memory does not hold it in fp32",
    )


def ls(options: argparse.Namespace) -> None:
    from t2v.checkpoint.finding import list_checkpoints, print_checkpoints

    folder = Path(options.run_dir)
    if not folder.is_dir():
        raise InputMissing(f"{folder}: no such run folder; give one with checkpoints in it.")
    infos = list_checkpoints(folder)
    if not infos and not (folder / "status.json").exists():
        raise InputMissing(f"{folder}: holds no checkpoint; give a run folder.")
    print_checkpoints(infos)


def verify(options: argparse.Namespace) -> None:
    from t2v.checkpoint.finding import step_of
    from t2v.checkpoint.proving import verify_checkpoint

    folder = step_of(options.checkpoint)
    manifest = verify_checkpoint(folder)
    print(json.dumps({"checkpoint": str(folder), "step": manifest.step, "valid": True}))


def diff(options: argparse.Namespace) -> int:
    from t2v.checkpoint.comparison import compare_checkpoints, print_differences
    from t2v.checkpoint.finding import step_of

    total, found = compare_checkpoints(step_of(options.first), step_of(options.second))
    print_differences(total, found)
    return 1 if found else 0


def export(options: argparse.Namespace) -> None:
    from t2v.checkpoint.export import export_checkpoint
    from t2v.checkpoint.finding import resolve_checkpoint
    from t2v.checkpoint.manifest import read_manifest
    from t2v.recipe.recipe import method_of, parse_config

    if not 0 < options.file_gib < math.inf:
        raise ConfigError(
            f"--file-gib: {options.file_gib} is wrong because a file holds a finite size above 0; "
            "give one."
        )
    if options.ema_length is not None and options.weights == "raw":
        raise ConfigError("--ema-length: is wrong because raw weights are no average; drop one.")
    checkpoint = resolve_checkpoint(options.checkpoint)
    made = export_checkpoint(
        checkpoint,
        Path(options.out),
        method_of(parse_config(read_manifest(checkpoint).config, str(checkpoint))),
        weights=options.weights,
        ema_length=options.ema_length,
        dtype=options.dtype,
        file_gib=options.file_gib,
        self_test=not options.no_self_test,
    )
    weights = made.weights if made.ema_length is None else f"average of {made.ema_length:g}"
    error = "" if made.ema_error is None else f" profile met to {made.ema_error:.1%};"
    told = f"{made.parameters / 1e6:.1f} M parameters of step {made.step} ({weights}, {made.dtype})"
    print(plain(f"{options.out}: {told};{error} self-test: {made.self_test}."))
