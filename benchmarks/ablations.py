"""The paper's switches and ours, trained at equal steps on clips whose fine levels have something
to know: two textured objects that pass before each other on a slope of light.

Every row is one training from scratch of a tiny two-level model, unconditional, on one thread. What
is done is kept: started again, it goes on with what is missing. Intervals are 95 % of Student's law
over seeds; noise, data and evaluation of a seed are the same in every row.
"""

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.summary import Kept, print_rows
from data_pipeline.feeding.config import NoConditioning
from data_pipeline.feeding.loader import Batch
from data_pipeline.making.toy import SHAPES, shape_mask
from data_pipeline.pyramid import Clip, Pyramid, cut_patches, draw_offsets
from t2v.engine.optimizer import (
    NEW,
    Groups,
    OptimizerConfig,
    build_optimizer,
    parameter_groups,
    set_rates,
    start_moments,
)
from t2v.engine.place import Place
from t2v.evaluation.scores import KernelDistance, frechet_distance, moments
from t2v.evaluation.seam import seam_energies, seam_scores
from t2v.methods.hpdm.config import HPDMConfig
from t2v.methods.hpdm.cost import sampling_flops
from t2v.methods.hpdm.method import HPDMMethod
from t2v.methods.hpdm.network import HPDM
from t2v.methods.hpdm.sampling import generate
from t2v.methods.hpdm.settings import HPDMSamplingConfig, level_tilings
from t2v.methods.hpdm.tiled_denoiser import shrink
from t2v.methods.hpdm.tiling import tile_borders
from t2v.network.conditioning import Condition
from t2v.train.ema import Ema, half_life, power_function
from t2v.train.part_weights import PartWeights
from t2v.train.schedule import learning_rate

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
STEPS, BATCH, HELD_OUT, SAMPLED = 600, 16, 48, 48
PATCH, CLIP = (2, 8, 8), (4, 16, 16)
LOW_NOISE = {"coarse_noise": "low", "coarse_noise_share": 0.75}
AT_QUANTILE = {"context": {"quantile": 0.1, "noised": True}}
MIN_SNR = {"diffusion": {"weighting": "min_snr"}}
# Changes by section of the method, or of training: the optimizer, weights of levels, and the
# relative length of a power-function average in the place of the exponential one.
TRAINING = ("optimizer", "loss_weights", "ema_length")
ROWS: dict[str, dict[str, Any]] = {
    "the paper": {},
    "shallow fusion": {"model": {"fusion": "shallow"}},
    "detached context": {"model": {"detach_context": True}},
    "no adaptive computation": {"model": {"levels_per_block": [2, 2, 2]}},
    "no coordinates": {"model": {"coordinates": False}},
    "context at a quantile": {"sampling": AT_QUANTILE},
    "coarse noise low": {"diffusion": LOW_NOISE, "sampling": AT_QUANTILE},
    "coarse pixels": {"model": {"coarse_pixels": True}},
    "coarse projection": {"sampling": {"coarse_projection": True}},
    "all four": {
        "model": {"coarse_pixels": True},
        "diffusion": LOW_NOISE,
        "sampling": AT_QUANTILE | {"coarse_projection": True},
    },
    "unipc": {"sampling": {"solver": "unipc"}},
    "weights follow": {"diffusion": {"weight_follows_scale": 1.0}},
    "all follow": {
        "diffusion": dict.fromkeys(
            ("noise_follows_scale", "weight_follows_scale", "range_follows_scale"), 1.0
        )
    },
    "min-SNR": MIN_SNR,
    "sigmoid": {"diffusion": {"weighting": "sigmoid"}},
    "coarse level 4": {"loss_weights": [4.0, 1.0]},
    "uncertainty": {"loss_weights": "uncertainty"},
    "min-SNR, fine level 4": MIN_SNR | {"loss_weights": [1.0, 4.0]},
    "min-SNR, fine level 16": MIN_SNR | {"loss_weights": [1.0, 16.0]},
    "min-SNR, uncertainty": MIN_SNR | {"loss_weights": "uncertainty"},
    "average of 0.03": {"ema_length": 0.03},
    "average of 0.10": {"ema_length": 0.10},
    "average of 0.20": {"ema_length": 0.20},
    "Muon": {"optimizer": {"name": "muon"}},
    "LAMB": {"optimizer": {"name": "lamb", "learning_rate": 0.02}},
    "LAMB with a floor": {"optimizer": {"name": "lamb", "learning_rate": 0.02, "trust_floor": 1.0}},
}
MEASURES = ("loss 0", "loss 1", "mismatch", "seam", "frechet 1", "mmd 0", "mmd 1", "gflop")


