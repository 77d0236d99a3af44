"""Frames that clips are made from: an image to be brought to life, a clip to be gone on from, or
a coarse one to be refined."""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from data_pipeline.errors import ConfigError, DataError, InputMissing
from data_pipeline.media.codec import decode_clip, decode_image
from data_pipeline.pyramid import Clip
from t2v.methods.method import Method

IMAGES = (".jpeg", ".jpg", ".png", ".webp")


@dataclass(frozen=True, eq=False)
class Given:
    """The frames that a clip is made from, and what they were read from."""

    file: str
    digest: str
    frames: Clip


def read_given(path: str, method: Method) -> Given:
    """An image or a video that a clip of the method's can be made from; ConfigError where not."""
    file = Path(path)
    if not file.is_file():
        raise InputMissing(f"--given {path}: no such file; give an image or a video.")
    media = file.read_bytes()
    try:
        is_image = file.suffix.lower() in IMAGES
        frames = decode_image(media)[None] if is_image else decode_clip(media)
    except DataError as error:
        raise ConfigError(
            f"--given {path}: is wrong because it {error}; give an image or a video."
        ) from None
    size = frames.shape[1:3]
    if problem := method.problem_with_given(len(frames)):
        many = "1 frame is" if len(frames) == 1 else f"{len(frames)} frames are"
        raise ConfigError(f"--given {path}: {many} wrong because {problem}.")
    wanted = method.given_sizes(len(frames))
    if size not in wanted:
        found, *asked = ("x".join(map(str, sides)) for sides in (size, *wanted))
        raise ConfigError(
            f"--given {path}: {found} is wrong because the checkpoint makes {' or '.join(asked)} "
            "(height x width); resize or crop it."
        )
    return Given(file.name, sha256(media).hexdigest(), frames)


def stack_given(
    given: list[Given], device: torch.device
) -> Float[Tensor, "clips channels frames height width"]:
    """Given frames as `Method.generate` takes them, in [-1, 1]."""
    frames = torch.from_numpy(np.stack([one.frames for one in given])).to(device)
    return rearrange(frames, "b t h w c -> b c t h w").float() / 127.5 - 1
