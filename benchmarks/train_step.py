"""A training step of HPDM beside its alternatives: time, arithmetic speed and peak memory.

Contenders of one width take turns in one process, so that whatever disturbs the machine disturbs
all: HPDM, HPDM without adaptive computation, HPDM that samples its context with the generic 3-D
grid sample, and full-resolution RINs, with tokens of HPDM's size and of twice its side: the paper
does not say which it compares with. Memory is each one's own, in its own process. On a GPU the
geometry is the paper's (Table 1); on a CPU it is scaled down.
"""

import argparse
import json
import multiprocessing
import os
import platform
import re
import resource
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from data_pipeline.feeding.loader import Batch
from data_pipeline.pyramid import draw_offsets
from t2v.engine.world import World
from t2v.loop import open_engine
from t2v.methods.hpdm.context import sample_volume
from t2v.methods.hpdm.method import HPDMMethod
from t2v.methods.hpdm.network import HPDM
from t2v.plan.footprint import measure
from t2v.plan.plan import compute_per_sample
from t2v.recipe.recipe import RunConfig, load_config

ROOT = Path(__file__).parent.parent
FULL, FULL_COARSE = "full resolution", "full, big tokens"
CONTENDERS = ("hpdm", "not adaptive", "grid sample", FULL_COARSE, FULL)
# arXiv 2406.07792: Table 1 (64x256^2 and 64x512^2, patch 16x64^2) and its text, on an A100.
PAPER_RATIOS = {"not adaptive": 1.6, FULL_COARSE: 5.4, FULL: 5.4}
LARGEST_BATCH = 16
CPU_BATCH = 2


@dataclass(frozen=True)
class Geometry:
    """Sizes that the contenders share; all but these are those of ucf101_s."""

    name: str
    clip_size: tuple[int, int, int]
    patch_size: tuple[int, int, int]
    levels_per_block: tuple[int, ...]
    model: dict[str, int] = field(default_factory=dict)


SCALED = Geometry(
    name="scaled 32x96x96",
    clip_size=(32, 96, 96),
    patch_size=(8, 24, 24),
    levels_per_block=(1, 1, 2, 2, 3, 3),
    model={
        "token_dim": 256,
        "num_latents": 54,
        "latent_dim": 64,
        "token_head_dim": 32,
        "latent_head_dim": 32,
        "conditioning_dim": 256,
    },
)
PUBLISHED = (
    Geometry("64x256x256", (64, 256, 256), (16, 64, 64), (1, 1, 2, 2, 3, 3)),
    # The paper's time axis stops growing one level earlier; ours grows at every level.
    Geometry("64x512x512", (64, 512, 512), (8, 64, 64), (1, 2, 2, 3, 3, 4)),
)


@dataclass
class Result:
    """What one contender did; None where it does not fit."""

    contender: str
    parameters: int
    tflop_per_sample: float
    peak_gib_at_batch_1: float | None = None
    batch_size: int | None = None
    step_seconds: list[float] = field(default_factory=list)

    @property
    def samples_per_second(self) -> float | None:
        if not self.step_seconds:
            return None
        return self.batch_size / statistics.median(self.step_seconds)


