"""From a protocol and a run, or a folder of clips, to scores with their uncertainty."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.errors import ConfigError, UserError
from data_pipeline.store import storage
from t2v.engine.world import World
from t2v.evaluation.clips import GeneratedClips, RealClips, is_samples, open_generated, open_real
from t2v.evaluation.collect import Task, collect
from t2v.evaluation.conditions import request_for
from t2v.evaluation.measures import (
    Measure,
    Seams,
    TextAgreement,
    Values,
    load_c3d,
    load_i3d,
)
from t2v.evaluation.protocol import Metric, Protocol, View, dump_protocol
from t2v.evaluation.results import RESULT, markdown, read_result, score
from t2v.evaluation.scores import (
    KernelDistance,
    frechet_distance,
    inception_score,
    interval,
    moments,
    split_inception_score,
)
from t2v.evaluation.seam import seam_scores
from t2v.sampling.generate import Means, Recipe, sample_recipe, sampling_world, with_sampling
from t2v.sampling.source import open_guide, open_source

PROTOCOL, TABLE = "protocol.yaml", "result.md"

# Metrics of the numbers that another one measures, too.
SEEN_BY: dict[Metric, Metric] = {"mmd": "fvd"}

Measures = dict[str, dict[str, Measure]]  # by view and metric


@dataclass(frozen=True)
class Job:
    """What is judged, where results and measured values go, and by which means."""

    target: Path
    out: Path
    cache: Path
    workers: int = 1
    encoder: str | None = None
    vae: str | None = None
    settings: tuple[str, ...] = ()
    means: Means = field(default_factory=Means)


def evaluate(protocol: Protocol, origin: str, job: Job) -> Path:
    """Sample what is missing if a run is given, measure and score; writes result.json, result.md
    and protocol.yaml with every digest that it was left without."""
    with sampling_world() as world:
        real = world.on_first(lambda: open_real(protocol, origin))
        # Before hours of measuring.
        world.on_first(lambda: make_folder(job.out))
        folder = job.target
        if not is_samples(folder):
            folder = job.out / "samples"
            sample_for(protocol, real, job, folder, world)
        generated = world.on_first(lambda: open_generated(folder, protocol))
        # Sampling may have allowed TF32; scores are compared across machines.
        torch.set_float32_matmul_precision("highest")
        with (
            torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False),
            # TorchScript would fuse from a network's third call on, and round otherwise.
            torch.jit.optimized_execution(False),
        ):
            measures = world.together(lambda: load_measures(protocol, generated, world.device))
            values = {
                name: {
                    view.name: collect(
                        Task(clips, view, protocol.codec, measures[view.name]),
                        job.cache,
                        world,
                        workers=job.workers,
                        title=f"{view.name}: {name} clips",
                    )
                    for view in protocol.views
                }
                for name, clips in (("real", real), ("generated", generated))
            }
        world.on_first(lambda: write_result(protocol, real, generated, measures, values, job.out))
    return job.out


def make_folder(out: Path) -> None:
    """Make the folder of a result; ConfigError where it would replace a file of somebody else."""
    out.mkdir(parents=True, exist_ok=True)
    found = [name for name in (RESULT, PROTOCOL, TABLE) if os.path.lexists(out / name)]
    if found:
        try:
            read_result(out)
        except UserError:
            raise ConfigError(
                f"{out / found[0]}: is there already and of no evaluation of ours; give --out "
                "another folder."
            ) from None


def sample_for(protocol: Protocol, real: RealClips, job: Job, folder: Path, world: World) -> None:
    """Sample a run's clips for a protocol; those that are there already are kept."""
    source = open_source(job.target, world)
    request = world.on_first(
        lambda: request_for(protocol, real.dataset, source.config.conditioning)
    )
    request = replace(request, encoder=job.encoder, vae=job.vae)
    config = with_sampling(source.config, (*job.settings, f"fps={protocol.fps}"))
    recipe = Recipe(source, config, request, open_guide(config, world))
    sample_recipe(recipe, folder, job.means, world)


def load_measures(protocol: Protocol, generated: GeneratedClips, device: torch.device) -> Measures:
    """What each view measures; networks are loaded once, and proven on each view's shape."""
    text = None
    if protocol.clip and any("text_score" in view.metrics for view in protocol.views):
        text = TextAgreement(protocol.clip, device)
    measures: Measures = {}
    for view in protocol.views:
        shape = (view.frames, *view.size[1:])
        found: dict[str, Measure] = {}
        if {"fvd", "mmd"} & set(view.metrics) and protocol.i3d:
            found["fvd"] = load_i3d(protocol.i3d, shape, device)
        if "inception_score" in view.metrics and protocol.c3d:
            found["inception_score"] = load_c3d(protocol.c3d, shape, device)
        if "text_score" in view.metrics and text:
            found["text_score"] = text
        if "seam" in view.metrics:
            found["seam"] = seams_of(generated, view)
        measures[view.name] = found
    return measures


