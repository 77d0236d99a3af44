"""Quality of sampled clips against what sampling them takes, in floating-point operations.

Of the two-level toy of `ablations.py`, with more latents and layers, so that these are most of the
work, as in the paper's sizes: trained with all latents, and with a budget, at equal steps. Each is
sampled with fewer steps, and guided by what a quarter of the training makes; the latter with fewer
latents, and guided by itself with fewer. What is done is kept: started again, it goes on with what
is missing.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.ablations import (
    BATCH,
    MEASURES,
    ROOT,
    SAMPLED,
    STEPS,
    gflop,
    held_out_losses,
    method_with,
    sampled_quality,
    trained,
)
from benchmarks.summary import Kept, print_rows
from t2v.plan.footprint import training_tflop

ALL, BUDGET = 32, [32, 16, 8, 4]
MODEL = {"num_latents": ALL, "latent_layers": 3}
# Of training with all latents, and of training with a budget: settings of sampling by name.
SAMPLED_WITH: dict[str, dict[str, Any]] = {
    "32": {},
    "32, half the steps": {"steps": [8, 4]},
    "32, a quarter of the steps": {"steps": [4, 2]},
    "32, guided by a younger one": {
        "guidance_scale": 1.5,
        "guide": "prompt",
        "guide_checkpoint": "of a quarter of the steps",
    },
}
FEWER: dict[str, dict[str, Any]] = {
    "16": {"latents": 16},
    "8": {"latents": 8},
    "4": {"latents": 4},
    "32 and 8": {"latents": [32, 8]},
    "8 and 32": {"latents": [8, 32]},
    "32, guided by 8": {"guidance_scale": 1.5, "guide": "prompt", "guide_latents": 8},
    "32, guided by 4": {"guidance_scale": 1.5, "guide": "prompt", "guide_latents": 4},
}
TRAINED: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "all": ({}, SAMPLED_WITH),
    "budget": ({"latent_budget": BUDGET}, SAMPLED_WITH | FEWER),
}


def measured(training: str, seed: int) -> list[dict[str, Any]]:
    """One training, and a row for each way to sample from it."""
    changes, ways = TRAINED[training]
    base = {"model": MODEL} | changes
    method = method_with(base)
    network, younger = (trained(method, {}, seed, steps) for steps in (STEPS, STEPS // 4))
    rows = []
    for name, settings in ways.items():
        sampler = method_with(base | {"sampling": settings})
        row = {"row": f"{training}: {name}", "seed": seed, "gflop": gflop(sampler)}
        counts = settings.get("latents", ALL)
        if isinstance(counts, int) and "steps" not in settings and "guide" not in settings:
            row |= held_out_losses(method, limited(network, counts), seed)
        guide = younger if "guide_checkpoint" in settings else None
        rows.append(row | sampled_quality(sampler, network, seed, guide))
    return rows


def limited(network: torch.nn.Module, count: int) -> Any:
    """The network with so many latents, whoever calls."""
    return lambda *inputs, num_latents=None, **more: network(*inputs, num_latents=count, **more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = {"steps": STEPS, "batch": BATCH, "sampled": SAMPLED, "model": MODEL, "budget": BUDGET}
    size["training_gflop"] = {
        name: training_tflop(method_with({"model": MODEL} | changes)) * 1e3
        for name, (changes, _) in TRAINED.items()
    }
    kept = Kept(options.out / "budgets.json", size)
    for seed in range(options.seeds):
        for training in TRAINED:
            if kept.has(training=training, seed=seed):
                continue
            started = time.process_time()
            rows = measured(training, seed)
            spent = {"cpu_seconds": round(time.process_time() - started, 1)}
            kept.add(*({"training": training} | spent | row for row in rows))
            print(training, seed, spent, flush=True)
    names = dict.fromkeys(run["row"] for run in kept.runs)
    print_rows(kept.runs, names, MEASURES)


if __name__ == "__main__":
    main()