def grid_sampled(volume: Tensor, matrices: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """What `sample_volume` gives, to rounding, from torch's generic 3-D grid sample."""
    t, h, w = (
        (matrix * torch.linspace(-1, 1, matrix.shape[2], device=matrix.device)).sum(2)
        for matrix in matrices
    )
    shape = (-1, t.shape[1], h.shape[1], w.shape[1])
    places = torch.stack(
        [
            w[:, None, None, :].expand(shape),
            h[:, None, :, None].expand(shape),
            t[:, :, None, None].expand(shape),
        ],
        dim=4,
    )
    features = volume.movedim(4, 1)
    sampled = F.grid_sample(features, places, padding_mode="border", align_corners=True)
    return sampled.flatten(2).mT


class GridSampledHPDM(HPDM):
    """HPDM whose context comes from the generic grid sample."""

    def forward(self, *args: Any, **named: Any) -> tuple[Tensor, Tensor]:
        with patch("t2v.methods.hpdm.context.sample_volume", grid_sampled):
            return super().forward(*args, **named)


class GridSampledMethod(HPDMMethod):
    """HPDM around that network."""

    def network(self) -> HPDM:
        return GridSampledHPDM(self.config.model, self.config.pyramid, self.conditioning)


class Trainer:
    """A contender that takes whole training steps on a fixed batch of noise."""

    def __init__(
        self, geometry: Geometry, contender: str, device: torch.device, batch_size: int
    ) -> None:
        self.config = recipe(geometry, contender, device)
        self.device = device
        kind = GridSampledMethod if contender == "grid sample" else HPDMMethod
        self.method = kind(self.config.method, self.config.conditioning)
        self.engine = open_engine(self.config, self.method, World(device))
        self.batch = noise_batch(self.config, batch_size)

    def step(self) -> float:
        """Seconds of one training step: losses, backward, optimizer."""
        started = time.perf_counter()
        losses = self.method.losses(
            self.engine.model, self.batch, seed=self.config.seed, device=self.device
        )
        self.engine.backward(losses.sum(), final=True)
        self.engine.update({"base": 1e-6, "new": 1e-6}, float(self.engine.gradient_norm()))
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


def recipe(geometry: Geometry, contender: str, device: torch.device) -> RunConfig:
    """ucf101_s with a geometry and a contender's changes."""
    patch, blocks = geometry.patch_size, list(geometry.levels_per_block)
    levels = blocks[-1]
    if contender == "not adaptive":
        blocks = [levels] * len(blocks)
    if contender in (FULL, FULL_COARSE):
        patch, levels, blocks = geometry.clip_size, 1, [1] * len(blocks)
    changes = {
        "method.model.token_size": [1, 8, 8] if contender == FULL_COARSE else [1, 4, 4],
        "method.pyramid.levels": levels,
        "method.pyramid.patch_size": list(patch),
        "method.pyramid.clip_size": list(geometry.clip_size),
        "method.model.levels_per_block": blocks,
        "method.sampling.steps": [1] * levels,
        "engine.kind": "single",
        "engine.precision": "tf32" if device.type == "cuda" else "fp32",
        "engine.compile": "false",
    } | {f"method.model.{name}": value for name, value in geometry.model.items()}
    overrides = [f"{key}={value}" for key, value in changes.items()]
    return load_config(ROOT / "configs" / "ucf101_s.yaml", overrides)


def noise_batch(config: RunConfig, size: int) -> Batch:
    """Random patches at random windows."""
    rng, pyramid = np.random.default_rng(0), config.method.pyramid
    shape = (size, pyramid.levels, *pyramid.patch_size, 3)
    return Batch(
        numbers=torch.arange(size),
        ids=[str(number) for number in range(size)],
        patches=torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8)),
        offsets=torch.from_numpy(np.stack([draw_offsets(pyramid, rng) for _ in range(size)])),
        latents=None,
        latent_frames=None,
        fps=torch.full((size,), 25.0),
        original_size=torch.full((size, 2), 240.0),
        text_tokens=None,
        text_mask=None,
        label=torch.zeros(size, dtype=torch.long),
        quarantined=[],
    )


