"""Runs that everything happens to, beside one that nothing happens to: are the weights the same?

    python -m benchmarks.soak --workdir soak [--faults 300] [--runs 3]

Ranks are started as a scheduler would: all of them, again whenever the job ended and its exit code
says that it is worth another try, and none is left when one of them fails. Faults are drawn from a
seed: kill -9 of one or all ranks, in a step or while a checkpoint is written, SIGTERM, a full disk,
flipped bits in the newest checkpoint, a hang; an old step that cannot be removed, for it is a link
or holds what is another's; wandb without a network. A step with NaN gradients changes what is
learned, so all runs have it, on the same rank.

The undisturbed ranks are new processes; the others are forks of one that has imported everything,
or most of the time would go into imports. Runs go side by side, for much of a fault is waiting.
With `--workdir`, the same command goes on where it was stopped.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.job import Fork, Job
from benchmarks.soak_faults import BETWEEN, Fate, saved_step
from data_pipeline.orphans import end_with_parent
from data_pipeline.store import storage
from t2v.checkpoint.proving import verify_checkpoint

ROOT = Path(__file__).parent.parent
STOP = {65, 66, 70, 73, 78}  # another attempt would meet them again
HANG_SECONDS = 8.0
# What a rank imports only once it is at it.
PRELOADED = ("t2v.loop", "torch.distributed.fsdp", "torch.distributed.tensor", "torch._dynamo")
# An address that answers nobody (RFC 5737), and a key, without which wandb would not ask.
BLOCKED = {"WANDB_BASE_URL": "http://192.0.2.1", "WANDB_API_KEY": "0" * 40}

RECIPE: dict[str, Any] = {
    "name": "soak",
    "seed": 3,
    "global_batch_size": 2,
    "micro_batch_size": 1,
    "ema_half_life_steps": 100.0,
    "method": {
        "kind": "hpdm",
        "pyramid": {"levels": 2, "patch_size": [2, 6, 8], "clip_size": [4, 12, 16]},
        "model": {
            "token_size": [1, 3, 4],
            "token_dim": 16,
            "num_latents": 6,
            "latent_dim": 16,
            "latent_layers": 1,
            "token_head_dim": 8,
            "latent_head_dim": 8,
            "levels_per_block": [1, 2],
            "conditioning_dim": 16,
            "self_conditioning_rate": 0.9,
        },
        "diffusion": {"input_scale": 1.0, "input_scale_growth": 2.0},
        "sampling": {"steps": [4, 2]},
    },
    "conditioning": {"kind": "none"},
    "optimizer": {"name": "adamw", "learning_rate": 1.0e-3, "warmup_steps": 20},
    "engine": {"kind": "fsdp", "precision": "fp32", "collective_timeout_seconds": 300.0},
    "metrics": {},
    "watchdog": {
        "setup_seconds": 200.0,
        "data_seconds": HANG_SECONDS,
        "step_seconds": HANG_SECONDS,
        "checkpoint_seconds": 60.0,
    },
}


@dataclass
class Tally:
    """What happened in a run so far."""

    seconds: float = 0.0
    attempts: int = 0
    steps_run: int = 0
    is_done: bool = False
    struck: Counter = field(default_factory=Counter)
    codes: Counter = field(default_factory=Counter)
    detection_seconds: dict[str, list[float]] = field(default_factory=dict)
    restart_seconds: list[float] = field(default_factory=list)
    lost_steps: list[int] = field(default_factory=list)

    def keep(self, path: Path) -> None:
        """For whoever goes on with the run."""
        storage.write_atomic(path, json.dumps(vars(self)).encode())


def kept(path: Path) -> Tally:
    """What was kept of a run; a new one has nothing."""
    if not path.exists():
        return Tally()
    told = json.loads(path.read_bytes())
    return Tally(**told | {name: Counter(told[name]) for name in ("struck", "codes")})


def write_data(folder: str) -> None:
    """The clips of all runs; by a process of its own, for libraries that decode start threads."""
    from data_pipeline.making.build import build
    from data_pipeline.making.toy import write_toy

    media = Path(folder, "media")
    write_toy(media, videos=24, images=0, size=(4, 24, 32))
    build(media / "videos", Path(folder, "shards"), frames=4, height=12, width=16, fps=8.0)


def write_recipe(folder: Path, name: str, steps: int, save_every: int) -> Path:
    """A recipe of the run `name`."""
    recipe = RECIPE | {
        "run_dir": str(folder / name),
        "total_steps": steps,
        "checkpoint": {"every_steps": save_every},
        "data": {"sources": [{"path": str(folder / "shards")}], "num_workers": 0},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def last_step(run_dir: Path) -> int:
    """The newest step that metrics.jsonl tells of."""
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 4096, 0))
            lines = file.read().splitlines()
        return json.loads(lines[-1])["step"]
    except (OSError, ValueError, IndexError, KeyError):
        return 0


def undisturbed(recipe: Path, *, ranks: int, nan: str) -> float:
    """Seconds of the run that nothing happens to; of one that was stopped, those of its rest."""
    started = time.time()
    job = Job(recipe, ranks=ranks, faults=nan, log=recipe.with_suffix(".log"))
    while not job.is_over:
        time.sleep(0.1)
    if job.exit_code:
        raise SystemExit(f"the undisturbed run ended with {job.exit_code}; see {recipe.parent}")
    return time.time() - started


def soak(recipe: Path, tally: Tally, *, faults: int, ranks: int, nan: str, fate: Fate) -> None:
    """Start a job until it is done; something happens to it each time, `faults` times in all."""
    end_with_parent()  # and so do its ranks
    run_dir, log = recipe.with_suffix(""), recipe.with_suffix(".log")
    steps = int(yaml.safe_load(recipe.read_text())["total_steps"])
    before, began = tally.seconds, time.time()
    while not tally.is_done:
        resumes_at = saved_step(run_dir)
        is_enough = sum(tally.struck.values()) >= faults
        drawn = [
            f
            for f in fate.draw(resumes_at, tally.attempts, tally.struck)
            if f[2] < steps and not is_enough
        ]
        kind, _, at = drawn[-1] if drawn else ("nothing", "", 0)
        planned = ";".join([nan, *(fault[1] for fault in drawn)])
        tracked = ["metrics.wandb_project=soak"] if kind == "blocked tracker" else []
        job = Job(recipe, *tracked, ranks=ranks, faults=planned, log=log, start=Fork)
        struck_at = follow(job, run_dir, kind, at, tally, resumes_at)
        over, reached = time.time(), max(last_step(run_dir), resumes_at)
        times = job.fault_times()
        full = sum(fault[0] == "full disk" for fault in drawn[: len(times)])
        tally.struck["full disk"] += full
        tally.codes[str(job.exit_code)] += 1
        tally.attempts += 1
        if struck_at is None and job.exit_code:
            struck_at = max(times, default=None)
        if struck_at is not None:
            tally.struck[kind] += kind != "full disk"
            tally.detection_seconds.setdefault(kind, []).append(over - struck_at)
        if job.exit_code in STOP:
            raise SystemExit(f"{run_dir}: ended with {job.exit_code}; see {log}")
        if kind in BETWEEN and struck_at is not None:
            BETWEEN[kind](run_dir, fate.random)
        tally.steps_run += reached - resumes_at
        tally.is_done = job.exit_code == 0
        if not tally.is_done:
            tally.lost_steps.append(reached - saved_step(run_dir))
        tally.seconds = before + over - began
        tally.keep(tally_of(run_dir))
        print(
            f"{tally.seconds:6.0f} s  {run_dir.name}, attempt {tally.attempts}: step {resumes_at} "
            f"-> {reached}, {'full disk, ' * full}{kind if struck_at else 'nothing'}, "
            f"exit {job.exit_code}, {sum(tally.struck.values())} of {faults} faults",
            flush=True,
        )


def tally_of(run_dir: Path) -> Path:
    """Where a run's tally is kept."""
    return run_dir.with_name(f"{run_dir.name}.tally.json")


