"""Reading a generated toy clip back from its pixels: colour, shape, direction, one piece or not."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from scipy import ndimage

from data_pipeline.making.toy import COLORS, DIRECTIONS, SHAPES, shape_mask
from data_pipeline.pyramid import Clip

BRIGHT = 90  # of 255: the object is what is brighter
WHOLE = 0.8  # share of the object's pixels that one connected part must hold
TEMPLATE = 24

Mask = Bool[np.ndarray, "height width"]


@dataclass(frozen=True)
class ToyReading:
    """What a clip shows; None where there is no object to read."""

    color: str | None
    shape: str | None
    direction: str | None
    whole_frames: float


def read_toy(clip: Clip) -> ToyReading:
    """Colour and shape by vote over frames, direction of the centre's path, share of frames in
    which the largest connected part holds at least 80 % of the object's pixels."""
    bright = clip.max(axis=3) > BRIGHT
    seen = [frame for frame in range(len(clip)) if bright[frame].sum() >= 3]
    if not seen:
        return ToyReading(None, None, None, 0.0)
    parts = {frame: _largest(bright[frame]) for frame in seen}
    whole = sum(part.sum() / bright[frame].sum() >= WHOLE for frame, part in parts.items())
    return ToyReading(
        color=_color(clip[bright]),
        shape=_vote([_shape(part) for part in parts.values()]),
        direction=_direction(bright, seen),
        whole_frames=whole / len(clip),
    )


def _color(pixels: np.ndarray) -> str:
    """The palette colour nearest to the object's mean, brightness apart."""
    mean = pixels.mean(axis=0)
    palette = {name: np.array(rgb) / np.linalg.norm(rgb) for name, rgb in COLORS.items()}
    return max(palette, key=lambda name: float(palette[name] @ mean))


def _direction(bright: Bool[np.ndarray, "frames height width"], seen: list[int]) -> str:
    """The axis direction closest to the centre's straight-line path over time."""
    centers = np.array([ndimage.center_of_mass(bright[frame]) for frame in seen])
    time = np.array(seen) - np.mean(seen)
    path = time @ centers
    return max(DIRECTIONS, key=lambda name: float(np.dot(DIRECTIONS[name], path)))


def _largest(mask: Mask) -> Mask:
    """The largest connected part of an object."""
    labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    return labels == np.bincount(labels.ravel())[1:].argmax() + 1


def _shape(largest: Mask) -> str:
    """The template that overlaps most with the object, its bounding box stretched onto theirs."""
    stretched, grid = _stretched(largest), np.linspace(-1.2, 1.2, 8 * TEMPLATE)
    overlap = {}
    for shape in SHAPES:
        template = _stretched(shape_mask(shape, grid[:, None], grid[None, :]) < 0)
        overlap[shape] = (stretched & template).sum() / (stretched | template).sum()
    return max(overlap, key=overlap.__getitem__)


def _stretched(mask: Mask) -> Bool[np.ndarray, "template template"]:
    """What is in the bounding box of a mask, at one size."""
    box = mask[ndimage.find_objects(mask.astype(int))[0]]
    rows = (np.arange(TEMPLATE) + 0.5) / TEMPLATE
    return box[np.ix_((rows * box.shape[0]).astype(int), (rows * box.shape[1]).astype(int))]


def _vote(values: list[str]) -> str:
    return max(dict.fromkeys(values), key=values.count)  # of equals, the first
