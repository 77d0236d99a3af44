"""What a GPU shows in a few minutes: `python -m benchmarks.gpu [--minutes 8]`.

Parts run in turn, most valuable first, each in a process and within a share of the time; a part
whose result is there is not run again, so that a second call goes on where a first one ended. On a
CPU the same parts run at scaled geometry, and prove only that they run. A result is
`benchmarks/results/gpu-PART-DEVICE.json`, with how long it took and what it printed last.

(a) tests marked `gpu`; (b) a training step beside its alternatives (train_step.py); (c) steps of
the text-to-video recipe: memory by plan and measured, time, and the share of a matrix product's
speed; (d) sampling (sampling.py); (e) the loader (loader.py).
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.train_step import noise_batch
from t2v.engine.compute import determinism
from t2v.engine.device import to_host
from t2v.engine.engine import Engine
from t2v.engine.world import join_world
from t2v.loop import open_engine
from t2v.plan.footprint import measure, training_tflop
from t2v.plan.memory import memory
from t2v.recipe.recipe import RunConfig, load_config, method_of
from t2v.watching.rates import device_name

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SHARES = {"a": 0.2, "b": 0.3, "c": 0.25, "d": 0.15, "e": 0.1}  # of the time
TAIL = 4000  # characters of a part's output that are kept
# (c) on one GPU: class conditions stand in for texts, LAMB's moments for the paper's.
ONE_DEVICE = ["engine.kind=single", "engine.compile=false", "micro_batch_size=1",
              "global_batch_size=2", "conditioning={kind: class, num_classes: 2}",
              "samples=null", "held_out=null", "data.held_out_share=0.0",
              "data.sources=[{path: none}]", "warm_start=null"]  # fmt: skip
MINIATURE = ["method.pyramid.clip_size=[32,96,96]", "method.pyramid.patch_size=[4,12,12]",
             "method.model.token_size=[1,3,3]", "method.model.token_dim=64",
             "method.model.num_latents=16", "method.model.latent_dim=64",
             "method.model.token_head_dim=32", "method.model.latent_head_dim=32",
             "method.model.conditioning_dim=64"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--parts", default="abcde")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--steps", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps:
        print(json.dumps(steps_of_recipe()))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device()).lower()).strip("-")
    for part in options.parts:
        path = options.out / f"gpu-{part}-{slug}.json"
        if path.exists():
            print(f"{path}: is there already.", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            result = run(part, 60 * options.minutes * SHARES[part], Path(folder))
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{path}: written ({result['outcome']}).", flush=True)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run(part: str, seconds: float, folder: Path) -> dict[str, Any]:
    """What a part's process made of its time; results that it wrote are taken over."""
    on_cpu = device().type == "cpu"
    module = {
        "a": ["pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/test_gpu.py"],
        "b": ["benchmarks.train_step", "--out", str(folder), *(["--repeats=1"] * on_cpu)],
        "c": ["benchmarks.gpu", "--steps"],
        "d": ["benchmarks.sampling", "--out", str(folder), *(["--rounds=1"] * on_cpu)],
        "e": ["benchmarks.loader", "--out", str(folder), *(["--clips=8", "--rounds=1"] * on_cpu)],
    }
    started, outcome = time.perf_counter(), "done"
    with (folder / "output").open("w+") as output:
        try:
            done = subprocess.run(
                [sys.executable, "-m", *module[part]], cwd=ROOT, stdout=output,
                stderr=subprocess.STDOUT, timeout=seconds, check=False,
            )  # fmt: skip
            outcome = "done" if done.returncode == 0 else f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            outcome = f"not done in {seconds:.0f} s"
        output.seek(0)
        told = output.read()
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if part == "c" and outcome == "done":
        found = [json.loads(told.splitlines()[-1])]
    return {
        "part": part,
        "device": device_name(device()),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "outcome": outcome,
        "seconds": round(time.perf_counter() - started, 1),
        "results": found,
        "output": told[-TAIL:],
    }


def steps_of_recipe(count: int = 5) -> dict[str, Any]:
    """Steps of the 3.9 B recipe, or of it in miniature on a CPU, whose activations are computed
    again; seconds of a step by its parts."""
    small = MINIATURE if device().type == "cpu" else []
    recipe = ROOT / "configs" / "t2v_64x288x512.yaml"
    config = load_config(recipe, [*ONE_DEVICE, *small])
    free = config.engine.model_copy(update={"deterministic": False})
    method = method_of(config)
    with join_world(config.engine) as world:
        engine = open_engine(config, method, world)
        with determinism(config.engine):
            gradients, update = median_step(config, engine, count)
        with determinism(free):
            free_gradients, _ = median_step(config, engine, count)
        ceiling = matmul_tflops(config)
        peak = torch.cuda.max_memory_allocated() / 2**30 if world.device.type == "cuda" else None
    speed = 2 * training_tflop(method) / (gradients + update)
    return {
        "parameters": sum(measure(config).parameters.values()),
        "gradient_seconds": gradients,
        "update_seconds": update,
        "gradient_seconds_if_not_deterministic": free_gradients,
        "model_tflops": speed,
        "matmul_tflops": ceiling,
        "share_of_matmul": speed / ceiling,
        "peak_gib": peak,
        "planned_gib": memory(config, measure(config), 1).total,
    }


def median_step(config: RunConfig, engine: Engine, count: int) -> tuple[float, float]:
    """Median seconds of a step's gradients and of its update; the first step does not count."""
    method, spent = method_of(config), []
    for number in range(count + 1):
        marks = [time.perf_counter()]
        for final in (False, True):
            batch = noise_batch(config, 1)  # which its losses take to the device
            losses = method.losses(engine.model, batch, seed=number, device=engine.world.device)
            engine.backward(losses.sum(), final=final)
        norm = float(to_host(engine.gradient_norm()))
        marks.append(time.perf_counter())
        engine.update({"base": 1e-6, "new": 1e-6}, norm)
        finish()
        marks.append(time.perf_counter())
        spent.append([after - before for before, after in pairwise(marks)])
    gradients, update = (statistics.median(part) for part in zip(*spent[1:], strict=True))
    return gradients, update


def matmul_tflops(config: RunConfig) -> float:
    """What a large product reaches on this device in the recipe's precision."""
    side = 8192 if device().type == "cuda" else 512
    kind = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=device(), dtype=kind) for _ in range(2))
    seconds = []
    for _ in range(6):
        finish()
        started = time.perf_counter()
        a @ b
        finish()
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / statistics.median(seconds[1:]) / 1e12


def finish() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
