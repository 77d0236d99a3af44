"""Clips by the times in lists: the right seconds of a video with the right caption, or a word."""

import json
from pathlib import Path

import pytest
from numbered import (
    FPS,
    SIZE,
    clips_of,
    numbered_clip,
    numbered_video,
    write_csv,
    write_lines,
)
from odd_media import write_video

from data_pipeline.errors import ConfigError, DataError, UserError
from data_pipeline.making.build import build
from data_pipeline.making.presets import PRESETS, Columns
from data_pipeline.making.times import Times, find_times, parse_time, ranges_of

TWO = [("bars A", 0, 9), ("bars B", 12, 21)]  # captions, first and last frames


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("times") / "clip0.mp4"
    path.write_bytes(numbered_video())
    return path


def clock(seconds: float) -> str:
    return f"00:00:{seconds:06.3f}"


def rows(**values) -> list[dict]:
    """One row for each of TWO, from functions of (first, last) frame."""
    return [
        {"file": "clip0.mp4", "caption": caption}
        | {name: value(first, last) for name, value in values.items()}
        for caption, first, last in TWO
    ]


SPELLINGS = {
    "seconds": rows(start=lambda a, b: a / FPS, end=lambda a, b: round((b + 1) / FPS, 3)),
    "clock": rows(start_time=lambda a, b: clock(a / FPS), end_time=lambda a, b: clock(b / FPS)),
    "comma": rows(begin=lambda a, b: clock(a / FPS).replace(".", ","),
                  stop=lambda a, b: str((b + 0.6) / FPS)),
    "frames": rows(start_frame=lambda a, b: a, end_frame=lambda a, b: b + 1),
    "milliseconds": rows(StartMs=lambda a, b: round(a / FPS * 1000),
                         EndMs=lambda a, b: 917 if a else 416),
    "from and to": rows(**{"from": lambda a, b: a / FPS, "to": lambda a, b: (b + 1) / FPS}),
    "duration": rows(start=lambda a, b: a / FPS, duration=lambda a, b: 10 / FPS),
    "pairs": rows(timestamp=lambda a, b: [a / FPS, (b + 1) / FPS]),
    "text pairs": rows(segment=lambda a, b: f"['{clock(a / FPS)}', '{clock((b + 1) / FPS)}']"),
    "lists": [{"file": "clip0.mp4", "caption": ["bars A", "bars B"], "start": [0, 0.5],
               "end": [0.4, 0.9]}],
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_each_clip_is_its_own_frames_with_its_own_caption(video, tmp_path, name, kind):
    write = write_csv if kind == "csv" else write_lines
    path = write(tmp_path / f"list.{kind}", SPELLINGS[name])
    frames = 9 if name == "clock" else 10  # those ends are the starts of the last frames
    dataset = build(path, tmp_path / "out", frames=frames, **SIZE, root=str(video.parent))
    assert clips_of(dataset) == [(caption, first, first + frames - 1) for caption, first, _ in TWO]
    assert "times" in dataset.info.notes
    assert [dataset.read(0, row).metadata["start_seconds"] for row in (0, 1)] == [0.0, 0.5]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("1:02.5", 62.5), ("00:00:03,250", 3.25), (3, 3.0), ("3.250", 3.25), (" 1:00:00 ", 3600.0)],
)
def test_clocks_are_seconds(value, seconds):
    assert parse_time(value, "seconds") == seconds
    assert parse_time(value, "milliseconds") == seconds * (1000 if ":" in str(value) else 1)


def test_frames_are_counted_whatever_they_last(tmp_path):
    """After frame 10 was dropped, each comes one later than its number over the rate."""
    times = [number + (number >= 10) for number in range(40)]
    pictures = list(numbered_clip(40))
    (tmp_path / "a.mp4").write_bytes(write_video(pictures, times=times))
    path = write_lines(tmp_path / "l.jsonl", [
        {"file": "a.mp4", "caption": str(n), "start_frame": float(n), "end_frame": n + 8}
        for n in (0, 12, 32)])  # fmt: skip
    dataset = build(path, tmp_path / "out", frames=8, **SIZE)
    assert clips_of(dataset) == [(str(n), n, n + 7) for n in (0, 12, 32)]


