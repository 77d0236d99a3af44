"""Small media made after public bug reports, each with what is right for it in its README."""

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DataError, NotWanted
from data_pipeline.media.clips import probe, read_clip, read_clips
from tests.odd_media import corners_of, numbers_of

CASES = Path(__file__).resolve().parents[2] / "shared" / "cases" / "media"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason=f"no cases at {CASES}")
RED, GREEN, BLUE, WHITE = (220, 30, 30), (30, 220, 30), (30, 30, 220), (220, 220, 220)


@pytest.mark.parametrize(
    ("file", "corners"),
    [
        ("orient_identity.mp4", ((RED, GREEN), (BLUE, WHITE))),
        ("orient_hflip.mp4", ((GREEN, RED), (WHITE, BLUE))),
        ("orient_transpose.mp4", ((RED, BLUE), (GREEN, WHITE))),
    ],
)
def test_orientations(file, corners):
    media = (CASES / file).read_bytes()
    found = probe(media, "video")
    clip = read_clip(media, "video", (2, found.height, found.width)).clip
    assert abs(corners_of(clip[1]) - np.array(corners)).max() < 8


def test_films_beside_covers_and_in_fields():
    cover = read_clip((CASES / "cover_first.mp4").read_bytes(), "video", (30, 96, 160))
    assert numbers_of(cover.clip) == list(range(30))
    clip = read_clip((CASES / "interlaced_h264.mp4").read_bytes(), "video", (12, 96, 192)).clip
    lines = clip[1:].astype(int)
    assert abs(lines[:, 1:-1] - (lines[:, :-2] + lines[:, 2:]) / 2).mean() < 1


@pytest.mark.parametrize("file", ["alpha.mov", "rgba.png", "rgba.webp"])
def test_hidden_colours_stay_hidden(file):
    kind = "video" if file.endswith("mov") else "image"
    media = (CASES / file).read_bytes()
    found = probe(media, kind)
    picture = read_clip(media, kind, (1, found.height, found.width)).clip[0]
    assert (picture[:, 0] == 255).all()
    assert picture.min() == 0  # and the rest is seen


def test_deep_greys():
    picture = read_clip((CASES / "grey16.png").read_bytes(), "image", (1, 64, 64)).clip[0]
    assert picture[32, 8].tolist() == [64] * 3
    assert picture[32, 56].tolist() == [191] * 3


def test_rates_lengths_and_gaps():
    held = (CASES / "last_frame_held_10s.mp4").read_bytes()
    assert probe(held, "video").fps == 30
    assert numbers_of(read_clip(held, "video", (60, 96, 160), fps=30).clip) == list(range(60))
    jump = (CASES / "jump_of_100s.mp4").read_bytes()
    with pytest.raises(NotWanted, match="has a gap in time: 100 s"):
        read_clip(jump, "video", (80, 96, 160))
    live = probe((CASES / "live_jitter.webm").read_bytes(), "video")
    assert live.seconds == pytest.approx(3, abs=0.05)


def test_seconds_of_a_transport_stream():
    media = (CASES / "mpegts_gop48.ts").read_bytes()
    clips = [numbers_of(clip.clip) for _, clip in read_clips(media, (24, 96, 160), cut="length")]
    assert clips == [list(range(24 * k, 24 * k + 24)) for k in range(10)]


@pytest.mark.parametrize("file", ["ruined_vp9.webm", "ruined_hevc.mp4"])
def test_ruins_are_damaged(file):
    with pytest.raises(DataError) as error:
        read_clip((CASES / file).read_bytes(), "video", (40, 96, 160))
    assert not isinstance(error.value, NotWanted)
