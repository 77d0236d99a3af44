"""A run that everything happens to, beside one that nothing happens to: are the weights the same?

Ranks are started as a scheduler would: all of them, again whenever the job ended and its exit code
says that it is worth another try, and none is left when one of them fails. Faults are drawn from a
seed: kill -9 of one or all ranks, in a step or while a checkpoint is written, SIGTERM, a full disk,
flipped bits in the newest checkpoint, a hang; an old step that cannot be removed, for it is a link
or holds what is another's; wandb without a network. A step with NaN gradients changes what is
learned, so both runs have it, on the same rank.
"""

import argparse
import json
import os
import platform
import random
import re
import shutil
import signal
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.job import Job
from data_pipeline.making.build import build
from data_pipeline.making.toy import write_toy
from t2v.checkpoint.finding import list_checkpoints
from t2v.checkpoint.proving import verify_checkpoint

ROOT = Path(__file__).parent.parent
STOP = {65, 66, 70, 73, 78}  # another attempt would meet them again
HANG_SECONDS = 20.0
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
    """What happened in a run."""

    seconds: float = 0.0
    attempts: int = 0
    steps_run: int = 0
    struck: Counter = field(default_factory=Counter)
    codes: Counter = field(default_factory=Counter)
    detection_seconds: dict[str, list[float]] = field(default_factory=dict)
    restart_seconds: list[float] = field(default_factory=list)
    lost_steps: list[int] = field(default_factory=list)


class Fate:
    """The next thing to happen, drawn from a seed."""

    KINDS = (
        *("kill one rank", "kill all ranks", "kill in a save", "SIGTERM"),
        *("full disk", "flipped bits", "hang"),
        *("linked step", "another's step", "blocked tracker"),
    )

    def __init__(self, seed: int, *, gap: int, save_every: int, ranks: int) -> None:
        self.random, self.ranks = random.Random(seed), ranks
        self.gap, self.save_every = gap, save_every
        self.deck: list[str] = []

    def draw(self, step: int) -> list[tuple[str, str, int]]:
        """(kind, T2V_FAULT, step) of what is next after a step, up to what ends the job; every kind
        comes equally often."""
        drawn = [self._draw(step, step)]
        while drawn[-1][0] == "full disk":
            drawn.append(self._draw(drawn[-1][2], step))
        return drawn

    def _draw(self, step: int, resumes_at: int) -> tuple[str, str, int]:
        if not self.deck:
            self.deck = self.random.sample(self.KINDS, len(self.KINDS))
        kind, rank = self.deck.pop(), self.random.randrange(self.ranks)
        at = step + self.save_every + self.random.randint(self.gap // 2, self.gap * 3 // 2)
        planned, save = "", (at - resumes_at) // self.save_every + 1
        match kind:
            case "kill one rank":
                planned = f"{self.random.choice(['data', 'forward', 'step'])}:{rank}:{at}:kill"
            case "kill in a save":
                site = self.random.choice(["manifest", "rename", "retire", "write", "write"])
                rank = rank if site == "write" else 0
                planned = f"checkpoint.{site}:{rank}:{save}:kill"
            case "full disk":
                site = self.random.choice(["write", "manifest"])
                rank = rank if site == "write" else 0
                planned = f"checkpoint.{site}:{rank}:{save}:enospc"
            case "hang":
                planned = (
                    f"{self.random.choice(['data', 'forward', 'collective'])}:{rank}:{at}:hang"
                )
        return kind, planned, at


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


def saved_step(run_dir: Path) -> int:
    """The newest committed step."""
    good = [info.step for info in list_checkpoints(run_dir) if info.problem is None]
    return max(good, default=0)


def flip_bits(run_dir: Path, chance: random.Random) -> None:
    """Damage a file of the newest checkpoint."""
    newest = [info for info in list_checkpoints(run_dir) if info.problem is None][-1].folder
    path = chance.choice(sorted(newest.iterdir()))
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def link_away(run_dir: Path, chance: random.Random) -> None:
    """Keep the oldest step elsewhere, by a link, which is not followed when steps are removed."""
    folder = oldest_folder(run_dir)
    elsewhere = run_dir.parent / "elsewhere" / f"{folder.name}-{chance.randrange(10**9)}"
    elsewhere.parent.mkdir(exist_ok=True)
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)