def seams_of(generated: GeneratedClips, view: View) -> Seams:
    """The borders of the tiles that a view's clips were sampled in."""
    told = {json.dumps(record.get("outputs")) for record in generated.records}
    outputs = json.loads(told.pop())
    if told or not outputs:
        raise ConfigError(
            f"{generated.folder}: seam is wrong for view '{view.name}' because its clips do not "
            "all tell the same tiles; sample them by one `t2v sample`, or leave the metric out."
        )
    level = len(outputs) - 1 if view.level is None else view.level
    if level >= len(outputs) or list(view.size) != outputs[level]["size"] or view.stride != 1:
        raise ConfigError(
            f"views: seam is wrong for view '{view.name}' because it shows level {level} not as it "
            "was sampled; take its size and stride 1, or leave the metric out."
        )
    t, h, w = (tuple(places) for places in outputs[level]["borders"])
    if view.frames < view.size[0]:
        t = ()  # a window begins anywhere
    if not (t or h or w):
        raise ConfigError(
            f"views: seam is wrong for view '{view.name}' because level {level} has no tiles; "
            "leave the metric out."
        )
    return Seams((t, h, w))


def write_result(
    protocol: Protocol,
    real: RealClips,
    generated: GeneratedClips,
    measures: Measures,
    values: dict[str, dict[str, dict[str, Values]]],
    out: Path,
) -> None:
    """Score all views and write the files of a result."""
    pinned = pin(protocol, real, measures)
    views, caveats = {}, []
    for view in pinned.views:
        both = [values[name][view.name] for name in ("real", "generated")]
        views[view.name] = {
            metric: score_metric(
                metric,
                both[0][SEEN_BY.get(metric, metric)],
                both[1][SEEN_BY.get(metric, metric)],
                pinned,
            )
            for metric in view.metrics
        }
        for told in views[view.name].values():
            if "dims" in told and not told["full_rank"]:
                caveats.append(
                    f"{view.name}: the covariance has {told['dims']} dimensions and no full rank "
                    f"with {told['fewest_clips']} clips; the distance says little but of others "
                    "with as many."
                )
    if any("fvd" in view.metrics for view in pinned.views):
        caveats.append(
            "Fréchet distances fall as clips get more; these stand for "
            f"{len(generated)} generated and {len(real)} real ones only."
        )
    first = generated.records[0]
    result = {
        "format": 1,
        "protocol": pinned.name,
        "fingerprint": pinned.fingerprint,
        "real": {"dataset": real.dataset.path, "clips": len(real)},
        "generated": {
            "folder": str(generated.folder),
            "clips": len(generated),
            "checkpoint": first.get("checkpoint"),
            "step": first.get("step"),
            "settings": first.get("settings"),
        },
        "views": views,
        "caveats": caveats,
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "pinned": pinned.pinned(),
    }
    # First of all, for it tells that the others are ours.
    storage.write_atomic(str(out / RESULT), (json.dumps(result, indent=1) + "\n").encode())
    storage.write_atomic(str(out / PROTOCOL), dump_protocol(pinned).encode())
    storage.write_atomic(str(out / TABLE), markdown({"generated": result}).encode())


def pin(protocol: Protocol, real: RealClips, measures: Measures) -> Protocol:
    """The protocol with the digests of what was used."""
    info = real.dataset.info
    used = {"fingerprint": info.fingerprint, "split": info.notes.get("split")}
    changes: dict[str, Any] = {"real": protocol.real.model_copy(update=used)}
    # A network that no view asks for plays no part.
    changes |= dict.fromkeys(("i3d", "c3d", "clip"))
    for measure in (one for found in measures.values() for one in found.values()):
        for name in changes.keys() & measure.identity.keys():
            digest = {"sha256": measure.identity[name]}
            changes[name] = getattr(protocol, name).model_copy(update=digest)
    return protocol.model_copy(update=changes)


def score_metric(
    metric: Metric, real: Values, generated: Values, protocol: Protocol
) -> dict[str, Any]:
    """One score of a view, its interval, and what real clips reach where that means something."""
    clips, settings = len(generated), protocol.uncertainty

    def estimate(value: float, statistic: Callable[[np.ndarray], float]):
        return interval(
            statistic,
            clips,
            value=value,
            resamples=settings.resamples,
            seed=settings.seed,
            confidence=settings.confidence,
        )

    match metric:
        case "fvd":
            known, own = moments(real), moments(generated)
            fewest = min(known, own, key=lambda one: one.clips)
            return score(
                estimate(
                    frechet_distance(known, own),
                    lambda counts: frechet_distance(known, moments(generated, counts)),
                ),
                dims=len(own.mean),
                full_rank=known.is_full_rank and own.is_full_rank,
                fewest_clips=fewest.clips,
            )
        case "mmd":
            distance = KernelDistance(real, generated)
            return score(estimate(distance(), distance))
        case "inception_score":
            assert protocol.c3d is not None
            splits, seed = protocol.c3d.splits, settings.seed
            value, deviation = split_inception_score(generated, splits, seed)
            reached = split_inception_score(real, min(splits, len(real)), seed)[0]
            found = estimate(value, lambda counts: inception_score(generated, counts))
            return score(found, deviation_of_splits=deviation, real=reached)
        case "text_score":
            found = estimate(
                float(generated.mean()),
                lambda counts: float(counts @ generated[:, 0] / counts.sum()),
            )
            return score(found, real=float(real.mean()))
        case "seam":
            own_scores, known_scores = seam_scores(generated), seam_scores(real)
            found = estimate(
                own_scores.pop("seam"), lambda counts: seam_scores(generated, counts)["seam"]
            )
            return score(found, axes=own_scores, real=known_scores["seam"])
