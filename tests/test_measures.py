"""What is measured of clips is what was drawn in them."""

import cv2
import numpy as np
import pytest
from moving import FPS, FRAMES, HEIGHT, WIDTH, moving

from data_pipeline.errors import DataError
from data_pipeline.media.bars import Bars, find_bars
from data_pipeline.media.codec import encode_clip, encode_image
from data_pipeline.media.measures import LOOKS, measure_media


def measured(clip: np.ndarray):
    return measure_media(encode_clip(clip, FPS), "video")


@pytest.mark.parametrize(("down", "right"), [(0, 2), (3, 0), (3, 4), (0, 8)])
def test_motion_is_by_how_much_pixels_move(down, right):
    expected = 100 * np.hypot(down, right) / HEIGHT * FPS
    # The flow of what comes in at the edges is a guess.
    assert measured(moving(down, right)).motion == pytest.approx(expected, rel=0.15)


def test_motion_is_the_same_at_any_size_and_rate():
    clip = moving(0, 4)
    large = np.stack([cv2.resize(picture, (2 * WIDTH, 2 * HEIGHT)) for picture in clip])
    slow = measure_media(encode_clip(clip, FPS / 2), "video").motion
    assert measured(large).motion == pytest.approx(measured(clip).motion, rel=0.1)
    assert 2 * slow == pytest.approx(measured(clip).motion, rel=1e-2)


def test_shares_of_frozen_and_black_frames_are_counted():
    clip = moving(0, 3)
    assert (measured(clip).frozen, measured(clip).black) == (0, 0)
    clip[FRAMES // 2 :] = clip[FRAMES // 2 - 1]
    half = measured(clip)
    assert (half.frozen, half.black) == (0.5, 0)
    clip[: FRAMES // 4] = 0
    assert measured(clip).black == 0.25
    still = measured(np.repeat(clip[-1:], FRAMES, 0))
    assert (still.motion, still.frozen) == (0, (FRAMES - 1) / FRAMES)


@pytest.mark.parametrize("level", [0, 64, 128, 255])
def test_brightness_is_the_level_that_was_drawn(level):
    clip = np.full((4, HEIGHT, WIDTH, 3), level, np.uint8)
    assert measured(clip).brightness == pytest.approx(level / 255, abs=0.01)


@pytest.mark.parametrize(
    "bars", [Bars(), Bars(12, 12), Bars(0, 0, 31, 17), Bars(13, 7, 21, 9), Bars(top=1)]
)
def test_bars_are_found_to_the_pixel(bars):
    clip = moving(1, 1)
    drawn = np.zeros_like(clip)
    inside = (
        slice(None),
        slice(bars.top, HEIGHT - bars.bottom),
        slice(bars.left, WIDTH - bars.right),
    )
    drawn[inside] = clip[inside]
    assert measured(drawn).bars == bars
    drawn[:4] = 0  # black frames say nothing of bars
    assert measured(drawn).bars == bars


def test_darkness_that_comes_by_and_by_is_no_bar():
    night = np.broadcast_to(np.linspace(0, 200, 100)[:, None], (100, 80)).astype(np.uint8)
    assert find_bars(night) == Bars()
    assert find_bars(np.zeros((40, 40), np.uint8)) == Bars()


def test_blur_lowers_sharpness():
    clip = moving(0, 1)
    sharp = [
        measured(np.stack([cv2.GaussianBlur(picture, (0, 0), sigma) for picture in clip])).sharpness
        for sigma in (0.1, 1.5, 3)
    ]
    assert sharp[0] > 1.3 * sharp[1] > 1.3 * 1.3 * sharp[2]


def test_an_image_is_a_clip_without_time():
    clip = moving(0, 0)
    clip[:, :10] = 0
    image, video = measure_media(encode_image(clip[0]), "image"), measured(clip)
    assert (image.motion, image.frozen) == (None, None)
    assert image.bars == video.bars == Bars(top=10)
    assert image.brightness == pytest.approx(video.brightness, abs=0.01)
    assert image.hash[:8] * LOOKS == image.hash


def test_what_cannot_be_read_to_its_end_has_no_measures():
    media = encode_clip(moving(0, 1), FPS)
    with pytest.raises(DataError):
        measure_media(media[: len(media) // 2], "video")
    with pytest.raises(DataError):
        measure_media(b"nonsense", "image")
