"""Which sampler a trained HPDM wants: solvers by their error, and settings by what comes out.

    python -m benchmarks.sampler quickstart [quickstart-1 ...] [--rows "the paper's" ...]

Each argument is the folder of a finished `t2v quickstart`, of another seed each. What is done is
kept: started again, it goes on with what is missing. **Solvers**: how far each ends from a run
with ten times as many calls, at equal calls, at every level; levels below the one that is
measured are sampled alike, so that the same context and noise begin every trajectory. **Settings**:
clips of all prompts by rows that each change a sampler, read by the quickstart's pixel
reader, with the sampling FLOPs of one clip as `t2v plan` counts them. Intervals are 95 % of
Student's law over seeds.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.ablations import features, pictures_of, seam
from benchmarks.summary import Kept, print_rows
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
from t2v.sampling.generate import loaded, sampling_world, with_sampling
from t2v.sampling.source import open_source
from t2v.sampling.subjects import Conditions, Request, subjects_of

ROOT = Path(__file__).parent.parent
SOLVERS = ("euler", "heun", "dpm++", "unipc")
CALLS = (6, 12, 24)
FINER, REFERENCE, SOLVED_CLIPS = 10, "unipc", 8
# The paper's sampler at the steps that the quickstart once had.
PAPER: dict[str, Any] = {
    "steps": [24, 12],
    "solver": ["heun", "euler"],
    "guidance_scale": 2.0,
    "overlap": "hw",
    "context": {},
    "coarse_projection": False,
}
NOISED = {"context": {"quantile": 0.1, "noised": True}}
# What the rows say is good, together; with 16 and 8 steps it is the recipe's.
JOINED = PAPER | {"coarse_projection": True, "overlap": "", "guidance_scale": [2.0, 1.0]}
SECOND_ORDER = JOINED | NOISED | {"solver": "unipc", "guidance_scale": [3.0, 1.0]}
ROWS: dict[str, dict[str, Any]] = {
    "the paper's": PAPER,
    "  context at a quantile": PAPER | NOISED,
    "  coarse projection": PAPER | {"coarse_projection": True},
    "  unipc": PAPER | {"solver": "unipc"},
    "  no overlap": PAPER | {"overlap": ""},
    "  guidance at level 0 alone": PAPER | {"guidance_scale": [2.0, 1.0]},
    "joined": JOINED,
    "  20 and 10 steps": JOINED | {"steps": [20, 10]},
    "  16 and 8 steps": JOINED | {"steps": [16, 8]},
    "  12 and 6 steps": JOINED | {"steps": [12, 6]},
    "second order": SECOND_ORDER,
    "  context near zero": SECOND_ORDER | {"context": {}},
    "  no projection": SECOND_ORDER | {"coarse_projection": False},
    "  heun, euler": SECOND_ORDER | {"solver": ["heun", "euler"]},
    "  guidance at both levels": SECOND_ORDER | {"guidance_scale": 3.0},
    "  guidance in an interval": SECOND_ORDER | {"guidance_interval": [0.3, 10.0]},
    "  half the steps": SECOND_ORDER | {"steps": [12, 6]},
    "  a third of the steps": SECOND_ORDER | {"steps": [8, 4]},
    "  a quarter of the steps": SECOND_ORDER | {"steps": [6, 3]},
}
READ = ("colour", "shape", "shape 0", "direction", "one piece")
MEASURES = (*READ, "mismatch", "seam", "frechet", "mmd", "gflops")

Clips = Callable[[dict[str, Any]], list[Tensor]]


def study(folder: Path, rows: list[str], kept: Kept) -> None:
    """The rows of both tables that are missing of one quickstart."""
    seed = json.loads((folder / "quickstart.json").read_text())["seed"]
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
        network = loaded(source, config, world.device)
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

        steps, solved = settings["steps"], solver_rows(len(settings["steps"]))
        if not all(kept.has(seed=seed, row=row) for row in solved):
            errors = solver_errors(clips_of(subjects[:SOLVED_CLIPS]), steps)
            kept.add(*({"seed": seed} | error for error in errors))
        known = features(real_clips(config.method.pyramid.clip_size))
        for row in rows:
            if kept.has(seed=seed, row=row):
                continue
            levels = clips_of(subjects)(ROWS[row])
            with torch.enable_grad():  # which torch's counter of operations wants
                flops = sampling_flops(
                    blank, with_changes(ROWS[row]), config.method.diffusion, config.conditioning
                )
            measured = quality(levels, toys, known) | {
                "seam": seam(levels[-1], with_changes(ROWS[row]), config.method.pyramid),
                "gflops": sum(flops) / 1e9,
            }
            kept.add({"seed": seed, "row": row} | measured)
            print(kept.runs[-1], flush=True)


def solver_rows(levels: int) -> dict[str, tuple[int, int]]:
    """(level, calls) of each row of the table of solvers."""
    return {f"level {n}, {calls} calls": (n, calls) for n in range(levels) for calls in CALLS}


def solver_errors(clips: Clips, steps: list[int]) -> list[dict[str, Any]]:
    """RMS, in [-1, 1], between each solver's clips and the reference's."""

    def clips_at(level: int, solver: str, calls: int) -> Tensor:
        # Heun's last step, to no noise, is one call.
        own = (calls + 1) // 2 if solver == "heun" else calls
        counts = [own if n == level else count for n, count in enumerate(steps)]
        solvers = [solver if n == level else REFERENCE for n in range(len(steps))]
        return clips({"steps": counts, "solver": solvers, "churn": 0.0})[level]

    exact = [clips_at(level, REFERENCE, FINER * max(CALLS)) for level in range(len(steps))]
    return [
        {"row": row}
        | {
            solver: float((clips_at(level, solver, calls) - exact[level]).square().mean().sqrt())
            for solver in SOLVERS
        }
        for row, (level, calls) in solver_rows(len(steps)).items()
    ]


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
    coarse, fine = levels[-2:]
    readings, coarse_readings = (
        list(map(read_toy, pictures_of(clips))) for clips in (fine, coarse)
    )
    pairs = list(zip(readings, toys, strict=True))
    made = features(fine)
    growth = tuple(int(a // b) for a, b in zip(fine.shape[2:], coarse.shape[2:], strict=True))
    return {
        "colour": float(np.mean([reading.color == toy.color for reading, toy in pairs])),
        "shape": float(np.mean([reading.shape == toy.shape for reading, toy in pairs])),
        "shape 0": float(
            np.mean([r.shape == toy.shape for r, toy in zip(coarse_readings, toys, strict=True)])
        ),
        "direction": float(np.mean([reading.direction == toy.direction for reading, toy in pairs])),
        "one piece": float(np.mean([reading.whole_frames for reading in readings])),
        "mismatch": float((shrink(fine, growth) - coarse).square().mean().sqrt()),
        "frechet": frechet_distance(moments(known), moments(made)),
        "mmd": KernelDistance(known, made)(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="*", default=[Path("quickstart")])
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = Kept(options.out / "sampler.json", {"prompts": 80, "real_clips": 320})
    for folder in options.folders:
        study(folder, options.rows, kept)
    levels = max(int(run["row"][6]) + 1 for run in kept.runs if run["row"].startswith("level "))
    print("RMS from ten times as many calls")
    print_rows(kept.runs, solver_rows(levels), SOLVERS)
    print_rows(kept.runs, options.rows, MEASURES)


if __name__ == "__main__":
    main()
