"""Clips begin and go on at their frames, whatever the container says or keeps to itself."""

from fractions import Fraction

import av
import numpy as np
import pytest

from data_pipeline.errors import NotWanted
from data_pipeline.media import container as containers
from data_pipeline.media.clips import Span, probe, read_clip, read_clips
from data_pipeline.media.timeline import Stamp, timeline_of
from tests.odd_media import number_of, numbered, numbers_of, remux, write_video

FRAMES, GOP = 100, 23
SIZE = (10, 48, 80)
X265 = {"x265-params": "log-level=-1:open-gop=1"}


def film(container: str = "mp4", codec: str = "libx264", frames: int = FRAMES, **settings) -> bytes:
    pictures = [numbered(number) for number in range(frames)]
    return write_video(pictures, container, codec, gop=GOP, **settings)


FILMS = {
    "mp4": {},
    "matroska": {"container": "matroska"},
    "mpegts": {"container": "mpegts"},
    "flv": {"container": "flv"},
    "mp4 in fragments": {"muxing": {"movflags": "frag_keyframe+empty_moov"}},
    "open groups": {"options": {"x264-params": "open-gop=1:bframes=4:scenecut=0"}},
    "open groups in mpegts": {"container": "mpegts",
                              "options": {"x264-params": "open-gop=1:bframes=4:scenecut=0"}},
    "hevc": {"codec": "libx265", "options": X265},
    "hevc in mpegts": {"container": "mpegts", "codec": "libx265", "options": X265},
    "avi, mpeg4": {"container": "avi", "codec": "mpeg4", "bframes": 2},
    "avi, h264 with B frames": {"container": "avi"},
    "avi, mjpeg": {"container": "avi", "codec": "mjpeg", "pixels": "yuvj420p"},
    "mpeg": {"container": "mpeg", "codec": "mpeg2video", "bframes": 2},
    "mpegts, mpeg2": {"container": "mpegts", "codec": "mpeg2video", "bframes": 2},
    "webm, vp8": {"container": "webm", "codec": "libvpx"},
    "webm, vp9": {"container": "webm", "codec": "libvpx-vp9"},
    "av1": {"codec": "libsvtav1"},
    "29.97 in milliseconds": {"container": "matroska", "rate": Fraction(30000, 1001)},
    "live": {"container": "webm", "codec": "libvpx", "muxing": {"live": "1"}},
    "begins late": {"container": "mpegts", "times": range(500, 500 + FRAMES)},
    "gif": {"container": "gif", "codec": "gif", "pixels": "rgb8", "rate": 25},
}  # fmt: skip


@pytest.mark.parametrize("name", list(FILMS))
def test_every_start_gives_its_frame_and_cuts_leave_none_out(name):
    media = film(**FILMS[name])
    found = probe(media, "video")
    rate = float(FILMS[name].get("rate", 24))
    assert (found.frames, found.fps) == (FRAMES, pytest.approx(rate, rel=1e-3))
    assert found.seconds == pytest.approx(FRAMES / rate, rel=1e-3)
    for start in (0, 1, 22, 23, 24, 57, 90):
        clip = read_clip(media, "video", SIZE, start_seconds=start / rate).clip
        assert numbers_of(clip) == list(range(start, start + 10))
    clips = [clip.clip for _, clip in read_clips(media, SIZE, cut="length")]
    assert numbers_of(np.concatenate(clips)) == list(range(FRAMES))
    spans = [Span(70 / rate, 80 / rate), Span(4 / rate), Span(9 / rate)]
    firsts = {span: number_of(clip.clip[0]) for span, clip in read_clips(media, SIZE, spans=spans)}
    assert firsts == {0: 70, 1: 4, 2: 9}


def without_index(avi: bytes) -> bytes:
    at = avi.rindex(b"idx1")
    return avi[:at] + b"JUNK" + avi[at + 4 :]


def test_an_avi_needs_no_index():
    for codec, pixels in (("mjpeg", "yuvj420p"), ("mpeg4", "yuv420p")):
        media = without_index(film("avi", codec, pixels=pixels))
        assert number_of(read_clip(media, "video", SIZE, start_seconds=2.5).clip[0]) == 60


def test_what_an_edit_list_cuts_off_is_not_seen():
    def earlier(_, packet: av.Packet) -> None:
        shift = round(10 / 24 / packet.time_base)
        packet.pts, packet.dts = packet.pts - shift, packet.dts - shift

    kept = {"avoid_negative_ts": "disabled", "use_editlist": "1"}
    media = remux(film(), "mp4", earlier, kept)
    assert number_of(read_clip(media, "video", SIZE).clip[0]) == 10
    clips = [clip.clip for _, clip in read_clips(media, SIZE, cut="length")]
    assert numbers_of(np.concatenate(clips)) == list(range(10, FRAMES))


def test_a_recording_that_begins_between_key_frames_begins_at_the_next_one():
    steady = {"x264-params": "scenecut=0"}
    media = remux(film("mpegts", options=steady), "mpegts", lambda number, _: number >= 7)
    clips = [clip.clip for _, clip in read_clips(media, SIZE, cut="length")]
    assert numbers_of(np.concatenate(clips)) == list(range(GOP, GOP + len(clips) * 10))