def follow(
    job: Job, run_dir: Path, kind: str, at: int, tally: Tally, resumes_at: int
) -> float | None:
    """Wait for a job to end; do to it what must come from outside, and say when."""
    struck_at = None
    known = run_dir / "metrics.jsonl"
    size = known.stat().st_size if known.exists() else 0
    running = False
    while not job.is_over:
        time.sleep(0.05)
        step = last_step(run_dir)
        if not running and known.exists() and known.stat().st_size != size and step > resumes_at:
            running = True
            tally.restart_seconds.append(time.time() - job.started)
        if struck_at is None and running and step >= at:
            if kind in BETWEEN and committed(run_dir) < 2:
                continue  # what is done to one step must leave another
            if kind == "kill all ranks" or kind in BETWEEN:
                struck_at = time.time()
                job.kill()
            elif kind in ("SIGTERM", "blocked tracker"):
                struck_at = time.time()
                job.kill(signal.SIGTERM)
    return struck_at


def committed(run_dir: Path) -> int:
    """How many steps are there."""
    return len(list(run_dir.glob("checkpoints/step-*/manifest.json")))


def digests(run_dir: Path, step: int) -> dict[str, str]:
    """sha256 of every file of tensors of a step, whose bytes are as they were written."""
    manifest = verify_checkpoint(run_dir / "checkpoints" / f"step-{step:08d}")
    return {name: record.sha256 for name, record in manifest.files.items()}