def give_away(run_dir: Path, chance: random.Random) -> None:
    """Put a file of somebody else into the oldest step; where one may, the step becomes theirs."""
    folder = oldest_folder(run_dir)
    (folder / f"notes-{chance.randrange(10**9)}.txt").write_text("not the run's\n")
    if os.geteuid() == 0:
        for path in (folder, *folder.iterdir()):
            os.chown(path, 65534, 65534)


def oldest_folder(run_dir: Path) -> Path:
    """The oldest committed step that is still a folder."""
    good = [info for info in list_checkpoints(run_dir) if info.problem is None]
    return next(info.folder for info in good if not info.folder.is_symlink())


# Done to a run that was killed, before it is started again.
BETWEEN = {"flipped bits": flip_bits, "linked step": link_away, "another's step": give_away}


def undisturbed(recipe: Path, *, ranks: int, nan: str) -> float:
    """Seconds of the run that nothing happens to."""
    started = time.time()
    job = Job(recipe, ranks=ranks, faults=nan, log=recipe.with_suffix(".log"))
    while not job.is_over:
        time.sleep(0.1)
    if job.exit_code:
        raise SystemExit(f"the undisturbed run ended with {job.exit_code}; see {recipe.parent}")
    return time.time() - started


def soak(recipe: Path, *, steps: int, ranks: int, nan: str, fate: Fate) -> Tally:
    """Start the job until it is done; something happens to it each time."""
    run_dir, log = recipe.with_suffix(""), recipe.with_suffix(".log")
    tally, began, reached = Tally(), time.time(), 0
    console = Console()
    while True:
        resumes_at = saved_step(run_dir)
        drawn = [fault for fault in fate.draw(resumes_at) if fault[2] < steps]
        kind, _, at = drawn[-1] if drawn else ("nothing", "", 0)
        planned = ";".join([nan, *(fault[1] for fault in drawn)])
        tracked = ["metrics.wandb_project=soak"] if kind == "blocked tracker" else []
        job = Job(recipe, *tracked, ranks=ranks, faults=planned, log=log)
        tally.attempts += 1
        struck_at = follow(job, run_dir, kind, at, tally, resumes_at)
        over, reached = time.time(), max(last_step(run_dir), resumes_at)
        times = job.fault_times()
        full = sum(fault[0] == "full disk" for fault in drawn[: len(times)])
        tally.struck["full disk"] += full
        tally.codes[str(job.exit_code)] += 1
        if struck_at is None and job.exit_code:
            struck_at = max(times, default=None)
        if struck_at is not None:
            tally.struck[kind] += kind != "full disk"
            tally.detection_seconds.setdefault(kind, []).append(over - struck_at)
        console.print(
            f"{over - began:6.0f} s  attempt {tally.attempts}: step {resumes_at} -> {reached}, "
            f"{'full disk, ' * full}{kind if struck_at else 'nothing'}, exit {job.exit_code}",
            highlight=False,
        )
        if job.exit_code == 0:
            tally.steps_run += reached - resumes_at
            break
        if job.exit_code in STOP:
            raise SystemExit(f"{run_dir}: ended with {job.exit_code}; see {log}")
        if kind in BETWEEN and struck_at is not None:
            BETWEEN[kind](run_dir, fate.random)
        tally.steps_run += reached - resumes_at
        tally.lost_steps.append(reached - saved_step(run_dir))
    tally.seconds = time.time() - began
    return tally


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
            if kind == "kill all ranks" or kind in BETWEEN:
                struck_at = time.time()
                job.kill()
            elif kind in ("SIGTERM", "blocked tracker"):
                struck_at = time.time()
                job.kill(signal.SIGTERM)
    return struck_at


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