def test_cuts_stay_inside_the_clips_of_a_list(video, tmp_path):
    path = write_lines(tmp_path / "l.jsonl", [{"file": "clip0.mp4", "caption": "x", "start": 0.5,
                                               "end": 1.25}])  # fmt: skip
    dataset = build(path, tmp_path / "a", frames=4, **SIZE, root=str(video.parent), cut="length")
    assert [clip[1:] for clip in clips_of(dataset)] == [(n, n + 3) for n in (12, 16, 20, 24)]


def test_clips_that_are_too_short_or_behind_the_end_are_told_apart(video, tmp_path):
    times = [(0, 0.1), (1.9, 9), (3, 4), (0, 0.5), (1, 0.5), ("soon", 1), (-1, 1)]
    entries = [{"file": "clip0.mp4", "caption": str(n), "start": a, "end": b}
               for n, (a, b) in enumerate(times)]  # fmt: skip
    path = write_lines(tmp_path / "l.jsonl", entries)
    dataset = build(path, tmp_path / "out", frames=10, **SIZE, root=str(video.parent),
                    max_drop_rate=1.0)  # fmt: skip
    assert clips_of(dataset) == [("3", 0, 9)]
    assert dataset.info.account.not_wanted == {"is too short": 1}
    assert dataset.info.account.unusable == {"time is none": 3, "time lies behind the video": 2}


def test_rows_of_one_clip_are_captions_of_it(video, tmp_path):
    entries = [{"file": "clip0.mp4", "caption": c, "start": 0.5, "end": 1} for c in ("a", "b", "a")]
    path = write_lines(tmp_path / "l.jsonl", entries)
    dataset = build(path, tmp_path / "out", frames=4, **SIZE, root=str(video.parent))
    told = dataset.read(0, 0).metadata
    assert (dataset.info.samples, told["caption"]) == (1, "a")
    assert dict(zip(told["captions"], told["caption_weights"], strict=True)) == pytest.approx(
        {"a": 2 / 3, "b": 1 / 3}
    )


@pytest.mark.parametrize("name", ["end", "timestamps_of_speech", "stop", "t0", "frameOffset",
                                  "onset", "EndTime", "start_frame_b"])  # fmt: skip
def test_columns_that_look_like_times_and_cannot_be_used_are_refused_by_name(name):
    names = ["file", "caption", "height", name]
    with pytest.raises(ConfigError, match=f"column '{name}' looks like a time"):
        find_times("list", names, None, None)
    assert find_times("list", names, (), None) is None


@pytest.mark.parametrize("name", ["duration", "fps", "seconds", "frame", "weekend", "trend",
                                  "restart_count", "text", "segment_id", "aesthetic"])  # fmt: skip
def test_other_columns_are_metadata(name):
    assert find_times("list", ["file", "caption", name], None, None) is None


def test_two_pairs_of_times_are_nobodys_guess():
    names = ["start", "end", "start_frame", "end_frame"]
    with pytest.raises(ConfigError, match="--times START,END"):
        find_times("list", names, None, None)
    found = find_times("list", names, ("start_frame", "end_frame"), None)
    assert found == Times(("start_frame", "end_frame"), "frames")
    with pytest.raises(ConfigError, match="there is no column 'x'"):
        find_times("list", names, ("x",), None)


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        float("inf"),
        -1,
        True,
        None,
        "",
        "a",
        [1],
        "1:2:3:4",
        "1e400",
        "PT3S",
        10**400,
        "9" * 5000,
        f"{'9' * 400}:1",
        f"1:{'9' * 400}",
    ],
)
def test_what_is_no_time_is_refused(value):
    with pytest.raises(DataError, match="time is none"):
        parse_time(value, "seconds")


