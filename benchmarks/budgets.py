"""Quality of sampled clips against what sampling them takes, in floating-point operations.

Of the two-level toy of `ablations.py`, with more latents and layers, so that these are most of the
work, as in the paper's sizes: trained with all latents, and with a budget, at equal steps. Each is
sampled with fewer steps; the latter with fewer latents, and guided by itself with fewer. What is
done is kept: started again, it goes on with what is missing.
"""

import argparse
import json
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.ablations import (
    BATCH,
    ROOT,
    SAMPLED,
    STEPS,
    held_out_losses,
    method_with,
    sampled_quality,
    summary,
    trained,
)
from t2v.methods.hpdm.cost import sampling_flops
from t2v.methods.hpdm.method import HPDMMethod
from t2v.plan.footprint import training_tflop

ALL, BUDGET = 32, [32, 16, 8, 4]
MODEL = {"num_latents": ALL, "latent_layers": 3}
# Of training with all latents, and of training with a budget: settings of sampling by name.
SAMPLED_WITH: dict[str, dict[str, Any]] = {
    "32": {},
    "32, half the steps": {"steps": [8, 4]},
    "32, a quarter of the steps": {"steps": [4, 2]},
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
MEASURES = ("loss 0", "loss 1", "mismatch", "mmd 0", "mmd 1")


def measured(training: str, seed: int) -> list[dict[str, Any]]:
    """One training, and a row for each way to sample from it."""
    changes, ways = TRAINED[training]
    base = {"model": MODEL} | changes
    method = method_with(base)
    network = trained(method, {}, seed)
    rows = []
    for name, settings in ways.items():
        sampler = method_with(base | {"sampling": settings})
        row = {"row": f"{training}: {name}", "seed": seed, "gflop": gflop(sampler)}
        counts = settings.get("latents", ALL)
        if isinstance(counts, int) and "steps" not in settings and "guide" not in settings:
            row |= held_out_losses(method, limited(network, counts), seed)
        rows.append(row | sampled_quality(sampler, network, seed))
    return rows


def limited(network: torch.nn.Module, count: int) -> Any:
    """The network with so many latents, whoever calls."""
    return lambda *inputs, num_latents=None, **more: network(*inputs, num_latents=count, **more)


def gflop(method: HPDMMethod) -> float:
    """Operations of one clip."""
    with torch.device("meta"):
        network = method.network()
    config = method.config
    parts = sampling_flops(network, config.sampling, config.diffusion, method.conditioning)
    return sum(parts) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "budgets.json"
    size = {"steps": STEPS, "batch": BATCH, "sampled": SAMPLED, "model": MODEL, "budget": BUDGET}
    size["training_gflop"] = {
        name: training_tflop(method_with({"model": MODEL} | changes)) * 1e3
        for name, (changes, _) in TRAINED.items()
    }
    done = json.loads(path.read_text())["runs"] if path.is_file() else []
    for seed in range(options.seeds):
        for training in TRAINED:
            if any(run["seed"] == seed and run["training"] == training for run in done):
                continue
            started = time.process_time()
            rows = measured(training, seed)
            spent = {"cpu_seconds": round(time.process_time() - started, 1)}
            told = {"training": training, "date": str(date.today())} | spent
            done += [told | row for row in rows]
            path.write_text(json.dumps(size | {"runs": done}, indent=1) + "\n")
    table = Table("training: latents", "GFLOP per clip", *MEASURES)
    for name in dict.fromkeys(run["row"] for run in done):
        operations = next(run["gflop"] for run in done if run["row"] == name)
        known = [run for run in done if run["row"] == name]
        table.add_row(
            name,
            f"{operations:.3f}",
            *(summary(known, name, m) if m in known[0] else "" for m in MEASURES),
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
