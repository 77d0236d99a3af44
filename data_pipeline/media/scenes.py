"""Where scenes change, told while frames pass."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
from jaxtyping import UInt8
from scenedetect import ContentDetector, FrameTimecode
from scenedetect.scene_manager import compute_downscale_factor

from data_pipeline.media.container import Shot

MIN_SCENE_SECONDS = 0.5  # shorter ones are flashes


def mark_scenes(shots: Iterable[Shot], fps: float) -> Iterator[Shot]:
    """The same shots, the first of each scene as new; they are held back by the shortest scene."""
    shortest = max(1, round(MIN_SCENE_SECONDS * fps))
    detector, held, cuts, number = None, deque(), set(), -1
    for shot in shots:
        number += 1
        if detector is None or shot.is_new:
            detector = ContentDetector(min_scene_len=shortest)
        at = FrameTimecode(number, fps=fps)
        cuts |= {cut.frame_num for cut in detector.process_frame(at, _small(shot))}
        held.append((number, shot))
        if len(held) > shortest:
            yield _marked(held.popleft(), cuts)
    for late in held:
        yield _marked(late, cuts)


def _marked(held: tuple[int, Shot], cuts: set[int]) -> Shot:
    number, shot = held
    return replace(shot, is_new=True) if number in cuts else shot


def _small(shot: Shot) -> UInt8[np.ndarray, "height width 3"]:
    frame = shot.frame
    factor = compute_downscale_factor(max(frame.width, frame.height))
    width, height = (max(1, round(side / factor)) for side in (frame.width, frame.height))
    return frame.reformat(width=width, height=height, format="bgr24", threads=1).to_ndarray()
