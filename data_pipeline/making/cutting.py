"""Cutting long videos into clips: at a fixed length, or so that none spans a change of scene."""

import io
import logging
from collections.abc import Iterator
from typing import Literal

from scenedetect import ContentDetector, SceneManager
from scenedetect.backends.pyav import VideoStreamAv
from scenedetect.video_stream import VideoOpenFailure

from data_pipeline.errors import DataError

Cut = Literal["none", "length", "scenes"]

MIN_SCENE_SECONDS = 0.5  # shorter ones are flashes


def clip_starts(media: bytes, seconds: float, clip_seconds: float, cut: Cut) -> Iterator[float]:
    """When each clip of a video of so many seconds starts; what is left at an end is dropped."""
    slack = clip_seconds / 100  # durations are rounded
    scenes = find_scenes(media) if cut == "scenes" else [(0.0, seconds)]
    for start, end in scenes or [(0.0, seconds)]:
        for number in range(int((end - start + slack) / clip_seconds)):
            yield start + number * clip_seconds


def find_scenes(media: bytes) -> list[tuple[float, float]]:
    """(start, end) of each scene in seconds after the first frame; none: it has no cut."""
    logging.getLogger("pyscenedetect").setLevel(logging.ERROR)
    try:
        stream = VideoStreamAv(io.BytesIO(media))
    except (VideoOpenFailure, OSError) as error:
        raise DataError(f"cannot be searched for scenes ({error})") from None
    manager = SceneManager()
    shortest = max(1, round(MIN_SCENE_SECONDS * stream.frame_rate))
    manager.add_detector(ContentDetector(min_scene_len=shortest))
    manager.detect_scenes(stream)
    scenes = [(start.seconds, end.seconds) for start, end in manager.get_scene_list()]
    return [(start - scenes[0][0], end - scenes[0][0]) for start, end in scenes]
