"""Seams of tiled video: how much rougher it is where tiles end than elsewhere."""

import numpy as np
from jaxtyping import Float

from data_pipeline.pyramid import AXES, Clip

Energies = Float[np.ndarray, "6"]  # (at borders, elsewhere) along each axis
ROUNDING = 1 / 6  # energy of a difference of two values rounded to bytes
Borders = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def seam_energies(clip: Clip, borders: Borders) -> Energies:
    """Mean squared difference of neighbouring pixels (at borders, elsewhere) along each of
    (frames, height, width); -1 where an axis has no border."""
    energies = np.full((3, 2), -1.0)
    for axis in range(3):
        at = borders[axis]
        if not at:
            continue
        steps = np.diff(clip.astype(np.float32), axis=axis)
        rough = np.square(steps).mean(axis=tuple(other for other in range(4) if other != axis))
        is_border = np.isin(np.arange(1, clip.shape[axis]), at)
        if is_border.all():
            continue
        energies[axis] = rough[is_border].mean(), rough[~is_border].mean()
    return energies.ravel()


def seam_scores(
    energies: Float[np.ndarray, "clips 6"], counts: np.ndarray | None = None
) -> dict[str, float]:
    """Energy at borders over energy elsewhere, of all clips together: on each axis that has
    borders, and `seam`, their geometric mean. 1: no seam, as in a clip of one colour."""
    weights = np.ones(len(energies)) if counts is None else counts
    means = (weights @ energies / weights.sum()).reshape(3, 2)
    scores = {
        AXES[axis]: float((at + ROUNDING) / (elsewhere + ROUNDING))
        for axis, (at, elsewhere) in enumerate(means)
        if at >= 0
    }
    scores["seam"] = float(np.exp(np.mean(np.log(list(scores.values()))))) if scores else 1.0
    return scores
