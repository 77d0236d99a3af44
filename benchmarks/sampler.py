"""Which sampler a trained HPDM wants: solvers by their error, and settings by what comes out.

    python -m benchmarks.sampler quickstart [quickstart-1 ...]

Each argument is the folder of a finished `t2v quickstart`. **Solvers**: how far each ends from a
run with ten times as many calls, at equal calls, at every level; levels below the one that is
measured are sampled alike, so that the same context and noise begin every trajectory. **Settings**:
clips of all prompts by rows that each change the recipe's sampler, read by the quickstart's pixel
reader, with the sampling FLOPs of one clip as `t2v plan` counts them. Intervals are 95 % of
Student's law over folders.
"""

import argparse
import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student
from torch import Tensor

from benchmarks.ablations import features
from data_pipeline.making.toy import all_toys, toy_clips
from data_pipeline.making.toy_score import read_toy
from t2v.evaluation.scores import KernelDistance, frechet_distance, moments
from t2v.methods.hpdm.config import HPDMConfig
from t2v.methods.hpdm.cost import sampling_flops
from t2v.methods.hpdm.sampling import generate
from t2v.methods.hpdm.settings import HPDMSamplingConfig
from t2v.methods.hpdm.tiled_denoiser import shrink
from t2v.quickstart import STAGINGS
from t2v.recipe.recipe import method_of
from t2v.sampling.generate import sampling_world, with_sampling
from t2v.sampling.source import open_source
from t2v.sampling.subjects import Conditions, Request, subjects_of

ROOT = Path(__file__).parent.parent
SOLVERS = ("euler", "heun", "dpm++", "unipc")
CALLS = (6, 12, 24)
FINER, REFERENCE, SOLVED_CLIPS = 10, "unipc", 8
# The paper's sampler at the quickstart's steps: what the recipe did before these settings came.
PAPER: dict[str, Any] = {
    "steps": [24, 12],
    "solver": ["heun", "euler"],
    "guidance_scale": 2.0,
    "overlap": "hw",
    "context": {},
    "coarse_projection": False,
}
NOISED = {"context": {"quantile": 0.1, "noised": True}}
ROWS: dict[str, dict[str, Any]] = {
    "the paper's": PAPER,
    "  context at a quantile": PAPER | NOISED,
    "  coarse projection": PAPER | {"coarse_projection": True},
    "  unipc": PAPER | {"solver": "unipc"},
    "  no overlap": PAPER | {"overlap": ""},
    "  guidance at level 0 alone": PAPER | {"guidance_scale": [2.0, 1.0]},
    "the recipe's": {},
    "  context near zero": {"context": {}},
    "  no projection": {"coarse_projection": False},
    "  heun, euler": {"solver": ["heun", "euler"]},
    "  guidance at both levels": {"guidance_scale": 3.0},
    "  guidance in an interval": {"guidance_interval": [0.3, 10.0]},
    "  half the steps": {"steps": [12, 6]},
    "  a third of the steps": {"steps": [8, 4]},
    "  a quarter of the steps": {"steps": [6, 3]},
}
MEASURES = ("colour", "shape", "direction", "one piece", "mismatch", "frechet", "mmd", "gflops")

Clips = Callable[[dict[str, Any]], list[Tensor]]


def study(folder: Path) -> tuple[list[dict], list[dict]]:
    """Rows of both tables, of one quickstart."""
    with sampling_world() as world, torch.no_grad():
        source = open_source(folder / "runs" / "quickstart_pyramid", world)
        config = with_sampling(source.config, [])
        assert isinstance(config.method, HPDMConfig)
        toys = all_toys()
        request = Request(
            prompts=tuple(toy.caption for toy in toys), encoder=str(folder / "encoder")
        )
        subjects = subjects_of(config, request)
        conditions = Conditions(config, request, source.text_encoder, world.device)
        conditions.read(subjects)
        network = method_of(config).network()
        source.load(network, "ema")
        network.eval()
        with torch.device("meta"):
            blank = method_of(config).network()
        settings = config.method.sampling.model_dump()

        def with_changes(changes: dict[str, Any]) -> HPDMSamplingConfig:
            return HPDMSamplingConfig.model_validate(settings | changes)

        def clips_of(chosen: list) -> Clips:
            condition, null = conditions.of(chosen)

            def clips(changes: dict[str, Any]) -> list[Tensor]:
                return generate(
                    network,
                    condition=condition,
                    null=null,
                    seeds=[subject.seed for subject in chosen],
                    sampling=with_changes(changes),
                    diffusion=config.method.diffusion,
                )

            return clips

        solved = solver_errors(clips_of(subjects[:SOLVED_CLIPS]), settings["steps"])
        known = features(real_clips(config.method.pyramid.clip_size))
        rows = []
        for name, changes in ROWS.items():
            levels = clips_of(subjects)(changes)
            with torch.enable_grad():  # which torch's counter of operations wants
                flops = sampling_flops(
                    blank, with_changes(changes), config.method.diffusion, config.conditioning
                )
            measured = quality(levels, toys, known)
            rows.append({"row": name} | measured | {"gflops": sum(flops) / 1e9})
            print(rows[-1], flush=True)
    return solved, rows


