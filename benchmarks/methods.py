"""The methods on the same toy clips at equal training compute: HPDM, Pyramid Flow unit by unit and
all frames at once, and a plain full-resolution flow by the same network.

Recipes are the quickstart's, brought to one geometry, width and batch; each trains as many steps as
its counted operations allow, from random weights, in a process of its own with one thread. Their
samples are read from their pixels and compared with clips that no run has seen. A run that is done
is not done again.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import t as student
from torch.nn import functional

from data_pipeline.making.build import build
from data_pipeline.making.toy import all_toys, write_toy
from data_pipeline.media.codec import decode_clip
from data_pipeline.pyramid import Clip
from data_pipeline.store import storage
from t2v.cli import main as t2v
from t2v.evaluation.scores import frechet_distance, moments
from t2v.plan.footprint import training_tflop
from t2v.quickstart import CONFIGS, prepare_data, score
from t2v.recipe.recipe import RunConfig, dump_config, load_config, method_of

ROOT = Path(__file__).parent.parent
FRAMES, HEIGHT, WIDTH = CLIP = 8, 12, 16
PATCH, TOKEN = (4, 6, 8), (3, 4)
NESTED = (
    f"method.pyramid={{levels: 2, patch_size: {[*PATCH]}, clip_size: {[*CLIP]}}}",
    f"method.model.token_size={[1, *TOKEN]}",
    "warm_start=null",
)
WHOLE = (f"method.clip_size={[*CLIP]}", f"method.model.token_size={[*TOKEN]}")
FULL = (*WHOLE, "method.temporal=full", "method.unit_frames=null")
# Name, the quickstart's recipe, and what of it is changed.
WAYS = {
    "HPDM": ("quickstart_pyramid", NESTED),
    "Pyramid Flow, unit by unit": (
        "quickstart_pyramid_flow",
        (*WHOLE, "method.unit_frames=1"),
    ),
    "Pyramid Flow, all frames": (
        "quickstart_pyramid_flow",
        (*FULL, "method.sampling.steps=[16,16]"),
    ),
    "plain flow": (
        "quickstart_pyramid_flow",
        (*FULL, "method.flow.joints=[]", "method.stage_turns=[0]", "method.sampling.steps=[32]"),
    ),
}
SEEDS = (0, 1, 2)
BATCH = 16
PROMPTS = 40
MEASURED = ("colour", "direction", "in one piece", "shape", "frechet")


def recipe(way: str, workdir: Path, seed: int, tflop: float) -> RunConfig:
    """A way's recipe, with the steps that the compute allows."""
    name, changes = WAYS[way]
    common = (
        f"data.sources=[{{path: {workdir / 'data' / 'videos'}}}]", "data.num_workers=0",
        f"run_dir={workdir / 'runs' / slug(way, seed)}", f"seed={seed}",
        f"global_batch_size={BATCH}", f"micro_batch_size={BATCH}", "engine.kind=single",
        "samples=null",
    )  # fmt: skip
    once = load_config(CONFIGS / f"{name}.yaml", [*common, *changes])
    steps = round(tflop / (BATCH * training_tflop(method_of(once))))
    length = (
        f"total_steps={steps}", f"ema_half_life_steps={steps / 12}",
        f"optimizer.warmup_steps={min(50, steps // 10)}", f"checkpoint.every_steps={steps}",
    )  # fmt: skip
    return load_config(CONFIGS / f"{name}.yaml", [*common, *changes, *length])


def slug(way: str, seed: int) -> str:
    """The name of a run's folder."""
    return f"{way.replace(',', '').replace(' ', '-').lower()}-{seed}"


def prepare(workdir: Path) -> None:
    """Clips to train on, and others to compare with."""
    config = load_config(CONFIGS / "quickstart_pyramid.yaml", list(NESTED))
    for name, videos, seed in (("media", 640, 0), ("unseen", 160, 1)):
        write_toy(workdir / name, videos=videos, images=0, size=(FRAMES, 96, 128), seed=seed)
    only = config.model_copy(
        update={"data": config.data.model_copy(update={"sources": config.data.sources[:1]})}
    )
    prepare_data(workdir, only)
    build(workdir / "unseen" / "videos", workdir / "data" / "unseen", frames=FRAMES, height=HEIGHT,
          width=WIDTH, fps=8.0)  # fmt: skip
    (workdir / "ready").touch()


def features(clips: list[Clip]) -> Float[np.ndarray, "clips 12"]:
    """Answers of a fixed, random three-layer network to what a clip shows and how it moves: each
    kernel spans two frames."""
    generator = torch.Generator().manual_seed(0)
    x = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    for channels in (24, 24, 12):
        kernel = torch.randn(channels, x.shape[1], 2, 3, 3, generator=generator)
        kernel /= (18 * x.shape[1]) ** 0.5
        x = functional.leaky_relu(functional.conv3d(x, kernel, stride=(1, 2, 2), padding=(0, 1, 1)))
    return x.mean(dim=(2, 3, 4)).numpy()


def distance(clips: list[Clip], unseen: list[Clip]) -> float:
    """Fréchet distance of features, in units of their deviations among unseen clips."""
    known = features(unseen)
    of, to = ((one - known.mean(0)) / known.std(0) for one in (features(clips), known))
    return frechet_distance(moments(of), moments(to))


