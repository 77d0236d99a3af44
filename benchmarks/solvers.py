"""How far each solver ends from a run with ten times as many calls, at equal calls, at every level.

Of a trained HPDM: all levels below the one that is measured are sampled alike, so that the same
context and the same noise begin every trajectory. Guidance is that of the recipe.
"""

import argparse
import json
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from t2v.methods.hpdm.config import HPDMConfig
from t2v.methods.hpdm.sampling import generate
from t2v.recipe.recipe import method_of
from t2v.sampling.generate import sampling_world, with_sampling
from t2v.sampling.source import open_source
from t2v.sampling.subjects import Conditions, Request, read_prompts, subjects_of

ROOT = Path(__file__).parent.parent
SOLVERS = ("euler", "heun", "dpm++", "unipc")
CALLS = (6, 12, 24)
FINER, REFERENCE = 10, "unipc"


def measure(run: Path, prompts: Path, encoder: str, clips: int) -> list[dict]:
    """RMS, in [-1, 1], between each solver's clips and the reference's."""
    with sampling_world() as world, torch.no_grad():
        source = open_source(run, world)
        config = with_sampling(source.config, [])
        assert isinstance(config.method, HPDMConfig)
        request = Request(prompts=tuple(read_prompts(prompts)[:clips]), encoder=encoder)
        subjects = subjects_of(config, request)
        conditions = Conditions(config, request, source.text_encoder, world.device)
        conditions.read(subjects)
        condition, null = conditions.of(subjects)
        method = method_of(config)
        network = method.network()
        source.load(network, "ema")
        network.eval()

        def clips_at(level: int, solver: str, calls: int) -> torch.Tensor:
            steps = list(config.method.sampling.steps)
            # Heun's last step, to no noise, is one call.
            steps[level] = (calls + 1) // 2 if solver == "heun" else calls
            solvers = ["unipc"] * len(steps)
            solvers[level] = solver
            sampling = config.method.sampling.model_copy(
                update={"steps": steps, "solver": solvers, "churn": 0.0}
            )
            return generate(
                network,
                condition=condition,
                null=null,
                seeds=[subject.seed for subject in subjects],
                sampling=sampling,
                diffusion=config.method.diffusion,
            )[level]

        rows = []
        for level in range(config.method.pyramid.levels):
            exact = clips_at(level, REFERENCE, FINER * max(CALLS))
            for calls in CALLS:
                for solver in SOLVERS:
                    error = (clips_at(level, solver, calls) - exact).square().mean().sqrt()
                    row = {"level": level, "calls": calls, "solver": solver, "rms": float(error)}
                    rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run of HPDM, such as the quickstart's")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(options.run, options.prompts, options.encoder, options.clips)
    table = Table("level", "calls", *SOLVERS)
    for level in sorted({row["level"] for row in rows}):
        for calls in CALLS:
            some = [row for row in rows if (row["level"], row["calls"]) == (level, calls)]
            table.add_row(str(level), str(calls), *(f"{row['rms']:.4f}" for row in some))
    Console().print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "solvers.json"
    told = {"date": str(date.today()), "run": options.run.name, "clips": options.clips}
    path.write_text(json.dumps(told | {"rows": rows}, indent=1) + "\n")
    print(f"{path}: written.")


if __name__ == "__main__":
    main()