def scene(rng: np.random.Generator) -> Clip:
    """Two striped objects, one behind the other, that cross a slope of light."""
    frames, height, width = CLIP
    y, x = np.mgrid[:height, :width] / height + 0.5 / height
    time_ = np.linspace(-0.5, 0.5, frames)
    slope = rng.uniform(-60, 60, 2)
    light = 90 + slope[0] * (y - 0.5) + slope[1] * (x - 0.5)
    clip = np.repeat(light[None, :, :, None], frames, axis=0).repeat(3, axis=3)
    for _ in range(2):
        shape, colour = SHAPES[rng.integers(4)], rng.uniform(60, 255, 3)
        place, way = rng.uniform(0.3, 0.7, 2), rng.uniform(-0.4, 0.4, 2)
        radius, turn, dark = rng.uniform(0.2, 0.3), rng.uniform(0, math.pi), rng.uniform(0.2, 0.6)
        for number, moment in enumerate(time_):
            dy, dx = (
                (a - c - w * moment) / radius for a, c, w in zip((y, x), place, way, strict=True)
            )
            cover = np.clip(0.5 - shape_mask(shape, dy, dx) * radius * height, 0, 1)[..., None]
            stripes = np.sin(7 * (dy * math.cos(turn) + dx * math.sin(turn))) > 0
            painted = colour * np.where(stripes, 1.0, dark)[..., None]
            clip[number] = clip[number] * (1 - cover) + painted * cover
    return np.clip(clip, 0, 255).round().astype(np.uint8)


def batch_of(numbers: range, pyramid: Pyramid, seed: int) -> Batch:
    """Samples of an endless dataset: clip and windows are functions of (seed, number)."""
    patches, offsets = [], []
    for number in numbers:
        rng = np.random.default_rng([seed, number])
        clip, places = scene(rng), draw_offsets(pyramid, rng)
        patches.append(cut_patches(clip, pyramid, places))
        offsets.append(places)
    count = len(numbers)
    return Batch(
        numbers=torch.tensor(list(numbers)),
        ids=[str(number) for number in numbers],
        patches=torch.from_numpy(np.stack(patches)),
        offsets=torch.from_numpy(np.stack(offsets)),
        latents=None,
        latent_frames=None,
        fps=torch.full((count,), 8.0),
        original_size=torch.full((count, 2), 16.0),
        text_tokens=None,
        text_mask=None,
        label=None,
        quarantined=[],
    )


def method_with(changes: dict[str, Any]) -> HPDMMethod:
    """The tiny method with sections changed."""
    content: dict[str, Any] = {
        "kind": "hpdm",
        "pyramid": {"levels": 2, "patch_size": PATCH, "clip_size": CLIP},
        "model": {
            "token_size": [1, 2, 2],
            "token_dim": 48,
            "num_latents": 16,
            "latent_dim": 48,
            "latent_layers": 1,
            "token_head_dim": 16,
            "latent_head_dim": 16,
            "levels_per_block": [1, 2, 2],
            "conditioning_dim": 48,
            "self_conditioning_rate": 0.0,
        },
        "diffusion": {"input_scale": 1.0, "input_scale_growth": 2.0, "sigma_mean": -0.4},
        "sampling": {"steps": [16, 8], "overlap": "hw", "tile_batch": 64},
    }
    for section, change in changes.items():
        if section not in TRAINING:
            old = content.get(section)
            content[section] = old | change if isinstance(old, dict) else change
    return HPDMMethod(HPDMConfig.model_validate(content), NoConditioning(kind="none"))


def trained(method: HPDMMethod, changes: dict[str, Any], seed: int, steps: int = STEPS) -> HPDM:
    """The averaged network after a training with a row's changes."""
    network = method.network()
    network.init_weights(seed)
    parameters = dict(network.named_parameters())
    settings = OptimizerConfig.model_validate(
        {"name": "adamw", "learning_rate": 0.002, "warmup_steps": 50} | changes.get("optimizer", {})
    )
    places = {name: Place(tuple(part.shape), 0) for name, part in parameters.items()}
    groups = parameter_groups(settings, Groups(method.new_parameters), parameters, places)
    optimizer = build_optimizer(settings, groups, lambda values: values)
    start_moments(optimizer, parameters.values())
    length = changes.get("ema_length")
    average = Ema(parameters, power_function(length) if length else half_life(40.0))
    weights = PartWeights(changes.get("loss_weights"), len(method.parts))
    for step in range(steps):
        numbers = range(step * BATCH, (step + 1) * BATCH)
        batch = replace(batch_of(numbers, method.config.pyramid, seed), step=step)
        losses = method.losses(network, batch, seed=seed, device=CPU)
        (weights.on(CPU) * losses).sum().backward()
        weights.update(losses.detach(), step + 1)
        torch.nn.utils.clip_grad_norm_(network.parameters(), settings.max_grad_norm)
        rate = learning_rate(settings, step, steps)
        set_rates(optimizer, {"base": rate, NEW: rate})
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(step + 1)
    network.load_state_dict(average.averages)
    return network