def timeline(run_dir: Path, names: tuple[str, ...]) -> list[tuple]:
    """What metrics.jsonl tells of each step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[name] for name in ("step", *names)) for line in lines if "loss" in line]


def summary(values: list[float]) -> dict[str, float]:
    """Median and worst."""
    return {"median": statistics.median(values), "worst": max(values)} if values else {}


def side_by_side(recipes: list[Path], fates: list[Fate], **settings: Any) -> list[Tally]:
    """The tallies of disturbed runs, each in a process of its own."""
    for name in PRELOADED:
        importlib.import_module(name)
    context = multiprocessing.get_context("fork")
    runs = [
        context.Process(target=soak, args=(recipe, kept(tally_of(recipe.with_suffix("")))),
                        kwargs={**settings, "fate": fate})
        for recipe, fate in zip(recipes, fates, strict=True)
    ]  # fmt: skip
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    if any(run.exitcode for run in runs):
        raise SystemExit("a run did not come to its end; see above")
    return [kept(tally_of(recipe.with_suffix(""))) for recipe in recipes]


def together(tallies: list[Tally]) -> dict[str, Any]:
    """What happened in all runs."""
    kinds = sorted({kind for tally in tallies for kind in tally.detection_seconds})
    lost = [float(steps) for tally in tallies for steps in tally.lost_steps]
    return {
        "faults": dict(sum((tally.struck for tally in tallies), Counter())),
        "attempts": sum(tally.attempts for tally in tallies),
        "exit_codes": dict(sum((tally.codes for tally in tallies), Counter())),
        "disturbed_seconds": [round(tally.seconds, 1) for tally in tallies],
        "steps_run": sum(tally.steps_run for tally in tallies),
        "steps_lost": summary(lost) | {"total": sum(lost)},
        "detection_seconds": {
            kind: summary([s for tally in tallies for s in tally.detection_seconds.get(kind, [])])
            for kind in kinds
        },
        "restart_seconds": summary([s for tally in tallies for s in tally.restart_seconds]),
    }


def print_result(result: dict[str, Any]) -> None:
    """A table of all kinds of faults."""
    table = Table(title=f"{result['runs']} runs of {result['steps']} steps")
    for column in ("fault", "times", "all ranks down after, median s", "worst s"):
        table.add_column(column, justify="left" if column == "fault" else "right")
    for kind, times in result["faults"].items():
        seconds = result["detection_seconds"].get(kind, {})
        cells = [f"{seconds[name]:.1f}" if seconds else "-" for name in ("median", "worst")]
        table.add_row(kind, str(times), *cells)
    console = Console()
    console.print(table)
    for name in ("bit_identical", "same_losses", "attempts", "steps_lost", "restart_seconds"):
        console.print(f"{name}: {result[name]}", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=300, help="of all runs together")
    parser.add_argument("--runs", type=int, default=3, help="side by side")
    parser.add_argument("--gap", type=int, default=6, help="steps between faults, about")
    parser.add_argument("--save-every", type=int, default=4, help="steps between checkpoints")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=Path, help="kept; none: a temporary folder")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    folder = (options.workdir or Path(tempfile.mkdtemp(prefix="soak-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(BLOCKED | {"OMP_NUM_THREADS": "1"})
    if not (folder / "shards" / "dataset.json").exists():
        data = "import sys; from benchmarks.soak import write_data; write_data(sys.argv[1])"
        subprocess.run([sys.executable, "-c", data, str(folder)], check=True, cwd=ROOT)
    each, every = -(-options.faults // options.runs), options.save_every
    steps = each * (every + options.gap)
    chance = random.Random(options.seed)
    poisoned = chance.sample(range(10, steps - 10), max(steps // 250, 1))
    nan = ";".join(f"forward:{options.ranks - 1}:{step}:nan" for step in sorted(poisoned))
    alone = write_recipe(folder, "undisturbed", steps, every)
    quiet_seconds = undisturbed(alone, ranks=options.ranks, nan=nan)
    print(f"undisturbed: {quiet_seconds:.0f} s for {steps} steps", flush=True)
    broken = [write_recipe(folder, f"disturbed-{n}", steps, every) for n in range(options.runs)]
    fates = [Fate(options.seed + n, gap=options.gap, save_every=every, ranks=options.ranks)
             for n in range(options.runs)]  # fmt: skip
    tallies = side_by_side(broken, fates, faults=each, ranks=options.ranks, nan=nan)
    truth, wanted = ("loss", "grad_norm", "batch_digest"), folder / "undisturbed"
    run_dirs = [recipe.with_suffix("") for recipe in broken]
    result = {
        "steps": steps,
        "runs": options.runs,
        "ranks": options.ranks,
        "seed": options.seed,
        "bit_identical": all(digests(d, steps) == digests(wanted, steps) for d in run_dirs),
        "same_losses": all(timeline(d, truth) == timeline(wanted, truth) for d in run_dirs),
        "undisturbed_seconds": round(quiet_seconds, 1),
        **together(tallies),
        "NaN steps, in all runs": len(poisoned),
        "left_behind": sum(len(list(d.glob("checkpoints/.staging-*"))) for d in run_dirs),
    }
    print_result(result)
    machine = re.sub(r"[^a-z0-9]+", "-", f"{platform.machine()}-{os.cpu_count()}cpu".lower())
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"soak-{options.faults}-{machine}.json"
    path.write_text(json.dumps(result | {"machine": machine}, indent=1) + "\n")
    print(f"{path}: written.")
    if options.workdir is None:
        shutil.rmtree(folder)
    if not (result["bit_identical"] and result["same_losses"]):
        raise SystemExit("a disturbed run differs from the undisturbed one")


if __name__ == "__main__":
    main()
