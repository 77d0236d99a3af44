"""Damage of videos is found, sound ones pass, and FFmpeg keeps silent."""

import hashlib
import random
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.damage import (
    CODECS,
    cut,
    drop,
    encode,
    film,
    is_caught,
    is_visible,
    luma_of,
    overwrite,
    zero,
)
from data_pipeline.errors import DataError, NotWanted
from data_pipeline.media.clips import read_clips
from data_pipeline.media.codec import encode_clip
from data_pipeline.media.codec_headers import Bits, allows_gaps, holds_zeros, is_wavefront

# Of files that show eight bytes overwritten, this share is refused at least; docs/data.md has the
# table of many files. Encoders do not always write the same, so there is room.
LEAST = {
    "H.264, mp4": 0.3,
    "HEVC with wavefronts, mp4": 0.4,
    "VP8, WebM": 0.4,
    "VP9, WebM": 0.7,
    "AV1, mp4": 0.6,
    "MPEG-4, AVI": 0.7,
    "MPEG-2, MPEG-TS": 0.7,
}


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return film(frames=12, width=160)


@pytest.mark.parametrize("name", list(LEAST))
def test_bytes_that_were_overwritten_are_noticed(name, pictures):
    media = encode(pictures, *CODECS[name])
    assert not is_caught(media)
    sound, rng = luma_of(media), random.Random(name)
    spoilt = [
        spoil for spoil in (overwrite(media, rng) for _ in range(8)) if is_visible(spoil, sound)
    ]
    assert sum(map(is_caught, spoilt)) >= LEAST[name] * len(spoilt)


@pytest.mark.parametrize("name", list(CODECS))
def test_a_file_whose_end_is_cut_off_is_damaged_and_its_beginning_of_use(name, pictures):
    media = encode(pictures, *CODECS[name])
    spoilt = cut(media, random.Random(1))
    clips, error = [], None
    try:
        clips += [clip for _, clip in read_clips(spoilt, (2, 36, 64), cut="length")]
    except DataError as caught:
        error = caught
    assert error is not None or len(clips) < 8
    assert not isinstance(error, NotWanted)


def test_a_missing_frame_that_others_refer_to_is_noticed(pictures):
    media = encode(pictures, "mp4", "libx264", "yuv420p", {"bf": "0"})
    assert is_caught(drop(media, random.Random(0)))
    assert not is_caught(media)


def test_what_was_before_the_damage_is_handed_out(pictures):
    media = encode(pictures, *CODECS["VP9, WebM"])
    at, clips, error = len(media) * 7 // 10, [], None
    spoilt = media[:at] + random.Random(0).randbytes(64) + media[at + 64 :]
    try:
        clips += (clip for _, clip in read_clips(spoilt, (2, 36, 64), cut="length"))
    except DataError as caught:
        error = caught
    assert error
    assert 2 <= len(clips) < 8


@pytest.mark.parametrize("name", ["H.264, mp4", "H.264, Matroska", "HEVC without, mp4"])
def test_a_block_of_zeros_is_noticed(name, pictures):
    media, rng = encode(pictures, *CODECS[name]), random.Random(0)
    assert all(is_caught(zero(media, rng)) for _ in range(6))
    assert not holds_zeros(b"\0\0\0\4\1\0\0\0\0\0\0\2\0\1", 4)
    assert holds_zeros(b"\0\5\1\0\0\0\1", 2)
    assert not holds_zeros(b"\0\5", 2)


def test_headers_are_read_bit_by_bit():
    bits = Bits(bytes([0b1_010_011_0, 0b0100_0000, 0, 0, 3, 1]))
    assert [bits.read_golomb() for _ in range(4)] == [0, 1, 2, 3]
    assert bits.read(4) == 0
    assert bits.read(24) == 1  # the 3 only keeps zeros apart
    assert bits.read(9) == 0
    for header in (b"", b"\1", b"\1" * 30, b"\0\0\1", b"\0\0\0\1\x67", bytes(range(60))):
        assert isinstance(allows_gaps(header), bool)
        assert isinstance(is_wavefront(header), bool)


def test_equal_clips_give_equal_bytes_whatever_memory_holds():
    """Where x264 uses AVX-512, it reads what it did not write."""
    rng = np.random.default_rng(0)
    for height, width in ((24, 32), (96, 160)):
        coarse = rng.integers(0, 255, (8, height // 4, width // 4, 3)).astype(np.uint8)
        clip = coarse.repeat(4, 1).repeat(4, 2)
        digests = set()
        for _ in range(6):
            junk = [
                rng.integers(0, 255, int(size), np.uint8) for size in rng.integers(1e3, 1e5, 200)
            ]
            del junk[::2]
            digests.add(hashlib.sha256(encode_clip(clip, 8.0)).hexdigest())
        assert len(digests) == 1


def test_ffmpeg_keeps_silent(pictures, tmp_path):
    for name in ("H.264, mp4", "MPEG-4, AVI", "VP9, WebM"):
        media = overwrite(encode(pictures, *CODECS[name]), random.Random(0))
        (tmp_path / name.partition(",")[0]).write_bytes(media)
    (tmp_path / "nothing").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(2000))
    code = f"""
from pathlib import Path
from data_pipeline.errors import DataError
from data_pipeline.media.clips import probe, read_clips
for path in Path({str(tmp_path)!r}).iterdir():
    for cut in ("none", "scenes"):
        try:
            probe(path.read_bytes(), "video")
            list(read_clips(path.read_bytes(), (4, 36, 64), cut=cut))
        except DataError:
            pass
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