@torch.no_grad()
def held_out_losses(method: HPDMMethod, network: Any, seed: int) -> dict[str, float]:
    """Of both levels. The loss weighs as the row trains, so rows of other weights have none to
    compare."""
    batch = batch_of(range(10**6, 10**6 + HELD_OUT), method.config.pyramid, seed)
    losses = [
        method.held_out(network, batch, turns=[turn] * HELD_OUT, bins=4, seed=seed, device=CPU)[0]
        for turn in range(4)
    ]
    return {f"loss {level}": float(torch.stack(losses)[:, :, level].mean()) for level in range(2)}


@torch.no_grad()
def sampled_quality(
    method: HPDMMethod, network: Any, seed: int, guide: HPDM | None = None
) -> dict[str, float]:
    """What sampled clips miss of each other and of real ones."""
    pyramid, sampling = method.config.pyramid, method.config.sampling
    told = Condition(torch.full((SAMPLED,), 8.0), torch.full((SAMPLED, 2), 16.0))
    levels = generate(
        network,
        condition=told,
        null=told,
        seeds=list(range(SAMPLED)),
        sampling=sampling,
        diffusion=method.config.diffusion,
        guide=guide,
    )
    real = np.stack(
        [scene(np.random.default_rng([seed, 2 * 10**6 + n])) for n in range(4 * SAMPLED)]
    )
    fine = torch.from_numpy(real).movedim(-1, 1).float() / 127.5 - 1
    known = [shrink(fine, pyramid.growth), fine]
    found: dict[str, float] = {}
    apart = shrink(levels[1], pyramid.growth) - levels[0]
    found["mismatch"] = float(apart.square().mean().sqrt())
    for level in range(2):
        pair = (features(known[level]), features(levels[level]))
        found[f"mmd {level}"] = KernelDistance(*pair)()
    found["frechet 1"] = frechet_distance(*(moments(one) for one in pair))
    found["seam"] = seam(levels[1], sampling, pyramid)
    return found


def seam(clips: torch.Tensor, sampling: HPDMSamplingConfig, pyramid: Pyramid) -> float:
    """Roughness of the finest clips where their tiles end, over that elsewhere."""
    borders = tile_borders(level_tilings(sampling, pyramid, pyramid.levels - 1))
    energies = [seam_energies(clip, borders) for clip in pictures_of(clips)]
    return seam_scores(np.stack(energies))["seam"]


def pictures_of(clips: torch.Tensor) -> np.ndarray:
    """Clips in [-1, 1] as bytes, channels last."""
    return ((clips + 1) * 127.5).round().clamp(0, 255).byte().movedim(1, -1).numpy()


def gflop(method: HPDMMethod) -> float:
    """Billions of operations that sampling a clip takes."""
    with torch.device("meta"):
        network = method.network()
    config = method.config
    parts = sampling_flops(network, config.sampling, config.diffusion, method.conditioning)
    return sum(parts) / 1e9


def features(clips: torch.Tensor) -> np.ndarray:
    """Fixed features: mean, contrast, edges along each axis and their spread, by quarter of the
    picture."""
    parts = []
    for rows in clips.chunk(2, dim=3):
        for block in rows.chunk(2, dim=4):
            values = [block.mean((2, 3, 4)), block.std((2, 3, 4))]
            for axis in (2, 3, 4):
                edges = block.diff(dim=axis).abs()
                values += [edges.mean((2, 3, 4)), edges.std((2, 3, 4))]
            parts.append(torch.cat(values, dim=1))
    return torch.cat(parts, dim=1).double().numpy()


def runs(rows: list[str], seeds: int) -> Iterator[tuple[str, int]]:
    """Seed by seed, so that an interrupted benchmark has whole comparisons."""
    yield from ((row, seed) for seed in range(seeds) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = {"steps": STEPS, "batch": BATCH, "clip": CLIP, "held_out": HELD_OUT, "sampled": SAMPLED}
    kept = Kept(options.out / "ablations.json", size)
    for row, seed in runs(options.rows, options.seeds):
        if kept.has(row=row, seed=seed):
            continue
        started = time.process_time()
        method = method_with(ROWS[row])
        network = trained(method, ROWS[row], seed)
        found = held_out_losses(method, network, seed) | sampled_quality(method, network, seed)
        found["gflop"] = gflop(method)
        spent = {"cpu_seconds": round(time.process_time() - started, 1)}
        kept.add({"row": row, "seed": seed} | found | spent)
        print(row, seed, {name: round(value, 4) for name, value in found.items()}, flush=True)
    print_rows(kept.runs, options.rows, MEASURES)


if __name__ == "__main__":
    main()
