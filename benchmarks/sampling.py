"""Coarse-to-fine sampling with its features kept, against computing them anew: seconds and memory.

`per tile` is the plain way: every call on a tile first runs the network on the windows around it at
all coarser levels, as a training pass does. `per step` reads the finished levels again at each
step. `kept` is what `t2v sample` does; `on disk` keeps everything in files. Networks are small and
the geometries of UCF-101 and text-to-video are scaled to a CPU; schedules of blocks, levels, tokens
and steps are the paper's shape. Each job is a process of its own with one thread. All ways run side
by side, so that whatever disturbs the machine disturbs all, and CPU seconds are what is compared.

`--full` samples one 64x288x512 clip of a small four-level network, with all memory and, beside it,
within a budget for the whole process, and compares the two.
"""

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.sampling_anew import PER_STEP, PER_TILE, condition_of, sample_anew
from t2v.methods.hpdm import context
from t2v.methods.hpdm.memory import plan_memory
from t2v.methods.hpdm.network import HPDM
from t2v.methods.hpdm.sampling import generate
from t2v.methods.hpdm.settings import network_calls
from t2v.methods.hpdm.store import Store
from t2v.methods.hpdm.tiled_denoiser import TiledDenoiser
from t2v.recipe.recipe import RunConfig, load_config, method_of, parse_config
from t2v.sampling.generate import Means, room_left, to_bytes

ROOT = Path(__file__).parent.parent
KEPT, ON_DISK = "kept", "on disk"
WAYS = (PER_TILE, PER_STEP, KEPT, ON_DISK)
SMALL = {"token_dim": 64, "num_latents": 32, "latent_dim": 64, "latent_layers": 2,
         "token_head_dim": 32, "latent_head_dim": 32, "conditioning_dim": 64}  # fmt: skip
GEOMETRIES: dict[str, dict[str, Any]] = {
    "ucf": {
        "recipe": "ucf101_s",
        "pyramid": {"levels": 3, "patch_size": [4, 16, 16], "clip_size": [16, 64, 64]},
        "model": SMALL,
        "sampling": {"steps": [16, 8, 4], "overlap": "hw", "guidance_scale": 1.0},
    },
    "t2v": {
        "recipe": "t2v_64x288x512",
        "pyramid": {"levels": 4, "patch_size": [2, 12, 16], "clip_size": [16, 96, 128]},
        "model": SMALL,
        "sampling": {"steps": [8, 4, 2, 1], "overlap": "hw", "guidance_scale": 6.0},
    },
    "full": {
        "recipe": "t2v_64x288x512",
        "pyramid": {},
        "model": SMALL,
        "sampling": {"steps": [2, 1, 1, 1], "overlap": ["", "", "", "hw"], "tile_batch": 256,
                     "guidance_scale": [2.0, 2.0, 2.0, 1.0]},
    },
}  # fmt: skip


def small_recipe(name: str) -> RunConfig:
    """A shipped recipe with a small network, without text, in a scaled geometry."""
    changes = GEOMETRIES[name]
    content = load_config(ROOT / "configs" / f"{changes['recipe']}.yaml").model_dump(mode="json")
    for section in ("pyramid", "model", "sampling"):
        content["method"][section] |= changes[section]
    content |= {"conditioning": {"kind": "class", "num_classes": 4}, "warm_start": None}
    return parse_config(content, name)


def small_network(config: RunConfig) -> HPDM:
    """A network with noise on every parameter, whose answers are tame."""
    model = method_of(config).network()
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        model.detokenizer.weight.mul_(0.1)
    return model.eval()


class Clocks:
    """Seconds inside functions, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, owner: Any, name: str, label: str) -> None:
        """Time every call of a method from now on."""
        call = getattr(owner, name)

        def timed(*args: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*args, **named)
            finally:
                spent = time.perf_counter() - begin
                self.seconds[label] = self.seconds.get(label, 0.0) + spent

        setattr(owner, name, timed)


@torch.no_grad()
def job(name: str, way: str, memory_gib: float | None, out: str | None) -> dict[str, Any]:
    """Sample one clip in one way; what it took."""
    torch.set_num_threads(1)
    config = small_recipe(name)
    model = small_network(config)
    clocks = Clocks()
    clocks.time(model, "forward", "network")
    clocks.time(context, "sample_volume", "of that, sampling of coarse features")
    clocks.time(TiledDenoiser, "_given", "fetching of features and latents, ahead")
    before = psutil.Process().memory_info().rss
    begin, begin_cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        store = Store(torch.device("cpu"), Path(scratch))
        with closing(store):
            if way in (PER_TILE, PER_STEP):
                clip = sample_anew(model, config, way, store)[-1]
            else:
                rooms = plan_memory(
                    model, config.method.sampling, clips=1,
                    device_bytes=room_left(torch.device("cpu"), Means(memory_gib)).device_bytes,
                )  # fmt: skip
                if way == ON_DISK:
                    rooms = [replace(room, volumes="disk", latents="disk") for room in rooms]
                clip = generate(
                    model, condition=condition_of(0), null=condition_of(4), seeds=[1],
                    sampling=config.method.sampling, diffusion=config.method.diffusion, rooms=rooms,
                    store=store,
                ).pop()  # fmt: skip
    result = {
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - begin_cpu,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "before_gib": before / 2**30,
        "network_calls": sum(network_calls(config.method.sampling, config.method.pyramid)),
        "parts": clocks.seconds,
    }
    if way in (KEPT, ON_DISK):
        result["rooms"] = [
            {"tile_batch": r.tile_batch, "slabs": len(r.slabs), "features": r.volumes,
             "latents": r.latents}
            for r in rooms
        ]  # fmt: skip
    if out:
        np.save(out, to_bytes(clip[0]))
    return result


def run_job(name: str, way: str, out: Path, memory_gib: float | None = None) -> dict[str, Any]:
    """A job in a fresh process, whose memory is its own."""
    asked = json.dumps({"name": name, "way": way, "memory_gib": memory_gib, "out": str(out)})
    done = subprocess.run(
        [sys.executable, __file__, "--job", asked],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def median_of(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The run in the middle, by CPU time."""
    middle = statistics.median_low([result["cpu_seconds"] for result in results])
    return next(result for result in results if result["cpu_seconds"] == middle)


