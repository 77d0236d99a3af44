"""Steps per second of `t2v train` against a bare loop with the same model, engine and data.

Both run in one process and take turns, step by step: whenever the training loop asks for data, a
bare step is taken first, so that whatever disturbs the machine disturbs both. The bare loop is what
one writes by hand: losses, backward, gradient norm, update, average of the weights. Neither reads
data: batches of noise lie in memory. In every other step of the system a thread looks for
stragglers, as in a run of many ranks; what it costs is told by these steps and their neighbours. On
a CPU that others use too, seconds of computing (of all threads of the process) tell more than
seconds on the clock; both are shown.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.train_step import hardware, noise_batch
from data_pipeline.feeding.loader import Batch
from data_pipeline.feeding.mixture import Mixture
from t2v import loop
from t2v.engine.world import World
from t2v.recipe.recipe import RunConfig, accumulation_steps, load_config, method_of
from t2v.train.ema import Ema, half_life
from t2v.train.schedule import learning_rates
from t2v.watching.stragglers import Waits

ROOT = Path(__file__).parent.parent
TARGET, WATCH_TARGET = 0.97, 0.995
CHANGES = {
    "method.pyramid.clip_size": "[16, 96, 96]",
    "method.pyramid.patch_size": "[4, 24, 24]",
    "method.model.token_size": "[1, 4, 4]",
    "method.model.token_dim": "256",
    "method.model.num_latents": "64",
    "method.model.latent_dim": "256",
    "method.model.token_head_dim": "32",
    "method.model.latent_head_dim": "64",
    "method.model.conditioning_dim": "256",
    "method.model.levels_per_block": "[1, 1, 2, 3]",
    "metrics.wandb_project": "null",
    "engine.precision": "fp32",
    "engine.compile": "false",
    "global_batch_size": "2",
    "micro_batch_size": "2",
    "optimizer.name": "adamw",
}


@dataclass(frozen=True)
class Seconds:
    """A moment, or the time between two: on the clock, and of computing."""

    clock: float
    computing: float

    @classmethod
    def now(cls) -> "Seconds":
        return cls(time.perf_counter(), time.process_time())

    def until_now(self) -> "Seconds":
        now = Seconds.now()
        return Seconds(now.clock - self.clock, now.computing - self.computing)


class BareLoop:
    """Training without a system around it."""

    def __init__(self, config: RunConfig, world: World) -> None:
        self.config, self.world, self.method = config, world, method_of(config)
        self.engine = loop.open_engine(config, self.method, world)
        self.ema = Ema(self.engine.parameters(), half_life(config.ema_half_life_steps))

    def step(self, batches: list[Batch], number: int) -> None:
        """Update, as the training loop does it."""
        for place, batch in enumerate(batches, start=1):
            losses = self.method.losses(
                self.engine.model, batch, seed=self.config.seed, device=self.world.device
            )
            self.engine.backward(losses.sum() / len(batches), final=place == len(batches))
        norm = float(self.engine.gradient_norm())
        rates = learning_rates(
            self.config.optimizer,
            self.config.warm_start,
            step=number,
            total_steps=self.config.total_steps,
            updates=self.engine.updates,
        )
        self.engine.update(rates, norm)
        self.ema.update(self.engine.updates)


class TurnTaking:
    """A loader of noise that takes a bare step before each of the system's, and times both."""

    fingerprint = "noise"
    text_encoder = autoencoder = None
    mixture = Mixture(parts=())

    def __init__(self, config: RunConfig, world: World) -> None:
        self.config, self.world = config, world
        self.bare: list[Seconds] = []
        self.system: list[Seconds] = []
        self.watching = 0.0  # seconds of computing, of the thread that looks for stragglers

    def steps(self, start_step: int, total_steps: int, *, samples: int) -> Iterator[list[Batch]]:
        bare = BareLoop(self.config, self.world)
        count = accumulation_steps(self.config, self.world.world_size)
        batches = [noise_batch(self.config, self.config.micro_batch_size) for _ in range(count)]
        for number in range(start_step, total_steps):
            started = Seconds.now()
            bare.step(batches, number)
            self.bare.append(started.until_now())
            waits = Waits(self.world) if number % 2 else None
            started = Seconds.now()
            yield batches
            self.system.append(started.until_now())
            if waits is not None:
                waits.close()
                self.watching += waits.cost_seconds

    def close(self) -> None:
        """There is nothing to end."""


