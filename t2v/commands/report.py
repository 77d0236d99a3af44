"""The verbs that watch a run: `t2v samples` and `t2v report`."""

import argparse
from pathlib import Path

from data_pipeline.printable import plain
from t2v.commands.parser import add_verb


def samples(options: argparse.Namespace) -> int:
    from t2v.watching.side_job import sample_run

    return sample_run(
        Path(options.run_dir),
        follow=options.follow,
        parent=options.parent,
        encoder=options.encoder,
    )


def report(options: argparse.Namespace) -> None:
    from t2v.watching.page import write_report

    run_dir = Path(options.run_dir)
    written = write_report(run_dir, Path(options.out) if options.out else run_dir / "report.html")
    print(plain(f"{written}: written."))


def add_report_verbs(verbs) -> None:
    """Add the verbs to the command line."""
    verb = add_verb(verbs, "samples", samples, "sample a run's checkpoints as they are committed",
                    "t2v samples runs/base_36x64 --follow")  # fmt: skip
    verb.add_argument("run_dir", help="a run whose recipe has a samples section")
    verb.add_argument("--follow", action="store_true", help="go on until the run is done")
    verb.add_argument("--encoder", help="text encoder, where the recipe's is elsewhere here")
    verb.add_argument("--parent", type=int, help=argparse.SUPPRESS)

    verb = add_verb(verbs, "report", report, "a run as one HTML page that needs no network",
                    "t2v report runs/base_36x64 --out base.html")  # fmt: skip
    verb.add_argument("run_dir")
    verb.add_argument("--out", help="default: report.html in the run folder")
