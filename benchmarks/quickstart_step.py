"""CPU seconds of a training step of the quickstart's base, beside another tree of this project.

`python -m benchmarks.quickstart_step --against TREE` trains that recipe of TREE on the same clips
with the code of either, in turns, one process of one thread each; what one does to the machine it
does to both. Seconds are those of the training process itself, all threads, between two steps.
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
    parser.add_argument("--engine", choices=("single", "fsdp"), default="fsdp", help="of both")
    parser.add_argument("--engine-before", choices=("single", "fsdp"), help="of the other tree")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = (options.against / "configs" / "quickstart_base.yaml").resolve()
        engines = {"now": options.engine, "before": options.engine_before or options.engine}
        trees = {"now": ROOT, "before": options.against}
        for name, tree in trees.items():
            in_tree(tree, "--data", f"{folder}/{name}")
        pairs = []
        for turn in range(options.turns):
            seconds = {}
            for name in list(trees) if turn % 2 else list(reversed(trees)):
                run_dir, data = f"{folder}/{name}/run-{turn}", f"{folder}/{name}/data"
                work = (str(recipe), run_dir, data, engines[name], str(options.steps))
                seconds[name] = float(in_tree(trees[name], "--child", *work).splitlines()[-1])
            pairs.append((seconds["before"], seconds["now"]))
            ratio = seconds["now"] / seconds["before"]
            print(f"turn {turn}: {seconds['before'] * 1e3:.2f} -> {seconds['now'] * 1e3:.2f} ms, "
                  f"{ratio:.3f}", flush=True)  # fmt: skip
    ratios = sorted(now / before for before, now in pairs)
    result = {
        "recipe": "quickstart_base",
        "engine": engines,
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


def in_tree(tree: Path, *arguments: str) -> str:
    """What a part of this script prints that runs with the code of a tree."""
    return subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), *arguments],
        env=os.environ | {"PYTHONPATH": str(tree.resolve()), "OMP_NUM_THREADS": "1"},
        cwd=tree, stdout=subprocess.PIPE, text=True, check=True,
    ).stdout  # fmt: skip


def measure(recipe: str, run_dir: str, data: str, engine: str, steps: str) -> None:
    """Train, and print the median of the process's CPU seconds from step to step."""
    from t2v import loop
    from t2v.recipe.recipe import load_config

    overrides = [
        f"run_dir={run_dir}", f"total_steps={WARM_UP + int(steps)}", f"engine.kind={engine}",
        f"data.sources.0.path={data}/videos", f"data.sources.1.path={data}/images",
        "optimizer.warmup_steps=5",
    ]  # fmt: skip
    if "samples:" in Path(recipe).read_text():
        overrides.append("samples=null")
    if engine == "single":
        overrides.append("engine.reshard_after_forward=true")
    ends, fault = [], loop.fault

    def noted(site: str, step: int = 0) -> bool:
        if site == "step":
            ends.append(time.process_time())
        return fault(site, step)

    loop.fault = noted
    loop.train(load_config(recipe, overrides))
    ends = ends[WARM_UP:]
    print(statistics.median(b - a for a, b in pairwise(ends)))


def commit(tree: Path) -> str:
    """The commit of a tree, and whether it has changed since."""
    ask = ["git", "-C", str(tree), "describe", "--always", "--dirty"]
    return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--data"]:
        make_data(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["--child"]:
        measure(*sys.argv[2:])
    else:
        main()