def print_result(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['steps']} steps, {sum(result['faults'].values())} faults")
    for column in ("fault", "times", "all ranks down after, median s", "worst s"):
        table.add_column(column, justify="left" if column == "fault" else "right")
    for kind, times in result["faults"].items():
        seconds = result["detection_seconds"].get(kind, {})
        cells = [f"{seconds[name]:.1f}" if seconds else "-" for name in ("median", "worst")]
        table.add_row(kind, str(times), *cells)
    console = Console()
    console.print(table)
    for name in ("bit_identical", "same_losses", "attempts", "goodput", "steps_lost"):
        console.print(f"{name}: {result[name]}", highlight=False)
    console.print(f"from start to first new step: {result['restart_seconds']} s", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--gap", type=int, default=30, help="steps between faults, about")
    parser.add_argument("--save-every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=Path, help="kept; none: a temporary folder")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    folder = options.workdir or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    write_toy(folder / "media", videos=24, images=0, size=(4, 24, 32))
    build(folder / "media" / "videos", folder / "shards", frames=4, height=12, width=16, fps=8.0)
    os.environ.update(BLOCKED)
    chance = random.Random(options.seed)
    poisoned = chance.sample(range(10, options.steps - 10), max(options.steps // 250, 1))
    nan = ";".join(f"forward:{options.ranks - 1}:{step}:nan" for step in sorted(poisoned))
    alone = write_recipe(folder, "undisturbed", options.steps, options.save_every)
    broken = write_recipe(folder, "disturbed", options.steps, options.save_every)
    quiet_seconds = undisturbed(alone, ranks=options.ranks, nan=nan)
    print(f"undisturbed: {quiet_seconds:.0f} s", flush=True)
    every = options.save_every
    fate = Fate(options.seed, gap=options.gap, save_every=every, ranks=options.ranks)
    tally = soak(broken, steps=options.steps, ranks=options.ranks, nan=nan, fate=fate)
    run_dir = folder / "disturbed"
    wanted, found = (digests(folder / n, options.steps) for n in ("undisturbed", "disturbed"))
    truth = ("loss", "grad_norm", "batch_digest")
    told = [timeline(folder / name, truth) for name in ("undisturbed", "disturbed")]
    productive = sum(seconds for _, seconds in timeline(run_dir, ("step_seconds",)))
    result = {
        "steps": options.steps,
        "ranks": options.ranks,
        "seed": options.seed,
        "bit_identical": wanted == found,
        "same_losses": told[0] == told[1],
        "faults": dict(tally.struck) | {"NaN step, in both runs": len(poisoned)},
        "attempts": tally.attempts,
        "exit_codes": dict(tally.codes),
        "undisturbed_seconds": round(quiet_seconds, 1),
        "disturbed_seconds": round(tally.seconds, 1),
        "goodput": round(productive / tally.seconds, 3),
        "steps_run": tally.steps_run,
        "steps_lost": summary([float(lost) for lost in tally.lost_steps])
        | {"total": sum(tally.lost_steps)},
        "detection_seconds": {k: summary(v) for k, v in tally.detection_seconds.items()},
        "restart_seconds": summary(tally.restart_seconds),
        "left_behind": len(list((run_dir / "checkpoints").glob(".staging-*"))),
    }
    print_result(result)
    machine = re.sub(r"[^a-z0-9]+", "-", f"{platform.machine()}-{os.cpu_count()}cpu".lower())
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"soak-{options.steps}-{machine}.json"
    path.write_text(json.dumps(result | {"machine": machine}, indent=1) + "\n")
    print(f"{path}: written.")
    if options.workdir is None:
        shutil.rmtree(folder)
    if not (result["bit_identical"] and result["same_losses"]):
        raise SystemExit("the disturbed run differs from the undisturbed one")


if __name__ == "__main__":
    main()
