"""Files into samples: filters by name, cuts at a length and at changes of scene."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import ConfigError, DataError, NotWanted
from data_pipeline.making.build import build
from data_pipeline.making.samples import Filters
from data_pipeline.media.clips import Probe, probe, read_clips
from data_pipeline.media.codec import decode_clip, encode_clip
from data_pipeline.shards.dataset import open_dataset

COLORS = np.array([(30, 30, 30), (10, 200, 200), (220, 40, 40)], np.uint8)
SCENES = (20, 28, 10)  # frames, at 8 frames per second
SIZE = {"frames": 8, "height": 24, "width": 32}


def scenes() -> np.ndarray:
    """Three scenes of one colour each, with a bar that tells the frame."""
    clip = np.repeat(COLORS, SCENES, axis=0)[:, None, None].repeat(48, 1).repeat(64, 2)
    for number, picture in enumerate(clip):
        picture[:4, : number + 1] = 255
    return clip


@pytest.fixture(scope="module")
def long(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    (folder / "long.mp4").write_bytes(encode_clip(scenes(), 8.0))
    (folder / "short.mp4").write_bytes(encode_clip(scenes()[:6], 8.0))
    entries = [{"file": "long.mp4", "caption": "three colours"},
               {"file": "short.mp4", "caption": "one colour for a moment"}]  # fmt: skip
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, entries)))
    return folder


def test_cuts_cover_what_they_can_in_order(long):
    media = (long / "long.mp4").read_bytes()
    for cut, frames, starts in (
        ("length", 8, [0, 1, 2, 3, 4, 5, 6]),
        ("scenes", 8, [0, 1, 2.5, 3.5, 4.5, 6]),
        ("scenes", 20, [0, 2.5]),
    ):
        clips = [clip for _, clip in read_clips(media, (frames, 24, 32), cut=cut)]
        assert [clip.start_seconds for clip in clips] == starts
    ((_, none),) = read_clips(media, (64, 24, 32), cut="length")
    assert isinstance(none, NotWanted)


@pytest.mark.parametrize(("cut", "starts"), [("length", range(0, 49, 8)),
                                             ("scenes", (0, 8, 20, 28, 36, 48))])  # fmt: skip
def test_clips_are_the_frames_from_their_start(long, tmp_path, cut, starts):
    dataset = build(long, tmp_path, frames=8, height=48, width=64, cut=cut)
    assert dataset.info.rejected == {"shorter than one clip": 1}
    assert dataset.info.samples == len(starts)
    for row, start in enumerate(starts):
        record = dataset.read(0, row)
        assert record.metadata["start_seconds"] == start / 8
        wanted = scenes()[start : start + 8].astype(int)
        assert abs(decode_clip(record.media) - wanted).mean() < 4  # lossy
        if cut == "scenes":
            assert np.ptp(decode_clip(record.media)[:, 20:].mean((1, 2)), axis=0).max() < 6


def test_a_probe_tells_what_decoding_would(shared_clips):
    shapes = {
        "nasa_13013_rotated.mp4": (480, 270),
        "test_non_zero_start.mp4": (112, 199),
        "testsrc2_vp9.webm": (720, 1280),
    }
    for file, shape in shapes.items():
        found = probe((shared_clips / "odd" / file).read_bytes(), "video")
        assert (found.height, found.width) == shape
        assert found.frames == pytest.approx(found.seconds * found.fps, abs=1)


VIDEO = Probe(frames=48, fps=24.0, height=480, width=960, seconds=2.0)


@pytest.mark.parametrize(
    ("limit", "passes", "fails"),
    [
        ("min_height", 480, 481),
        ("min_width", 960, 961),
        ("max_aspect", 2.0, 1.9),
        ("min_frames", 48, 49),
        ("min_seconds", 2.0, 2.1),
        ("max_seconds", 2.0, 1.9),
        ("min_caption_words", 3, 4),
        ("max_caption_words", 3, 2),
    ],
)
def test_every_filter_names_itself_and_its_value(limit, passes, fails):
    reason = partial(Filters.reason, media=VIDEO, caption="a red ball", kind="video")
    assert reason(Filters(**{limit: passes})) is None
    side = "below" if limit.startswith("min") else "above"
    assert reason(Filters(**{limit: fails})).startswith(f"{side} {limit}: ")


def test_length_is_not_asked_of_images():
    image = Probe(frames=1, fps=0.0, height=480, width=960, seconds=0.0)
    assert Filters(min_seconds=1.0, min_frames=9).reason(image, "", "image") is None


def test_what_is_filtered_is_counted_and_costs_no_budget(long, tmp_path):
    filters = Filters(min_seconds=1.0, min_caption_words=2)
    dataset = build(long, tmp_path / "a", **SIZE, filters=filters, max_drop_rate=0.0)
    assert (dataset.info.samples, dataset.info.rejected) == (1, {"below min_seconds": 1})
    with pytest.raises(DataError, match="would hold no sample"):
        build(long, tmp_path / "b", **SIZE, filters=Filters(min_height=100))


def test_settings_that_cannot_be_are_refused(media, tmp_path):
    for settings, message in (
        ({"filters": Filters(min_seconds=float("nan"))}, "min_seconds: value nan is wrong"),
        ({"filters": Filters(min_seconds=3.0, max_seconds=2.0)}, "min_seconds: value 3.0 is wrong"),
        ({"filters": Filters(min_height=-1)}, "min_height: value -1 is wrong"),
        ({"cut": "length", "kind": "image"}, "cut: value 'length' is wrong because images"),
        ({"workers": 0}, "workers: value 0 is wrong"),
    ):
        source = media / ("images" if "kind" in settings else "videos")
        with pytest.raises(ConfigError, match=message):
            build(source, tmp_path / "out", **SIZE, **settings)


def test_a_build_leaves_a_picture_of_its_samples(datasets):
    content = (datasets / "videos" / "contact_sheet.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert open_dataset(datasets / "videos").info.samples == 26