def measure(engine: str, steps: int, folder: Path) -> dict[str, Any]:
    """Both loops under an engine, without their first steps and the last, with its checkpoint."""
    changes = CHANGES | {
        "engine.kind": engine,
        "total_steps": str(steps),
        "optimizer.warmup_steps": "0",
        "run_dir": str(folder / engine),
        "checkpoint.every_steps": str(steps),
    }
    config = load_config(
        ROOT / "configs" / "ucf101_s.yaml", [f"{key}={value}" for key, value in changes.items()]
    )
    made = []

    def open_noise(config: RunConfig, world: World) -> Any:
        made.append(TurnTaking(config, world))
        return made[0]

    loop.open_loader = open_noise
    loop.train(config)
    [turns] = made
    # Work on the same batch, moments apart: the pair's ratio is free of slow drift.
    bare, system = turns.bare[2:-1], turns.system[2:]
    alone, watched = turns.system[2::2], turns.system[3::2]
    computed = sum(s.computing for s in turns.system[1::2])
    return {
        "engine": engine,
        "steps": min(len(bare), len(system)),
        "clock": compared([s.clock for s in bare], [s.clock for s in system]),
        "computing": compared([s.computing for s in bare], [s.computing for s in system]),
        "straggler_watch": {
            "clock": compared([s.clock for s in alone], [s.clock for s in watched]),
            "computing": compared([s.computing for s in alone], [s.computing for s in watched]),
            "of_computing": turns.watching / computed,
        },
    }


def compared(bare: list[float], system: list[float]) -> dict[str, Any]:
    """Steps per second of both, and the system's share; quartiles are of pairs of neighbours."""
    low, _, high = statistics.quantiles([b / s for b, s in zip(bare, system, strict=False)], n=4)
    bare_seconds, system_seconds = statistics.median(bare), statistics.median(system)
    return {
        "bare_steps_per_second": 1 / bare_seconds,
        "system_steps_per_second": 1 / system_seconds,
        "share": bare_seconds / system_seconds,
        "quartiles_of_pairs": [low, high],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--engines", nargs="+", default=["single", "fsdp"])
    parser.add_argument("--out", default=ROOT / "benchmarks" / "results", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(engine, options.steps, Path(folder)) for engine in options.engines]
    table = Table("engine", "seconds", "without/s", "with/s", "share", "quartiles of pairs")
    told = [(row["engine"], row) for row in rows]
    told += [(f"{row['engine']}, watch", row["straggler_watch"]) for row in rows]
    for name, row in told:
        for what in ("clock", "computing"):
            found = row[what]
            low, high = found["quartiles_of_pairs"]
            table.add_row(
                name,
                what,
                f"{found['bare_steps_per_second']:.3f}",
                f"{found['system_steps_per_second']:.3f}",
                f"{found['share']:.3f}",
                f"{low:.3f} to {high:.3f}",
            )
    Console().print(table, f"target: at least {TARGET}, of the watch {WATCH_TARGET}")
    for row in rows:
        share = row["straggler_watch"]["of_computing"]
        print(f"{row['engine']}: the watch's thread computes {share:.3%} of a step")
    options.out.mkdir(parents=True, exist_ok=True)
    record = {
        "benchmark": "engine_overhead",
        "hardware": hardware(torch.device("cpu")),
        "torch": torch.__version__,
        "target": TARGET,
        "watch_target": WATCH_TARGET,
        "load_average_of_last_minute": os.getloadavg()[0],
        "engines": rows,
    }
    file = options.out / "engine_overhead_cpu.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{file}: written.")


if __name__ == "__main__":
    main()
