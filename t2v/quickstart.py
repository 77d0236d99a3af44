"""The whole story on a CPU in minutes: toy clips in, a model of either method trained, stopped,
resumed, and its samples scored from their pixels."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from rich.table import Table

from data_pipeline.errors import ConfigError, InputMissing, NumericError, UserError
from data_pipeline.feeding.config import TextConditioning
from data_pipeline.making.build import build
from data_pipeline.making.toy import Staging, Toy, all_toys, write_toy
from data_pipeline.making.toy_score import read_toy
from data_pipeline.media.codec import decode_clip
from data_pipeline.store import storage
from data_pipeline.terminal import Terminal
from data_pipeline.text.embed import embed, make_tiny_encoder
from t2v.attempt.files import read_mapping
from t2v.checkpoint.finding import resolve_checkpoint
from t2v.recipe.recipe import RunConfig, load_config
from t2v.watching.page import write_report

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# Recipes in the order of training: each starts from the one before; the last makes the samples.
STORIES = {
    "hpdm": ("quickstart_base", "quickstart_pyramid"),
    "pyramid-flow": ("quickstart_pyramid_flow",),
}
# Objects that are large on HPDM's coarsest level, of 12x12 pixels.
STAGINGS = {
    "hpdm": Staging(radius=0.32, travel=0.30, jitter=0.03),
    "pyramid-flow": Staging(),
}
# Of a recipe that is split over processes.
PROCESSES = 2
# The least share that counts as working, of what is measured.
BOUNDS = {
    "hpdm": {"colour": 0.9, "shape": 0.8, "direction": 0.9, "in one piece": 0.9},
    "pyramid-flow": {"colour": 0.9, "direction": 0.8, "in one piece": 0.8},
}


def run_quickstart(workdir: Path, method: str, seed: int = 0) -> int:
    """Run every part in `workdir`; prints what was measured and where everything is. Toys, weights
    and order of samples are of the seed."""
    console, started = Terminal(), time.monotonic()
    if not storage.is_empty(str(workdir)):
        raise ConfigError(f"{workdir}: is not empty; remove it or give --workdir another folder.")
    if not (CONFIGS / "quickstart_base.yaml").is_file():
        raise InputMissing(f"{CONFIGS}: no recipes here; run from a clone of the repository.")

    def part(text: str) -> None:
        console.print(f"{time.monotonic() - started:5.0f} s  {text}", highlight=False)

    *earlier, last = recipes = STORIES[method]
    configs = {recipe: load_config(CONFIGS / f"{recipe}.yaml") for recipe in recipes}
    steps = configs[last].total_steps
    part("toy clips and images, captioned")
    frames = configs[last].method.view.clip_size[0]
    write_toy(
        workdir / "media",
        videos=640,
        images=320,
        size=(frames, 96, 128),
        seed=seed,
        staging=STAGINGS[method],
    )
    part("media -> WebDataset shards")
    prepare_data(workdir, configs[last])
    given = [f"seed={seed}"]
    for recipe in earlier:
        part(f"{recipe}: {configs[recipe].total_steps} steps, {where(configs[recipe])}")
        train(workdir, recipe, *given)
        given = [f"seed={seed}", f"warm_start.checkpoint={workdir / 'runs' / recipe}"]
    started_from = f", warm-started from {earlier[-1]}" if earlier else ""
    part(f"{last}: {steps} steps, {where(configs[last])}{started_from}, stopped near the middle")
    train(workdir, last, *given, preempt_at=steps // 2)
    part(f"{last}: resumed from {resolve_checkpoint(workdir / 'runs' / last).name}")
    train(workdir, last, *given)
    toys = [toy for number, toy in enumerate(all_toys()) if (number + number // 4) % 2 == 0]
    part(f"sampling {len(toys)} prompts")
    samples = sample(workdir, last, toys)
    scores = score(samples, toys)
    write_picture(samples)
    for recipe in recipes:
        run_dir = workdir / "runs" / recipe
        write_report(run_dir, run_dir / "report.html")
    result = {"method": method, "seed": seed, "scores": scores}
    missed = report(console, workdir, result | {"seconds": time.monotonic() - started})
    return NumericError.exit_code if missed else 0


def prepare_data(workdir: Path, config: RunConfig) -> None:
    """Shards of what a recipe reads, at its clip size, and their caption embeddings."""
    frames, height, width = config.method.view.clip_size
    captions = sorted({toy.caption for toy in all_toys()} | {still_caption(t) for t in all_toys()})
    conditioning = config.conditioning
    assert isinstance(conditioning, TextConditioning)
    make_tiny_encoder(workdir / "encoder", captions, width=conditioning.width, seed=0)
    for kind in kinds(config):
        build(
            workdir / "media" / kind,
            workdir / "data" / kind,
            frames=frames,
            height=height,
            width=width,
            fps=config.method.sampling.fps,
            shard_samples=160,
        )
        embed(
            workdir / "data" / kind,
            str(workdir / "encoder"),
            name=conditioning.encoder,
            max_tokens=conditioning.max_tokens,
        )


def kinds(config: RunConfig) -> list[str]:
    """What a recipe's sources are of, in their order: videos, images."""
    return [Path(source.path).name for source in config.data.sources]


def still_caption(toy: Toy) -> str:
    """What the caption of a still image of the object says."""
    return Toy(toy.color, toy.shape, None).caption


