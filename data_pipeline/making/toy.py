"""Small captioned media to rehearse with: one coloured shape, moving or still, on black."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image
from rich.progress import track

from data_pipeline.errors import ConfigError
from data_pipeline.media.codec import encode_clip
from data_pipeline.pyramid import Clip
from data_pipeline.store import storage

COLORS = {
    "red": (230, 30, 30),
    "green": (30, 200, 40),
    "blue": (40, 70, 240),
    "yellow": (240, 220, 30),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}


@dataclass(frozen=True)
class Toy:
    """One object; `direction` is None in a still image."""

    color: str
    shape: str
    direction: str | None

    @property
    def caption(self) -> str:
        """What a prompt says of it."""
        motion = f" moving {self.direction}" if self.direction else ""
        return f"a {self.color} {self.shape}{motion}"


@dataclass(frozen=True)
class Staging:
    """How large an object is and where it goes, in shares of the clip's height."""

    radius: float = 0.25
    travel: float = 0.36  # over the whole clip
    jitter: float = 0.07  # of the mid-clip place around the middle


STAGING = Staging()


def all_toys() -> list[Toy]:
    """The 80 moving objects, in a fixed order."""
    return [Toy(*parts) for parts in product(COLORS, SHAPES, DIRECTIONS)]


def shape_mask(
    shape: str,
    y: Float[np.ndarray, "*grid"],
    x: Float[np.ndarray, "*grid"],
) -> Float[np.ndarray, "*grid"]:
    """Signed distance-like value of a shape of radius 1 around the origin: negative inside."""
    match shape:
        case "circle":
            return np.hypot(y, x) - 1
        case "square":
            return np.maximum(abs(y), abs(x)) - 0.9
        case "triangle":
            return np.maximum(y - 0.85, 0.9 * abs(x) / 0.5 * 0.5 - 0.45 * (y + 1.0))
        case "cross":
            arm = np.minimum(
                np.maximum(abs(y) - 0.33, abs(x) - 1), np.maximum(abs(x) - 0.33, abs(y) - 1)
            )
            return arm
    raise ConfigError(f"shape: value {shape!r} is wrong because it is none of {SHAPES}.")


def render(
    toy: Toy,
    size: tuple[int, int, int],
    center: tuple[float, float] = (0.5, 0.5),
    staging: Staging = STAGING,
) -> Clip:
    """The object on black; `center` (y, x) in [0, 1] is where it is in mid-clip."""
    frames, height, width = size
    dy, dx = DIRECTIONS[toy.direction] if toy.direction else (0, 0)
    time = np.linspace(-0.5, 0.5, frames)[:, None, None] * staging.travel if frames > 1 else 0.0
    y = (np.arange(height)[:, None] + 0.5) / height - (center[0] + dy * time)
    x = (np.arange(width) + 0.5) / height - (center[1] * width / height + dx * time)
    y, x = np.broadcast_arrays(y / staging.radius, x / staging.radius)
    pixel = 1 / (staging.radius * height)
    coverage = np.clip(0.5 - shape_mask(toy.shape, y, x) / pixel, 0, 1)
    clip = coverage[..., None] * np.array(COLORS[toy.color])
    return np.round(np.broadcast_to(clip, (frames, height, width, 3))).astype(np.uint8)


def random_center(
    aspect: float, rng: np.random.Generator, staging: Staging = STAGING
) -> tuple[float, float]:
    """A mid-clip place near the middle, whole path in sight; `aspect` is width / height."""
    y, x = rng.uniform(-staging.jitter, staging.jitter, size=2)
    return 0.5 + y, 0.5 + x / aspect


def toy_clips(
    count: int,
    size: tuple[int, int, int],
    seed: int,
    moving: bool,
    staging: Staging = STAGING,
) -> Iterator[tuple[Toy, Clip]]:
    """Random places, every kind equally often."""
    rng = np.random.default_rng(seed)
    toys = all_toys()
    for number in range(count):
        toy = toys[number % len(toys)]
        if not moving:
            toy = Toy(toy.color, toy.shape, None)
        center = random_center(size[2] / size[1], rng, staging)
        yield toy, render(toy, size, center, staging)


def write_toy(
    out: str | Path,
    *,
    videos: int,
    images: int,
    size: tuple[int, int, int] = (16, 96, 128),
    fps: float = 8.0,
    seed: int = 0,
    staging: Staging = STAGING,
) -> None:
    """Raw media as a collector would have them: OUT/videos and OUT/images, each with its
    captions.jsonl."""
    out = Path(out)
    if min(videos, images, seed) < 0:
        raise ConfigError(f"{out}: numbers and seed of toys are wrong below 0; use 0 or more.")
    if not storage.is_empty(str(out)):
        raise ConfigError(f"{out}: is not empty; give a new folder.")
    for kind, count, suffix in (("videos", videos, "mp4"), ("images", images, "jpg")):
        folder = out / kind
        folder.mkdir(parents=True, exist_ok=True)
        frames = size[0] if kind == "videos" else 1
        clips = toy_clips(count, (frames, *size[1:]), seed, kind == "videos", staging)
        lines = []
        for number, (toy, clip) in enumerate(track(clips, f"toy {kind}", total=count)):
            file = folder / f"{number:06d}.{suffix}"
            if kind == "videos":
                file.write_bytes(encode_clip(clip, fps))
            else:
                Image.fromarray(clip[0]).save(file, quality=95)
            lines.append(json.dumps({"file": file.name, "caption": toy.caption}))
        (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
