"""Toy clips show what their captions say, and the reader sees it, or its absence."""

import json

import numpy as np
import pytest

from data_pipeline.errors import ConfigError
from data_pipeline.making.toy import (
    Staging,
    Toy,
    all_toys,
    random_center,
    render,
    toy_clips,
    write_toy,
)
from data_pipeline.making.toy_score import BRIGHT, read_toy
from data_pipeline.media.codec import decode_clip
from data_pipeline.pyramid import Pyramid, level_clip
from t2v.quickstart import STAGINGS

SIZE = (8, 48, 64)


def test_toys_are_all_different_and_captions_tell_them_apart():
    toys = all_toys()
    assert len(set(toys)) == 5 * 4 * 4
    assert len({toy.caption for toy in toys}) == len(toys)
    assert toys[0].caption == "a red circle moving left"
    assert Toy("blue", "cross", None).caption == "a blue cross"


@pytest.mark.parametrize(
    ("size", "staging"),
    [(SIZE, Staging()), ((8, 24, 32), Staging()), ((8, 24, 24), STAGINGS["hpdm"])],
)
def test_the_reader_reads_back_every_toy(size, staging):
    rng, toys = np.random.default_rng(0), all_toys()
    centers = [random_center(size[2] / size[1], rng, staging) for _ in toys]
    readings = [
        read_toy(render(toy, size, center, staging))
        for toy, center in zip(toys, centers, strict=True)
    ]
    for toy, reading in zip(toys, readings, strict=True):
        assert (reading.color, reading.direction) == (toy.color, toy.direction)
        assert reading.whole_frames == 1
    right = sum(reading.shape == toy.shape for toy, reading in zip(toys, readings, strict=True))
    # At 24 pixels of height a corner of a small object is a pixel or two.
    assert right >= (0.95 if size == (8, 24, 32) else 1) * len(toys)


def test_a_level_of_a_pyramid_still_shows_the_toy():
    pyramid = Pyramid(levels=3, patch_size=(4, 24, 32), clip_size=(16, 96, 128))
    for toy in all_toys()[::7]:
        reading = read_toy(level_clip(render(toy, pyramid.clip_size), pyramid, 0))
        assert (reading.color, reading.direction) == (toy.color, toy.direction)


def test_the_object_stays_in_sight():
    for toy, clip in toy_clips(160, SIZE, seed=1, moving=True):
        seen = clip.max(axis=3).astype(float).sum(axis=(1, 2))
        # Pixels at the edge of a shape are partly covered.
        assert seen == pytest.approx(seen.mean(), rel=0.03), toy


def test_clips_are_a_function_of_the_seed_and_places_differ():
    first, again, other = (
        [clip for _, clip in toy_clips(5, SIZE, seed=seed, moving=True)] for seed in (3, 3, 4)
    )
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert not any((a == b).all() for a, b in zip(first, other, strict=True))


def test_stills_do_not_move():
    for toy, clip in toy_clips(3, (4, 48, 64), seed=0, moving=False):
        assert toy.direction is None
        assert (clip == clip[:1]).all()


def test_the_reader_is_not_fooled_by_scattered_pixels():
    """The right colour proves nothing: an object in pieces is not whole."""
    rng = np.random.default_rng(0)
    clip = render(Toy("red", "square", "left"), SIZE)
    pixels = clip.reshape(SIZE[0], -1, 3)
    scattered = np.stack([frame[rng.permutation(len(frame))] for frame in pixels])
    reading = read_toy(scattered.reshape(clip.shape))
    assert reading.color == "red"
    assert reading.whole_frames < 0.2


def test_the_reader_sees_nothing_in_the_dark():
    for level in (0, BRIGHT):
        reading = read_toy(np.full((*SIZE, 3), level, dtype=np.uint8))
        assert (reading.color, reading.shape, reading.direction) == (None, None, None)
        assert reading.whole_frames == 0


def test_a_clip_played_backwards_moves_the_other_way():
    for direction, opposite in (("left", "right"), ("up", "down")):
        clip = render(Toy("green", "circle", direction), SIZE)
        assert read_toy(clip[::-1]).direction == opposite


def test_written_media_are_what_the_captions_say(tmp_path):
    write_toy(tmp_path / "toy", videos=4, images=2, size=SIZE, seed=2)
    for kind, count in (("videos", 4), ("images", 2)):
        lines = (tmp_path / "toy" / kind / "captions.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert len({record["file"] for record in records}) == count
        for record in records:
            path = tmp_path / "toy" / kind / record["file"]
            assert path.is_file()
            if kind == "videos":
                reading = read_toy(decode_clip(path.read_bytes()))
                words = ("a", reading.color, reading.shape, "moving", reading.direction)
                assert record["caption"] == " ".join(words)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"is not empty; give a new folder\."):
        write_toy(tmp_path, videos=1, images=1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