def solver_errors(clips: Clips, steps: list[int]) -> list[dict]:
    """RMS, in [-1, 1], between each solver's clips and the reference's."""

    def clips_at(level: int, solver: str, calls: int) -> Tensor:
        # Heun's last step, to no noise, is one call.
        counts = [(calls + 1) // 2 if solver == "heun" else calls if n == level else count
                  for n, count in enumerate(steps)]  # fmt: skip
        solvers = [solver if n == level else REFERENCE for n in range(len(steps))]
        return clips({"steps": counts, "solver": solvers, "churn": 0.0})[level]

    rows = []
    for level in range(len(steps)):
        exact = clips_at(level, REFERENCE, FINER * max(CALLS))
        for calls in CALLS:
            for solver in SOLVERS:
                error = (clips_at(level, solver, calls) - exact).square().mean().sqrt()
                rows.append({"level": level, "calls": calls, "solver": solver, "rms": float(error)})
    return rows


def real_clips(size: tuple[int, int, int]) -> Tensor:
    """Toy clips that no model saw, in [-1, 1], as the quickstart's shards would hold them."""
    frames, height, width = size
    growth = (1, 96 // height, 96 // width)
    drawn = toy_clips(320, (frames, 96, 128), 10**6, True, STAGINGS["hpdm"])
    clips = torch.from_numpy(np.stack([clip[:, :, 16:112] for _, clip in drawn]))
    return shrink(clips.movedim(-1, 1).float() / 127.5 - 1, growth)


def quality(levels: list[Tensor], toys: list, known: np.ndarray) -> dict[str, float]:
    """What the pixel reader finds right in the finest clips, how far they are from the coarser ones
    and, by fixed features, from real clips."""
    fine = levels[-1]
    pictures = ((fine + 1) * 127.5).round().clamp(0, 255).byte().movedim(1, -1).numpy()
    readings = [read_toy(clip) for clip in pictures]
    pairs = list(zip(readings, toys, strict=True))
    made = features(fine)
    growth = tuple(int(a // b) for a, b in zip(fine.shape[2:], levels[-2].shape[2:], strict=True))
    return {
        "colour": float(np.mean([reading.color == toy.color for reading, toy in pairs])),
        "shape": float(np.mean([reading.shape == toy.shape for reading, toy in pairs])),
        "direction": float(np.mean([reading.direction == toy.direction for reading, toy in pairs])),
        "one piece": float(np.mean([reading.whole_frames for reading in readings])),
        "mismatch": float((shrink(fine, growth) - levels[-2]).square().mean().sqrt()),
        "frechet": frechet_distance(moments(known), moments(made)),
        "mmd": KernelDistance(known, made)(),
    }


def told(values: list[float]) -> str:
    """Mean and half the 95 % interval over folders."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.4g}"
    reach = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{mean:.4g} ± {reach:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="+", help="of finished quickstarts")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    studies = [study(folder) for folder in options.folders]
    errors = [row for solved, _ in studies for row in solved]
    choices = [row for _, rows in studies for row in rows]
    solvers = Table("level", "calls", *SOLVERS, title="RMS from ten times as many calls")
    for level, calls in sorted({(row["level"], row["calls"]) for row in errors}):
        found = [
            [row["rms"] for row in errors
             if (row["level"], row["calls"], row["solver"]) == (level, calls, solver)]
            for solver in SOLVERS
        ]  # fmt: skip
        solvers.add_row(str(level), str(calls), *map(told, found))
    settings = Table("sampler", *MEASURES)
    for name in ROWS:
        some = [row for row in choices if row["row"] == name]
        settings.add_row(name, *(told([row[measure] for row in some]) for measure in MEASURES))
    console = Console(width=170)
    console.print(solvers, settings)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "sampler.json"
    about = {"date": str(date.today()), "quickstarts": len(options.folders)}
    path.write_text(json.dumps(about | {"solvers": errors, "settings": choices}, indent=1) + "\n")
    print(f"{path}: written.")


if __name__ == "__main__":
    main()