def probe(geometry: Geometry, contender: str, device: torch.device) -> tuple[float, int] | None:
    """(peak GiB at batch size 1, largest batch size of use); None if even 1 does not fit."""
    if device.type == "cpu":
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        Trainer(geometry, contender, device, 1).step()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20, CPU_BATCH
    total = torch.cuda.get_device_properties(device).total_memory
    peaks, size = [], 1
    # The others' weights are resident too, and memory grows no faster than the batch.
    while size <= LARGEST_BATCH and (not peaks or 2 * peaks[-1] < 0.8 * total):
        torch.cuda.reset_peak_memory_stats()
        try:
            trainer = Trainer(geometry, contender, device, size)
            for _ in range(2):
                trainer.step()
        except torch.OutOfMemoryError:
            break
        peaks.append(torch.cuda.max_memory_allocated())
        size *= 2
        del trainer
        torch.cuda.empty_cache()
    return (peaks[0] / 2**30, size // 2) if peaks else None


def compare(geometry: Geometry, device: torch.device, repeats: int) -> list[Result]:
    """Every contender's result; their steps take turns."""
    results, trainers = [], {}
    context = multiprocessing.get_context("spawn")
    for contender in track(CONTENDERS, f"{geometry.name}: memory", transient=True):
        config = recipe(geometry, contender, device)
        footprint = measure(config)
        count = sum(footprint.parameters.values())
        result = Result(contender, count, compute_per_sample(config, footprint).spent)
        with context.Pool(1) as pool:
            probed = pool.apply(probe, (geometry, contender, device))
        if probed is not None:
            result.peak_gib_at_batch_1, result.batch_size = probed
        results.append(result)
    for result in results:
        if result.batch_size is not None:
            trainer = Trainer(geometry, result.contender, device, result.batch_size)
            trainer.step()
            trainers[result.contender] = trainer
    refuse_unequal_fusion(trainers["hpdm"])
    for _ in track(range(repeats), f"{geometry.name}: time", transient=True):
        for result in results:
            if result.contender in trainers:
                result.step_seconds.append(trainers[result.contender].step())
    return results


@torch.no_grad()
def refuse_unequal_fusion(ours: Trainer) -> None:
    """The two ways of sampling must compute the same, or their times mean nothing."""
    model, offsets = ours.engine.model, ours.batch.offsets.to(ours.device)
    finest = model.pyramid.levels - 1
    volume = torch.randn(len(offsets), *model.grid.shape, 16, device=ours.device)
    for coarser in range(finest):
        matrices = model.grid.matrices(
            finest, offsets[:, finest], coarser, offsets[:, coarser], model.grid.shape
        )
        contexts = sample_volume(volume, matrices), grid_sampled(volume, matrices)
        # Products in tf32 have ten bits.
        torch.testing.assert_close(*contexts, rtol=0, atol=2e-2 if volume.is_cuda else 1e-5)


def hardware(device: torch.device) -> str:
    """The name of what computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        name = found[1] if found else name
    return f"{name}, {torch.get_num_threads()} threads"


def print_results(geometry: Geometry, results: list[Result], title: str) -> None:
    """A table with the paper's ratios beside ours."""
    table = Table("contender", "samples/s", "TFLOP/s", "GiB", "batch", "HPDM leads", "paper's")
    ours = results[0].samples_per_second
    for result in results:
        speed = result.samples_per_second
        paper = PAPER_RATIOS.get(result.contender)
        table.add_row(
            result.contender,
            "does not fit" if speed is None else f"{speed:.3f}",
            "" if speed is None else f"{speed * result.tflop_per_sample:.3f}",
            "" if speed is None else f"{result.peak_gib_at_batch_1:.2f}",
            "" if speed is None else f"{result.batch_size}",
            "" if speed is None else f"{ours / speed:.2f}x",
            f"{paper}x" if paper else "",
        )
    console = Console()
    console.print(f"{geometry.name} on {title}", table)
    console.print("GiB: peak at batch 1. paper's: the published lead, on an A100, not ours.")


def to_record(geometry: Geometry, results: list[Result], title: str, threads: int) -> dict:
    """The numbers as JSON."""
    ours = results[0].samples_per_second
    contenders = []
    for result in results:
        speed = result.samples_per_second
        derived = {"samples_per_second": speed}
        if speed is not None:
            derived["tflop_per_second"] = speed * result.tflop_per_sample
            derived["hpdm_leads_by"] = ours / speed
        contenders.append(asdict(result) | derived)
    return {
        "benchmark": "train_step",
        "hardware": title,
        "torch": torch.__version__,
        "threads": threads,
        "load_average_of_last_minute": os.getloadavg()[0],
        "geometry": asdict(geometry),
        "precision": "tf32" if torch.cuda.is_available() else "fp32",
        "contenders": contenders,
        "paper_ratios_not_ours": PAPER_RATIOS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=None, help="timed steps per contender")
    parser.add_argument("--out", default=ROOT / "benchmarks" / "results", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    geometries = PUBLISHED if device.type == "cuda" else (SCALED,)
    repeats = options.repeats or (10 if device.type == "cuda" else 3)
    title = hardware(device)
    records = []
    for geometry in geometries:
        results = compare(geometry, device, repeats)
        print_results(geometry, results, title)
        records.append(to_record(geometry, results, title, torch.get_num_threads()))
    options.out.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    file = options.out / f"train_step_{slug}.json"
    file.write_text(json.dumps(records, indent=1) + "\n")
    print(f"{file}: written.")


if __name__ == "__main__":
    main()
