"""`t2v evaluate` and `t2v scores`: a run or a folder of clips judged by a protocol, and results
side by side."""

import argparse
import os
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.printable import plain
from t2v.commands.parser import add_verb

LONGEST = 10**6  # characters of a table


def add_evaluate_verbs(verbs) -> None:
    """The verbs and their arguments."""
    verb = add_verb(verbs, "evaluate", evaluate, "judge a run or samples by a protocol",
                    "torchrun --nproc-per-node 8 -m t2v.cli evaluate runs/ucf101_s --protocol"
                    " configs/evaluation/ucf101_2048.yaml --out scores/ucf101_s")  # fmt: skip
    verb.add_argument("target", help="a folder of samples; or a run or a step, which is sampled")
    what = verb.add_mutually_exclusive_group(required=True)
    what.add_argument("--protocol", help="see configs/evaluation")
    what.add_argument("--export", choices=["vbench"],
                      help="copy samples under another program's names")  # fmt: skip
    verb.add_argument("--out", required=True, help="folder for result.json, result.md, samples")
    verb.add_argument("--cache", help="where measured values are kept; by default in T2V_CACHE")
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    verb.add_argument("--workers", type=int, default=max(1, cores),
                      help="processes that decode clips, for each that measures")  # fmt: skip
    verb.add_argument("--encoder", help="of a run that reads text: its text encoder")
    verb.add_argument("--vae", help="of a run that makes latents: their autoencoder")
    verb.add_argument("--set", action="append", metavar="dotted.key=value",
                      help="of the protocol, such as i3d.path=i3d.pt")  # fmt: skip
    verb.add_argument("--sampling", action="append", metavar="KEY=VALUE",
                      help="a sampling setting, where a run is given")  # fmt: skip
    verb.add_argument("--memory-gib", type=float, help="memory of each process that samples")

    verb = add_verb(verbs, "scores", scores, "results of one protocol side by side",
                    "t2v scores scores/ucf101_s scores/ucf101_m")  # fmt: skip
    verb.add_argument("results", nargs="+", help="result.json files, or their folders")


def evaluate(options: argparse.Namespace) -> int:
    from t2v.evaluation.evaluate import Job, evaluate
    from t2v.evaluation.protocol import load_protocol
    from t2v.evaluation.vbench import export_vbench
    from t2v.sampling.generate import Means

    if options.export:
        clips = export_vbench(Path(options.target), Path(options.out))
        print(plain(f"{options.out}: {clips} clips."))
        return 0
    cache = options.cache or Path(os.environ.get("T2V_CACHE", "~/.cache/t2v")) / "measured"
    job = Job(
        target=Path(options.target),
        out=Path(options.out),
        cache=Path(cache).expanduser(),
        workers=max(1, options.workers),
        encoder=options.encoder,
        vae=options.vae,
        settings=tuple(options.sampling or ()),
        means=Means(memory_gib=options.memory_gib),
    )
    rank = int(os.environ.get("RANK", "0"))
    try:
        protocol = load_protocol(options.protocol, options.set or [])
        out = evaluate(protocol, options.protocol, job)
    except UserError as error:
        if error.rank in (None, rank):
            raise
        return error.exit_code  # its own rank tells it
    if rank == 0:
        print(plain((out / "result.md").read_text(), most=LONGEST), end="")
    return 0


def scores(options: argparse.Namespace) -> None:
    from t2v.evaluation.results import compare

    print(plain(compare([Path(result) for result in options.results]), most=LONGEST), end="")