def compare_ways(name: str, rounds: int, scratch: Path) -> dict[str, Any]:
    """Every way of sampling one geometry, in turns."""
    taken: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}

    def file_of(way: str) -> Path:
        return scratch / f"{name}-{way.replace(' ', '-')}.npy"

    for _ in track(range(rounds), name, console=Console(stderr=True)):
        with ThreadPoolExecutor() as pool:
            started = {way: pool.submit(run_job, name, way, file_of(way)) for way in WAYS}
        for way, running in started.items():
            taken[way].append(running.result())
    clips = {way: np.load(file_of(way)) for way in WAYS}
    return {
        way: median_of(taken[way])
        | {
            "rounds": rounds,
            "largest_pixel_difference": int(abs(clips[way].astype(int) - clips[KEPT]).max()),
        }
        for way in WAYS
    }


def compare_budgets(budget_gib: float, scratch: Path) -> dict[str, Any]:
    """The full-size clip with all memory and within a budget."""
    with ThreadPoolExecutor() as pool:
        first = pool.submit(run_job, "full", KEPT, scratch / "free.npy")
        second = pool.submit(run_job, "full", KEPT, scratch / "bound.npy", budget_gib)
    free, bound = first.result(), second.result()
    clips = [np.load(scratch / f"{kind}.npy").astype(np.int16) for kind in ("free", "bound")]
    difference = abs(clips[0] - clips[1])
    return {
        "shape": list(clips[0].shape),
        "budget_gib": budget_gib,
        "free": free,
        "bound": bound,
        "largest_pixel_difference": int(difference.max()),
        "share_of_pixels_that_differ": float((difference > 0).mean()),
    }


def print_ways(name: str, results: dict[str, Any]) -> None:
    config = small_recipe(name)
    size = "x".join(map(str, config.method.pyramid.clip_size))
    title = f"{name} scaled to {size}, {results[KEPT]['network_calls']} calls per clip"
    if len(config.method.sampling.branches(0)) == 2:
        title += ", each a guidance pair"
    table = Table(title=title)
    for column in ("features", "CPU s", "wall s", "calls/CPU s", "speed", "peak GiB", "pixels"):
        table.add_column(column, justify="left" if column == "features" else "right")
    for way, result in results.items():
        table.add_row(
            way,
            f"{result['cpu_seconds']:.1f}",
            f"{result['seconds']:.1f}",
            f"{result['network_calls'] / result['cpu_seconds']:.0f}",
            f"{results[PER_TILE]['cpu_seconds'] / result['cpu_seconds']:.2f}x",
            f"{result['peak_gib']:.2f}",
            f"{result['largest_pixel_difference']}",
        )
    Console().print(table)
    parts = ", ".join(f"{k}: {v:.1f} s" for k, v in results[KEPT]["parts"].items())
    print(f"where the wall time of '{KEPT}' goes: {parts}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="only the 64x288x512 clip")
    parser.add_argument("--budget-gib", type=float, default=2.0, help="of the bounded full clip")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(job(**json.loads(options.job))))
        return
    machine = re.sub(r"[^a-z0-9]+", "-", f"{platform.machine()}-{os.cpu_count()}cpu".lower())
    result: dict[str, Any] = {"machine": machine}
    kind = "sampling-full" if options.full else "sampling"
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if options.full:
            result |= compare_budgets(options.budget_gib, scratch)
            for name in ("free", "bound"):
                taken = result[name]
                print(f"{name}: {taken['seconds']:.0f} s, {taken['cpu_seconds']:.0f} CPU s, peak "
                      f"{taken['peak_gib']:.2f} GiB; {taken['rooms']}")  # fmt: skip
            print(f"pixels of {result['shape']} differ by at most "
                  f"{result['largest_pixel_difference']} of 255")  # fmt: skip
        else:
            for name in ("ucf", "t2v"):
                result[name] = compare_ways(name, options.rounds, scratch)
                print_ways(name, result[name])
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{kind}-{machine}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{path}: written.")


if __name__ == "__main__":
    main()