def test_lists_of_times_must_be_as_long_as_each_other(tmp_path):
    with pytest.raises(DataError, match="not equally long"):
        ranges_of([[0, 1], [1]], Times(("start", "end")))
    with pytest.raises(DataError, match="is no \\(start, end\\)"):
        ranges_of(["[[0, 1], [1]]"], Times(("timestamp",)))


CLOCKS = [[clock(0), clock(0.4)], [clock(0.5), clock(0.9)]]
MINIATURES = {
    "panda70m": [{"videoID": "clip0", "url": "u", "timestamp": str(CLOCKS),
                  "caption": "['bars A', 'bars B']", "matching_score": "[0.4, 0.5]"}],
    "internvid": [{"YoutubeID": "clip0", "Start_timestamp": a, "End_timestamp": b, "Caption": c,
                   "Aesthetic_Score": 4.5} for (a, b), (c, *_) in zip(CLOCKS, TWO, strict=True)],
    "koala36m": [{"videoID": "clip0", "url": "u", "timestamp": str(pair), "caption": c}
                 for pair, (c, *_) in zip(CLOCKS, TWO, strict=True)],
}  # fmt: skip
WHOLE = {
    "openvid": [{"video": "clip0.mp4", "caption": "whole", "aesthetic score": 5.1, "frame": 48,
                 "fps": 24.0, "seconds": 2.0}],
    "webvid": [{"videoid": "clip0", "contentUrl": "u", "duration": "PT00H00M02S",
                "page_dir": "0_1", "name": "whole"}],
    "huggingface": [{"file_name": "clip0.mp4", "text": "whole"}],
}  # fmt: skip


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("preset", PRESETS)
def test_published_collections_come_in_by_name(video, tmp_path, preset, kind):
    entries = MINIATURES.get(preset) or WHOLE[preset]
    write = write_csv if kind == "csv" else write_lines
    may_miss = PRESETS[preset].may_miss
    gone = [{name: "gone" if "id" in name.lower() else value for name, value in entries[0].items()}]
    path = write(tmp_path / f"list.{kind}", [*entries, *(gone if may_miss else [])])
    dataset = build(path, tmp_path / "out", frames=9, **SIZE, root=str(video.parent),
                    columns=PRESETS[preset])  # fmt: skip
    expected = [(c, a, a + 8) for c, a, _ in TWO] if preset in MINIATURES else [("whole", 0, 8)]
    assert clips_of(dataset) == expected
    assert dataset.info.account.not_wanted == ({"no such file": 1} if may_miss else {})


def test_times_of_images_and_in_sidecars(video, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(video.read_bytes())
    told = {"caption": ["bars A", "bars B"], "timestamp": CLOCKS, "score": [1, 2]}
    (folder / "a.json").write_text(json.dumps(told))
    dataset = build(folder, tmp_path / "out", frames=9, **SIZE)
    assert clips_of(dataset) == [(c, a, a + 8) for c, a, _ in TWO]
    assert [dataset.read(0, row).metadata["score"] for row in (0, 1)] == [1, 2]
    (folder / "a.json").write_text(json.dumps({"caption": "x", "clip_end": 3}))
    with pytest.raises(DataError, match="'clip_end' looks like a time"):
        build(folder, tmp_path / "b", frames=9, **SIZE)
    whole = build(folder, tmp_path / "c", frames=9, **SIZE, columns=Columns(times=()))
    assert (whole.info.samples, whole.read(0, 0).metadata["clip_end"]) == (1, 3)
    (folder / "a.jpg").write_bytes(b"")
    path = write_lines(folder / "l.jsonl", [{"file": "a.jpg", "caption": "", "start": 1}])
    with pytest.raises(UserError, match="images have no length"):
        build(path, tmp_path / "d", frames=1, **SIZE)