def test_what_is_called_a_key_frame_and_is_none_is_not_begun_at():
    def call_all_keys(_, packet: av.Packet) -> None:
        packet.is_keyframe = True

    for codec in ("mpeg4", "libx264"):
        media = remux(film("matroska", codec, bframes=0), "matroska", call_all_keys)
        clip = read_clip(media, "video", SIZE, start_seconds=50 / 24).clip
        assert numbers_of(clip) == list(range(50, 60))


def test_parts_far_apart_are_not_decoded_between(monkeypatch):
    media, decoded = film(frames=300), []
    decode = containers.Decoder.decode

    def count(self, packet, **settings):
        decoded.append(packet.size > 0)
        return decode(self, packet, **settings)

    monkeypatch.setattr(containers.Decoder, "decode", count)
    list(read_clips(media, SIZE, cut="length"))
    assert sum(decoded) == 300  # once each, for thirty clips
    decoded.clear()
    list(read_clips(media, SIZE, spans=[Span(10.0), Span(1.0)]))
    assert sum(decoded) < 4 * GOP


def test_each_span_has_its_clips_or_a_reason_of_its_own():
    spans = [Span(1.0, 1.5), Span(0.5, 0.7), Span(4.0), Span(30.0), Span(0.0, 0.84)]
    found = dict(read_clips(film(), SIZE, spans=spans))
    assert numbers_of(found[0].clip) == list(range(24, 34))
    for span, frames in ((1, 5), (2, 4), (3, 0)):
        assert str(found[span]) == f"is too short: {frames} of 10 frames"
    clips = read_clips(film(), SIZE, spans=spans[4:], cut="length")
    starts = [clip.start_seconds for _, clip in clips]
    assert starts == [0.0, pytest.approx(10 / 24)]


def test_a_rate_is_that_of_most_frames():
    held = [*range(0, 60), 360]
    media = film(frames=61, rate=30, times=held, base=Fraction(1, 30))
    assert probe(media, "video").fps == 30
    assert numbers_of(read_clip(media, "video", SIZE, fps=30).clip) == list(range(10))
    dropped = [number for number in range(130) if number % 5 != 3][:FRAMES]
    media = film("matroska", rate=30, times=dropped, base=Fraction(1, 30))
    assert probe(media, "video").fps == pytest.approx(30, rel=1e-3)
    jittering = np.cumsum(np.random.default_rng(0).integers(20, 47, FRAMES)).tolist()
    media = film("webm", "libvpx", times=jittering, base=Fraction(1, 1000), muxing={"live": "1"})
    assert probe(media, "video").fps == pytest.approx(30, rel=0.05)
    assert probe(media, "video").seconds == pytest.approx(
        (jittering[-1] - jittering[0]) / 1000, abs=0.05
    )


def test_gaps_are_cut_at_or_refused():
    times = [*range(35), *range(35 + 2400, FRAMES + 2400)]
    for container in ("matroska", "mp4"):
        media = film(container, times=times, base=Fraction(1, 24))
        with pytest.raises(NotWanted, match=r"has a gap in time: 100 s after 1.4"):
            read_clip(media, "video", SIZE, start_seconds=30 / 24)
        with pytest.raises(NotWanted, match="has a gap in time"):
            read_clip(media, "video", SIZE, start_seconds=50.0)
        assert numbers_of(read_clip(media, "video", SIZE, start_seconds=25 / 24).clip) == [
            *range(25, 35)
        ]
        clips = [numbers_of(clip.clip) for _, clip in read_clips(media, SIZE, cut="length")]
        assert clips == [[*range(n, n + 10)] for n in (0, 10, 20, 35, 45, 55, 65, 75, 85)]


def test_time_that_goes_back_is_refused():
    ticks = [*range(20), *range(10, 30)]
    stamps = [
        Stamp(2 * tick + turn // 20, turn, tick % 5 == 0, False) for turn, tick in enumerate(ticks)
    ]
    with pytest.raises(NotWanted, match="goes back in time: after"):
        timeline_of(stamps, Fraction(1, 24), [24.0], knows_shown=True)


def test_a_single_frame_and_none():
    media = film(frames=1)
    assert probe(media, "video").frames == 1
    with pytest.raises(NotWanted, match="is too short: 1 of 10 frames"):
        read_clip(media, "video", SIZE)
    assert number_of(read_clip(media, "video", (1, 48, 80)).clip[0]) == 0


def test_scenes_are_found_on_every_container():
    flat = [np.full((48, 80, 3), level, np.uint8) for level in (40, 200, 90)]
    pictures = [flat[0]] * 31 + [flat[1]] * 42 + [flat[2]] * 27
    for name in ("matroska", "mpegts", "avi, mpeg4", "webm, vp9", "open groups in mpegts"):
        settings = {"container": "mp4", "codec": "libx264"} | FILMS[name]
        media = write_video(pictures, gop=GOP, **settings)
        clips = [clip for _, clip in read_clips(media, SIZE, cut="scenes")]
        starts = [round(clip.start_seconds * 24) for clip in clips]
        assert starts == [0, 10, 20, 31, 41, 51, 61, 73, 83], name
        assert all(np.ptp(clip.clip.mean(axis=(1, 2, 3))) < 8 for clip in clips)