def train(workdir: Path, recipe: str, *overrides: str, preempt_at: int | None = None) -> None:
    """One training job under torchrun; with `preempt_at`, asked to stop there by the flag file."""
    run_dir, path = workdir / "runs" / recipe, CONFIGS / f"{recipe}.yaml"
    config = load_config(path, list(overrides))
    command = [
        *(*launch(processes_of(config)), "train", str(path)),
        f"run_dir={run_dir}",
        *(f"data.sources.{n}.path={workdir / 'data' / k}" for n, k in enumerate(kinds(config))),
        *([f"samples.encoder={workdir / 'encoder'}"] if config.samples else []),
        *overrides,
    ]
    log = workdir / "runs" / f"{recipe}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        job = subprocess.Popen(command, stdout=output, stderr=output, env=environment())
        follow(job, run_dir, config.total_steps, preempt_at)
    state = read_mapping(run_dir / "status.json").get("state")
    wanted = "preempted" if preempt_at else "done"
    if state != wanted:
        raise UserError(f"{log}: {recipe} ended as '{state}', not '{wanted}'; the log says why.")


def processes_of(config: RunConfig) -> int:
    """How many processes train a recipe."""
    return 1 if config.engine.kind == "single" else PROCESSES


def where(config: RunConfig) -> str:
    """What a recipe's engine runs on, in words."""
    processes = processes_of(config)
    return "one process" if processes == 1 else f"{processes} {config.engine.kind} processes"


def launch(processes: int) -> tuple[str, ...]:
    """The beginning of a command that runs on so many processes."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    return (*torchrun, f"--nproc-per-node={processes}", "-m", "t2v.cli")


def environment() -> dict[str, str]:
    """One thread in each process: models so small gain nothing by more, and threads that wait for
    each other stand still on a machine that others use, too."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


def follow(job: subprocess.Popen, run_dir: Path, total_steps: int, preempt_at: int | None) -> None:
    """Show a job's progress until it ends; touch its flag file at the step asked for."""
    console = Terminal()
    asked = False
    with console.status("starting") as status:
        while job.poll() is None:
            time.sleep(0.5)
            step = read_mapping(run_dir / "status.json").get("step", 0)
            status.update(f"step {step} of {total_steps}")
            if preempt_at and not asked and step >= preempt_at:
                (run_dir / "PREEMPT").touch()
                asked = True


def sample(workdir: Path, recipe: str, toys: list[Toy]) -> Path:
    """Samples of a trained run, one per toy, by the command a user would give."""
    out = workdir / "samples"
    prompts = workdir / "prompts.txt"
    prompts.write_text("\n".join(toy.caption for toy in toys) + "\n")
    command = [
        *(*launch(PROCESSES), "sample"),
        str(workdir / "runs" / recipe),
        *("--prompts", str(prompts), "--out", str(out), "--encoder", str(workdir / "encoder")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    if done.returncode:
        raise UserError(f"{out}: sampling failed because {done.stderr.strip()[-500:]}")
    return out


def score(samples: Path, toys: list[Toy]) -> dict[str, float]:
    """Shares over the finest clips, read from the written mp4 files."""
    records = json.loads((samples / "samples.json").read_text())
    readings = [
        read_toy(decode_clip((samples / record["file"]).read_bytes())) for record in records
    ]
    pairs = list(zip(readings, toys, strict=True))
    return {
        "colour": float(np.mean([reading.color == toy.color for reading, toy in pairs])),
        "direction": float(np.mean([reading.direction == toy.direction for reading, toy in pairs])),
        "in one piece": float(np.mean([reading.whole_frames for reading in readings])),
        "shape": float(np.mean([reading.shape == toy.shape for reading, toy in pairs])),
    }


def write_picture(samples: Path) -> None:
    """Every fifth sample, four frames of each side by side, two samples in a row."""
    records = json.loads((samples / "samples.json").read_text())[::5]
    strips = []
    for record in records:
        clip = decode_clip((samples / record["file"]).read_bytes())
        frames = clip[:: max(len(clip) // 4, 1)][:4]
        framed = np.pad(frames, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=60)
        strips.append(np.concatenate(list(framed), axis=1))
    rows = [np.concatenate(pair, axis=1) for pair in zip(strips[::2], strips[1::2], strict=True)]
    image = Image.fromarray(np.concatenate(rows))
    image.resize((4 * image.width, 4 * image.height), Image.Resampling.NEAREST).save(
        samples / "picture.png"
    )


def report(console: Terminal, workdir: Path, result: dict) -> list[str]:
    """Print and write measurements, losses and places; returns what missed its bound."""
    table = Table(title="40 sampled clips, read from their pixels")
    for column in ("right", "share", "bound", "chance"):
        table.add_column(column)
    bounds, scores = BOUNDS[result["method"]], result["scores"]
    chance = {"colour": "20 %", "direction": "25 %", "in one piece": "-", "shape": "25 %"}
    for name, value in scores.items():
        bound = f"{bounds[name]:.0%}" if name in bounds else "-"
        table.add_row(name, f"{value:.0%}", bound, chance[name])
    console.print(table)
    losses = {}
    for run in STORIES[result["method"]]:
        lines = (workdir / "runs" / run / "metrics.jsonl").read_text().splitlines()
        told = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
        losses[run] = {"first": told[0], "last": float(np.mean(told[-50:]))}
        console.print(
            f"{run}: loss {losses[run]['first']:.3f} -> {losses[run]['last']:.3f}", highlight=False
        )
    result |= {"bounds": bounds, "losses": losses}
    (workdir / "quickstart.json").write_text(json.dumps(result, indent=1))
    console.print(
        f"text encoder: a T5 with random weights, made here; it has learned nothing\n"
        f"pictures:     {workdir / 'samples' / 'contact_sheet.png'}, picture.png\n"
        f"clips:        {workdir / 'samples'}\n"
        f"runs:         {workdir / 'runs'}, each with report.html\n"
        f"done in {result['seconds']:.0f} s",
        highlight=False,
    )
    missed = [name for name, bound in bounds.items() if scores[name] < bound]
    if missed:
        console.print(f"below its bound: {', '.join(missed)}", style="red")
    return missed
