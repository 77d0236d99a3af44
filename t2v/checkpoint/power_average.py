"""Averages of weights whose length is chosen after training (edm2, arXiv 2312.02696, section 3).

A power-function average after t updates weighs the weights after update u by
`(gamma + 1) u^gamma / t^(gamma + 1)`. Its relative length is that profile's standard deviation over
t. Training keeps two of them; what its checkpoints hold of these adds up to nearly any other.
"""

from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from t2v.checkpoint.compatibility import average_prefix
from t2v.checkpoint.finding import list_checkpoints
from t2v.checkpoint.manifest import Manifest, read_manifest
from t2v.checkpoint.proving import verify_checkpoint
from t2v.checkpoint.tensor_files import TensorIndex, read_index, read_whole

LONGEST = 0.28  # a plain mean of all weights has 1 / sqrt(12) = 0.289
Profile = tuple[float, float]  # (updates, gamma)


def power_of(length: float) -> float:
    """gamma of a relative length: the largest root of
    `length^2 (gamma + 2)^2 (gamma + 3) = gamma + 1`."""
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def overlap(one: Profile, other: Profile) -> float:
    """Integral over updates of the product of two profiles."""
    (t_a, a), (t_b, b) = one, other
    least = min(t_a, t_b)
    shares = (least / t_a) ** (a + 1) * (least / t_b) ** (b + 1)
    return (a + 1) * (b + 1) / (a + b + 1) * shares / least


def shares_of(stored: list[Profile], wanted: Profile) -> tuple[list[float], float]:
    """(share of each stored average, relative error of the profile that these add up to), by least
    squares (edm2, appendix C), where shares add up to 1: weights that stand still are their own
    average."""
    count = len(stored)
    system, right = np.ones((count + 1, count + 1)), np.ones(count + 1)
    system[:count, :count] = [[overlap(one, other) for other in stored] for one in stored]
    system[count, count] = 0.0
    right[:count] = [overlap(one, wanted) for one in stored]
    found = np.linalg.lstsq(system, right, rcond=None)[0][:count]
    own = overlap(wanted, wanted)
    missed = found @ system[:count, :count] @ found - 2 * found @ right[:count] + own
    return found.tolist(), sqrt(max(missed, 0.0) / own)


@dataclass(frozen=True)
class Stored:
    """An average that a checkpoint holds: its profile, and where its tensors are."""

    profile: Profile
    folder: Path
    prefix: str


@dataclass(frozen=True)
class PowerAverage:
    """Stored averages with a share of each; `error` is relative, of their profile."""

    parts: list[tuple[float, Stored]]
    error: float

    def read(self, name: str) -> Tensor:
        """A parameter's average, all of it, on the CPU."""
        total = torch.zeros((), dtype=torch.float64)
        for (share, stored), index in zip(self.parts, self._indexes, strict=True):
            total = total + share * read_whole(stored.folder, stored.prefix + name, index)
        return total.float()

    @cached_property
    def _indexes(self) -> list[TensorIndex]:
        """Where each part's tensors are, and none of the checkpoint's others."""
        found = []
        for _, stored in self.parts:
            whole = read_index(stored.folder).tensors.items()
            own = {name: entry for name, entry in whole if name.startswith(stored.prefix)}
            found.append(TensorIndex(tensors=own))
        return found


def power_average(checkpoint: Path, manifest: Manifest, length: float) -> PowerAverage:
    """The average of a relative length as of a proved checkpoint, out of those that it and its
    run's earlier ones hold, which are proved here; ConfigError where there are none."""
    if not 0 < length <= LONGEST:
        raise ConfigError(
            f"--ema-length: {length:g} is wrong because it is a share of training, and at most "
            f"{LONGEST:g}, where all weights count about alike; give one such as 0.1."
        )
    stored = stored_averages(checkpoint, manifest)
    if not stored:
        raise ConfigError(
            f"--ema-length: {length:g} is wrong because {checkpoint} holds no averages to make it "
            "of; train with ema_lengths: [0.05, 0.1], or leave it out."
        )
    wanted = (manifest.updates, power_of(length))
    stored = [one for one in stored if one.profile == wanted] or stored
    shares, error = shares_of([one.profile for one in stored], wanted)
    for folder in {one.folder for one in stored} - {checkpoint}:
        verify_checkpoint(folder)
    return PowerAverage(list(zip(shares, stored, strict=True)), error)


def stored_averages(checkpoint: Path, manifest: Manifest) -> list[Stored]:
    """What a checkpoint and the earlier ones beside it hold, of the same run."""
    folders = [info.folder for info in list_checkpoints(checkpoint.parent) if not info.problem]
    manifests = {folder: read_manifest(folder) for folder in folders} | {checkpoint: manifest}
    return [
        Stored((one.updates, power_of(length)), folder, average_prefix(length))
        for folder, one in manifests.items()
        if one.step <= manifest.step
        and one.updates
        and one.model_signature == manifest.model_signature
        for length in one.config.get("ema_lengths") or []
    ]