def floor(unseen: list[Clip], clips: int) -> list[float]:
    """Distances of as many unseen clips, drawn by each seed, from the others: what a perfect model
    is measured at."""
    orders = (np.random.default_rng(seed).permutation(len(unseen)) for seed in SEEDS)
    drawn = ([unseen[n] for n in order] for order in orders)
    return [distance(some[:clips], some[clips:]) for some in drawn]


def unseen_clips(workdir: Path) -> list[Clip]:
    """Toy clips of the dataset's size that no run trains on."""
    from webdataset import WebDataset

    shards = sorted(str(path) for path in (workdir / "data" / "unseen" / "shards").glob("*.tar"))
    samples = WebDataset(shards, shardshuffle=False, empty_check=False)
    return [decode_clip(sample["mp4"]) for sample in samples]


def run(way: str, seed: int, workdir: Path, tflop: float) -> dict[str, Any]:
    """Train, sample and measure, in this process."""
    torch.set_num_threads(1)
    config = recipe(way, workdir, seed, tflop)
    method, name = method_of(config), slug(way, seed)
    path = workdir / "runs" / f"{name}.yaml"
    for begun in (path.parent / name, workdir / "samples" / name):
        shutil.rmtree(begun, ignore_errors=True)  # or its seconds would be those of two attempts
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_config(config))
    before, started = peak_mib(), time.process_time()
    assert t2v(["train", str(path)]) == 0
    trained, peak = time.process_time(), peak_mib()
    toys = [toy for number, toy in enumerate(all_toys()) if (number + number // 4) % 2 == 0]
    assert len(toys) == PROMPTS
    out = workdir / "samples" / name
    prompts = [f"--prompt={toy.caption}" for toy in toys]
    assert t2v(["sample", config.run_dir, f"--out={out}", f"--seed={1000 * seed}", *prompts,
                f"--encoder={workdir / 'encoder'}"]) == 0  # fmt: skip
    sampled = time.process_time()
    records = json.loads((out / "samples.json").read_text())
    clips = [decode_clip((out / record["file"]).read_bytes()) for record in records]
    return {
        "way": way,
        "seed": seed,
        "parameters": sum(p.numel() for p in method.network().parameters()),
        "steps": config.total_steps,
        "tflop": config.total_steps * BATCH * training_tflop(method),
        "train_cpu_seconds": trained - started,
        "train_peak_mib": peak - before,
        "sample_cpu_seconds_per_clip": (sampled - trained) / len(toys),
        "calls_per_clip": method.calls_per_clip * (1 + method.is_guided),
        **score(out, toys),
        "frechet": distance(clips, unseen_clips(workdir)),
    }


def peak_mib() -> float:
    """The most main memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean over seeds and half the width of its 95 % interval (Student's) of what was measured."""
    found = {}
    for key in (*MEASURED, "train_cpu_seconds", "sample_cpu_seconds_per_clip", "train_peak_mib"):
        values = [one[key] for one in runs]
        reach = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
        found[key] = {"mean": mean(values), "reach": reach}
    return found


def print_table(runs: list[dict[str, Any]]) -> None:
    """A row for each way, in Markdown's columns."""
    table = Table(
        "", "steps", "colour", "direction", "one piece", "shape", "Fréchet", "CPU s a clip",
        "calls", "train CPU s", "peak MiB",
    )  # fmt: skip
    for way in WAYS:
        mine = [one for one in runs if one["way"] == way]
        if not mine:
            continue
        told = summary(mine)

        def share(key: str, told: dict = told) -> str:
            return f"{told[key]['mean']:.2f} ± {told[key]['reach']:.2f}"

        table.add_row(
            way, str(mine[0]["steps"]), *(share(key) for key in MEASURED),
            f"{told['sample_cpu_seconds_per_clip']['mean']:.2f}", str(mine[0]["calls_per_clip"]),
            f"{told['train_cpu_seconds']['mean']:.0f}", f"{told['train_peak_mib']['mean']:.0f}",
        )  # fmt: skip
    Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tflop", type=float, default=1.0, help="compute of each training run")
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / "benchmark_methods")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "SEED"), help="a single run")
    options = parser.parse_args()
    workdir = options.workdir.resolve()
    if options.one:
        way, seed = options.one[0], int(options.one[1])
        told = json.dumps(run(way, seed, workdir, options.tflop), indent=1)
        storage.write_atomic(workdir / f"{slug(way, seed)}.json", told.encode())
        return
    if not (workdir / "ready").is_file():
        prepare(workdir)
    runs = []
    jobs = [(way, seed) for seed in SEEDS for way in WAYS]
    for way, seed in track(jobs, "runs", console=Console(stderr=True)):
        path = workdir / f"{slug(way, seed)}.json"
        if not path.is_file():
            command = [sys.executable, "-m", "benchmarks.methods", "--one", way, str(seed)]
            command += ["--workdir", str(workdir), "--tflop", str(options.tflop)]
            subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
                           stdout=sys.stderr)  # fmt: skip
        runs.append(json.loads(path.read_text()))
    print_table(runs)
    machine = f"{platform.machine().replace('_', '-')}-{os.cpu_count()}cpu"
    by_way = {way: summary([one for one in runs if one["way"] == way]) for way in WAYS}
    result = {
        "machine": machine,
        "tflop": options.tflop,
        "frechet_of_unseen_clips": floor(unseen_clips(workdir), PROMPTS),
        "summary": by_way,
        "runs": runs,
    }
    path = options.out / f"methods-{machine}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{path}: written.")


if __name__ == "__main__":
    main()
