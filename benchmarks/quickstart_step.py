"""CPU seconds of a training step of the quickstart's base, beside another tree of this project.

`python -m benchmarks.quickstart_step --against TREE` trains the same recipe on the same clips with
the code of either, in turns, one process of one thread each; what one does to the machine it does
to both. Seconds are those of the training process itself, all of its threads, between two steps.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parent.parent
WARM_UP = 10  # steps that are not counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, required=True, help="a checkout of another commit")
    parser.add_argument("--steps", type=int, default=60, help="counted steps of a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--engine", choices=("single", "fsdp"), default="fsdp")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder))
        pairs = []
        for turn in range(options.turns):
            trees = {"now": ROOT, "before": options.against}
            order = list(trees) if turn % 2 else list(reversed(trees))
            seconds = {n: one_turn(trees[n], Path(folder), turn, options) for n in order}
            pairs.append((seconds["before"], seconds["now"]))
            ratio = seconds["now"] / seconds["before"]
            print(f"turn {turn}: {seconds['before'] * 1e3:.2f} -> {seconds['now'] * 1e3:.2f} ms, "
                  f"{ratio:.3f}", flush=True)  # fmt: skip
    ratios = sorted(now / before for before, now in pairs)
    result = {
        "recipe": "quickstart_base",
        "engine": options.engine,
        "before": commit(options.against),
        "now": commit(ROOT),
        "cpu": platform.processor() or platform.machine(),
        "steps": options.steps,
        "cpu_milliseconds_before": [round(1e3 * before, 3) for before, _ in pairs],
        "cpu_milliseconds_now": [round(1e3 * now, 3) for _, now in pairs],
        "ratio": {
            "median": round(statistics.median(ratios), 4),
            "lowest": round(ratios[0], 4),
            "highest": round(ratios[-1], 4),
        },
        "date": time.strftime("%Y-%m-%d"),
    }
    print(json.dumps(result["ratio"]))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def make_data(folder: Path) -> None:
    """A few toy clips and images with embeddings, as the quickstart makes them."""
    from data_pipeline.making.toy import all_toys
    from data_pipeline.text.embed import make_tiny_encoder
    from t2v.cli import main as command

    command(["data", "toy", str(folder / "media"), "--videos=24", "--images=8"])
    make_tiny_encoder(folder / "encoder", sorted({t.caption for t in all_toys()}), width=64, seed=0)
    for kind in ("videos", "images"):
        data = str(folder / "data" / kind)
        command(["data", "build", str(folder / "media" / kind), data, "--size=8x24x32", "--fps=8"])
        command(["data", "embed", data, f"--encoder={folder / 'encoder'}", "--name=tiny-t5",
                 "--max-tokens=16"])  # fmt: skip


def one_turn(tree: Path, folder: Path, turn: int, options: argparse.Namespace) -> float:
    """Median CPU seconds of a step with the code of a tree."""
    run_dir = folder / f"run-{turn}-{tree.name}"
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    arguments = [str(run_dir), str(folder / "data"), options.engine, str(options.steps)]
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), "--child", *arguments],
        env=environment, cwd=tree, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout.splitlines()[-1])


def child(run_dir: str, data: str, engine: str, steps: str) -> None:
    """Train, and print the median of the process's CPU seconds from step to step."""
    from t2v import loop
    from t2v.recipe.recipe import load_config

    overrides = [
        f"run_dir={run_dir}", f"total_steps={WARM_UP + int(steps)}", f"engine.kind={engine}",
        f"data.sources.0.path={data}/videos", f"data.sources.1.path={data}/images",
        "optimizer.warmup_steps=5", "samples=null",
    ]  # fmt: skip
    if engine == "single":
        overrides.append("engine.reshard_after_forward=true")
    ends, fault = [], loop.fault

    def noted(site: str, step: int = 0) -> bool:
        if site == "step":
            ends.append(time.process_time())
        return fault(site, step)

    loop.fault = noted
    loop.train(load_config("configs/quickstart_base.yaml", overrides))
    ends = ends[WARM_UP:]
    print(statistics.median(b - a for a, b in pairwise(ends)))


def commit(tree: Path) -> str:
    """The commit of a tree, and whether it has changed since."""
    ask = ["git", "-C", str(tree), "describe", "--always", "--dirty"]
    return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main()
