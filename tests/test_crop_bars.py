"""Black bars are cut off to the pixel, and clips without any stay as they are."""

import io
import json

import numpy as np
import pytest
from moving import FPS, HEIGHT, WIDTH, moving
from PIL import Image

from data_pipeline.making.build import build
from data_pipeline.making.samples import Filters
from data_pipeline.media.bars import Bars, media_bars
from data_pipeline.media.codec import decode_clip, decode_image, encode_clip, encode_image
from data_pipeline.media.measures import measure_media

BARS = Bars(12, 20, 0, 32)
INSIDE = (slice(None), slice(12, HEIGHT - 20), slice(0, WIDTH - 32))
SIZE = {"height": HEIGHT - 32, "width": WIDTH - 32}


@pytest.fixture
def clip() -> np.ndarray:
    """A clip with bars; the picture inside moves."""
    inside = moving(1, 2)
    drawn = np.zeros_like(inside)
    drawn[INSIDE] = inside[INSIDE]
    return drawn


def source(folder, media: dict[str, bytes]):
    folder.mkdir()
    for name, content in media.items():
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".json").write_text(json.dumps({"caption": name}))
    return folder


def test_what_is_built_is_what_lies_within_the_bars(clip, tmp_path):
    folder = source(tmp_path / "in", {"a.mp4": encode_clip(clip, FPS)})
    built = build(folder, tmp_path / "out", frames=8, **SIZE, crop_bars=True)
    record = built.read(0, 0)
    assert (record.metadata["original_height"], record.metadata["original_width"]) == (64, 128)
    error = decode_clip(record.media).astype(float) - clip[INSIDE][:8]
    assert np.abs(error).mean() < 3  # of two encodings
    assert np.abs(error[:, [0, -1]]).mean() < 8
    assert np.abs(error[:, :, [0, -1]]).mean() < 8


def test_images_lose_their_bars_too(clip, tmp_path):
    folder = source(tmp_path / "in", {"a.jpg": encode_image(clip[0])})
    built = build(folder, tmp_path / "out", frames=1, **SIZE, crop_bars=True)
    error = decode_image(built.read(0, 0).media).astype(float) - clip[INSIDE][0]
    assert np.abs(error).mean() < 3


def test_clips_without_bars_are_built_as_ever(tmp_path):
    folder = source(tmp_path / "in", {"a.mp4": encode_clip(moving(1, 2), FPS)})
    media = [
        build(folder, tmp_path / f"{crop}", frames=8, **SIZE, crop_bars=crop).read(0, 0).media
        for crop in (True, False)
    ]
    assert media[0] == media[1]


def test_filters_see_sizes_without_bars(clip, tmp_path):
    folder = source(
        tmp_path / "in",
        {"a.mp4": encode_clip(clip, FPS), "b.mp4": encode_clip(moving(1, 2), FPS)},
    )
    how = {"frames": 8, **SIZE, "filters": Filters(min_height=HEIGHT - 31)}
    built = build(folder, tmp_path / "out", **how, crop_bars=True)
    assert [built.read(0, row).caption for row in range(built.info.samples)] == ["b.mp4"]
    assert built.info.account.not_wanted == {"below min_height": 1}


def test_what_is_clear_is_shown_white_and_no_bar(clip):
    opaque = np.zeros(clip.shape[1:3], np.uint8)
    opaque[INSIDE[1:]] = 255
    first, *others = (Image.fromarray(np.dstack([picture, opaque])) for picture in clip[:4])
    gif = io.BytesIO()
    first.save(gif, "GIF", save_all=True, append_images=others, duration=100, disposal=2)
    assert media_bars(gif.getvalue(), "video") == Bars()
    assert measure_media(gif.getvalue(), "video").bars == Bars()


@pytest.mark.parametrize("frames", [1, 5, 16])
def test_bars_are_those_that_all_frames_have(clip, frames):
    clip = clip[:frames]
    assert media_bars(encode_clip(clip, FPS), "video") == BARS
    wide = clip.copy()
    wide[-1:] = moving(0, 0)[0]
    assert media_bars(encode_clip(wide, FPS), "video") == Bars()
