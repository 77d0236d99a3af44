"""The `t2v` command: one thin function per verb."""

import argparse
import os
import signal
import sys
from io import TextIOWrapper
from pathlib import Path
from types import FrameType

from data_pipeline.errors import INTERRUPTED, UserError, exit_code_of
from data_pipeline.printable import plain
from t2v.commands.checkpoint import add_checkpoint_verbs
from t2v.commands.cluster import add_cluster_verbs
from t2v.commands.data import add_data_verbs
from t2v.commands.evaluate import add_evaluate_verbs
from t2v.commands.launch import add_launch_verbs
from t2v.commands.parser import EXIT_CODES, add_config, add_verb
from t2v.commands.report import add_report_verbs
from t2v.commands.sample import add_sample_verb
from t2v.commands.schema import add_schema_verb


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; what a user, a file or the cluster caused ends as one line and an exit code."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end_in_order)
    if isinstance(sys.stdout, TextIOWrapper):  # a file may be called what no text can hold
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    # Overrides may also stand after options.
    if rest and not (hasattr(options, "overrides") and all("=" in item for item in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    try:
        return options.run(options) or 0
    except UserError as error:
        if is_mine(error):
            print(plain(error), file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted; what was committed stands.", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        code = exit_code_of(error)
        if code == 1:
            raise
        problem = f"{error.filename or 'a disk'}: cannot be used because of '{error.strerror}'"
        print(plain(f"{problem}; check path, permissions and free space."), file=sys.stderr)
        return code


def end_in_order(number: int, _frame: FrameType | None) -> None:
    """A scheduler's SIGTERM ends what keeps nothing of its own, so that no temporary files stay."""
    sys.exit(128 + number)


def is_mine(error: UserError) -> bool:
    """Whether this of all processes tells an error: the rank that met it; before ranks have met,
    all of a machine find the same, and the first of them tells."""
    if error.rank is not None:
        return str(error.rank) == os.environ.get("RANK", "0")
    return os.environ.get("LOCAL_RANK", "0") == "0"


def quickstart(options: argparse.Namespace) -> int:
    from t2v.quickstart import run_quickstart

    return run_quickstart(Path(options.workdir), options.method, options.seed)


def train(options: argparse.Namespace) -> int:
    from t2v.attempt import preemption

    # Before torch is imported: a signal during that long import must not kill the process.
    preemption.arm()
    from t2v.loop import train as run
    from t2v.recipe.recipe import load_config

    config = load_config(options.config, options.overrides)
    return run(config, clear_failures=options.clear_failures)


def plan(options: argparse.Namespace) -> None:
    from t2v.plan.plan import plan as forecast
    from t2v.plan.plan import print_plan
    from t2v.recipe.recipe import load_config

    config = load_config(options.config, options.overrides)
    site = {
        "gpus": options.gpus,
        "gpu_memory_gib": options.gpu_memory_gib,
        "gb_per_second": options.gpu_gb_per_second,
    }
    if options.tune:
        from t2v.plan.tune import print_choices, tune

        print_choices(tune(config, **site))
        return
    result = forecast(config, **site)
    print(result.to_json()) if options.json else print_plan(result)


def build_parser() -> argparse.ArgumentParser:
    """All verbs with their arguments and an example each."""
    parser = argparse.ArgumentParser(
        prog="t2v",
        description="Hierarchical Patch Diffusion Models: data, training, sampling.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    verb = add_verb(verbs, "quickstart", quickstart, "the whole story on a CPU in minutes",
                    "t2v quickstart --method pyramid-flow --workdir quickstart")  # fmt: skip
    verb.add_argument("--workdir", default="quickstart", help="where everything is written")
    verb.add_argument("--method", choices=("hpdm", "pyramid-flow"), default="hpdm")
    verb.add_argument("--seed", type=int, default=0, help="of toys, weights and order of samples")

    add_data_verbs(verbs)

    verb = add_verb(verbs, "plan", plan, "what a recipe needs, before it queues",
                    "t2v plan configs/t2v_64x288x512.yaml --gpus 64 --json")  # fmt: skip
    add_config(verb)
    verb.add_argument("--gpus", type=int, default=1)
    verb.add_argument("--gpu-memory-gib", type=float, default=80.0)
    verb.add_argument("--gpu-gb-per-second", type=float, default=50.0,
                      help="what each GPU receives from others at most")  # fmt: skip
    answer = verb.add_mutually_exclusive_group()
    answer.add_argument("--tune", action="store_true",
                        help="rank the engine's settings that fit")  # fmt: skip
    answer.add_argument("--json", action="store_true", help="print JSON instead of tables")

    verb = add_verb(verbs, "train", train, "train a recipe; alone or under torchrun",
                    "torchrun --nproc-per-node 2 -m t2v.cli train configs/base_36x64.yaml"
                    " total_steps=1000")  # fmt: skip
    add_config(verb)
    verb.add_argument(
        "--clear-failures", action="store_true", help="start again although attempts kept failing"
    )

    add_report_verbs(verbs)
    add_checkpoint_verbs(verbs)
    add_sample_verb(verbs)
    add_evaluate_verbs(verbs)
    add_launch_verbs(verbs)
    add_cluster_verbs(verbs)
    add_schema_verb(verbs)
    return parser


if __name__ == "__main__":
    sys.exit(main())
