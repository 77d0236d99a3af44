"""Frames come out as people see them: upright, over white, in the right colours, or by name not."""

import io
from itertools import product

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace

from data_pipeline.errors import NotWanted
from data_pipeline.media.bars import Bars
from data_pipeline.media.clips import probe, read_clip, read_clips
from data_pipeline.media.codec import decode_clip
from data_pipeline.media.picture import EXACT_RESIZE, Orientation, fitted_picture
from tests.odd_media import (
    QUADRANTS,
    corners_of,
    numbered,
    numbers_of,
    quadrants,
    with_matrix,
    write_video,
)

STRAIGHT = [(a, 0, 0, d) for a, d in product((1, -1), repeat=2)]
CROSSED = [(0, b, c, 0) for b, c in product((1, -1), repeat=2)]


def shown(stored: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Each stored pixel where the matrix puts it; slow, and as the standard says it."""
    a, b, c, d = matrix
    places = {
        (b * x + d * y, a * x + c * y): stored[y, x] for y, x in np.ndindex(*stored.shape[:2])
    }
    top, left = (min(place[axis] for place in places) for axis in (0, 1))
    rows, columns = (max(p[axis] for p in places) + 1 - low for axis, low in ((0, top), (1, left)))
    picture = np.zeros((rows, columns, 3), np.uint8)
    for (y, x), value in places.items():
        picture[y - top, x - left] = value
    return picture


@pytest.mark.parametrize("matrix", [*STRAIGHT, *CROSSED])
def test_all_eight_orientations_come_out_upright(matrix):
    media = with_matrix(write_video([quadrants()] * 2, options={"crf": "5"}), matrix)
    upright = shown(quadrants(), matrix)
    found = probe(media, "video")
    assert (found.height, found.width) == upright.shape[:2]
    read = read_clip(media, "video", (2, *upright.shape[:2]))
    assert (read.original_height, read.original_width) == upright.shape[:2]
    for clip in (read.clip, decode_clip(media)):
        assert abs(corners_of(clip[1]) - corners_of(upright)).max() < 8


def test_an_orientation_that_is_askew_is_refused():
    media = with_matrix(write_video([quadrants()] * 2), (1, 1, -1, 1))
    with pytest.raises(NotWanted, match="is turned by no quarter turn"):
        read_clip(media, "video", (2, 48, 80))


def test_wide_pixels_are_wide_before_they_are_turned():
    media = write_video([quadrants(48, 40)] * 2, tags={"sample_aspect_ratio": 2})
    for matrix, size in (((1, 0, 0, 1), (48, 80)), ((0, 1, -1, 0), (80, 48))):
        read = read_clip(with_matrix(media, matrix), "video", (2, *size))
        assert (read.original_height, read.original_width) == size


@pytest.mark.parametrize("side", [(47, 81), (33, 50), (16, 17)])
def test_odd_sides_keep_their_corners(side):
    picture = np.full((*side, 3), 30, np.uint8)
    picture[side[0] // 2 :, side[1] // 2 :] = 220
    media = write_video([picture] * 2, pixels="yuv444p", options={"crf": "5"})
    clip = read_clip(media, "video", (2, *side)).clip
    assert abs(clip[1].astype(int) - picture).mean() < 4


def with_cover(position: str) -> bytes:
    """A film of thirty frames beside a picture that is marked as its cover."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as muxer:
        kinds = ["cover", "film"] if position == "first" else ["film", "cover"]
        streams = {}
        for kind in kinds:
            stream = muxer.add_stream("mjpeg" if kind == "cover" else "libx264", rate=24)
            size = (300, 300) if kind == "cover" else (48, 80)
            stream.height, stream.width = size
            stream.pix_fmt = "yuvj420p" if kind == "cover" else "yuv420p"
            streams[kind] = stream
        streams["cover"].disposition = av.stream.Disposition.attached_pic
        cover = np.full((300, 300, 3), 99, np.uint8)
        frame = av.VideoFrame.from_ndarray(cover, format="rgb24").reformat(format="yuvj420p")
        frame.pts = 0
        muxer.mux(streams["cover"].encode(frame))
        for number in range(30):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(numbered(number)))
            frame.pts = number
            muxer.mux(streams["film"].encode(frame))
        for stream in streams.values():
            muxer.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize("position", ["first", "last"])
def test_a_cover_is_no_video(position):
    media = with_cover(position)
    assert probe(media, "video").frames == 30
    assert numbers_of(read_clip(media, "video", (20, 48, 80)).clip) == list(range(20))


def test_woven_fields_are_made_whole():
    """A bar moves between fields; where they are woven it has teeth."""
    pictures = []
    for number in range(8):
        picture = np.full((48, 80, 3), 20, np.uint8)
        for field in (0, 1):
            left = 10 + 8 * number + 4 * field
            picture[field::2, left : left + 12] = 230
        pictures.append(picture)

    def teeth(clip: np.ndarray) -> float:
        rows = clip[1:-1, 4:-4].astype(int)  # away from where nothing is known beside
        return abs(rows[:, 1:-1] - (rows[:, :-2] + rows[:, 2:]) / 2).mean()

    woven = write_video(pictures, options={"crf": "5", "x264-params": "tff=1"}, bframes=0)
    plain = write_video(pictures, options={"crf": "5"}, bframes=0)
    size = (8, 48, 80)
    assert teeth(read_clip(plain, "video", size).clip) > 10
    clip = read_clip(woven, "video", size).clip
    assert teeth(clip) < 1
    for number, picture in enumerate(clip[1:-1], 1):  # the upper field is shown first
        bright = np.flatnonzero(picture[24].mean(axis=1) > 128)
        assert abs(bright.min() - (10 + 8 * number)) <= 4


def clear(picture: np.ndarray) -> np.ndarray:
    """A picture whose left half nobody is to see."""
    alpha = np.full((*picture.shape[:2], 1), 255, np.uint8)
    alpha[:, : picture.shape[1] // 2] = 0
    return np.concatenate([picture, alpha], axis=2)


@pytest.mark.parametrize(
    ("container", "codec", "pixels"),
    [
        ("mov", "qtrle", "argb"),
        ("mov", "png", "rgba"),
        ("mov", "prores_ks", "yuva444p10le"),
        ("webm", "libvpx-vp9", "yuva420p"),
        ("webm", "libvpx", "yuva420p"),
        ("matroska", "ffv1", "yuva420p"),
        ("gif", "gif", "pal8"),
    ],
)
def test_what_is_transparent_is_white(container, codec, pixels):
    options = {"profile": "4444"} if codec == "prores_ks" else {}
    if codec.startswith("libvpx"):
        options = {"auto-alt-ref": "0"}
    pictures = [clear(quadrants())] * 3
    if pixels == "pal8":
        media = animation(pictures)
    else:
        media = write_video(pictures, container, codec, pixels=pixels, source="rgba",
                            options=options)  # fmt: skip
    for clip in (read_clip(media, "video", (3, 48, 80)).clip, decode_clip(media)):
        corners = corners_of(clip[2])
        assert corners[:, 0].min() > 250
        assert abs(corners[:, 1] - QUADRANTS[:, 1].astype(int)).max() < 16


def animation(pictures: list[np.ndarray]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    first, *others = (Image.fromarray(picture) for picture in pictures)
    others[0].putpixel((79, 0), (0, 0, 0, 255))  # equal frames would become one
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=100, disposal=2)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("tags", "said"),
    [
        ({"color_trc": 16}, "is HDR video: its brightness is PQ"),
        ({"color_trc": 18}, "is HDR video: its brightness is HLG"),
        ({"color_trc": 8}, "has a strange brightness curve: number 8"),
        ({"colorspace": 8}, "has a strange colour matrix: number 8"),
    ],
)
@pytest.mark.parametrize(("container", "codec"), [("mp4", "libx265"), ("matroska", "libvpx-vp9")])
def test_colours_that_would_be_wrong_are_refused(tags, said, container, codec):
    if "colorspace" in tags and codec == "libvpx-vp9":
        pytest.skip("VP9 tells its matrix by itself, and knows none but the usual")
    options = {"x265-params": "log-level=-1:bframes=0"} if codec == "libx265" else {}
    pixels = "yuv420p10le" if codec == "libx265" else "yuv420p"
    media = write_video(
        [quadrants()] * 2, container, codec, pixels=pixels, tags=tags, options=options
    )
    with pytest.raises(NotWanted, match=said):
        read_clip(media, "video", (2, 48, 80))


@pytest.mark.slow
@pytest.mark.parametrize(("curve", "white"), [(16, 0.58), (18, 0.75)])
def test_tones_of_hdr_are_mapped_where_it_is_asked_for(curve, white):
    """Greys stay grey and in their order, from black to less than white; hues stay hues."""
    greys = np.linspace(0, 255 * white, 10).round().astype(np.uint8).repeat(8)
    picture = np.broadcast_to(greys[None, :, None], (48, 80, 3)).copy()
    picture[24:] = quadrants()[:24] * 0.6
    options = {"x265-params": "log-level=-1:bframes=0"}
    tags = {"color_trc": curve, "color_primaries": 9, "colorspace": 9}
    media = write_video([picture] * 2, "mp4", "libx265", pixels="yuv420p10le", tags=tags,
                        options=options)  # fmt: skip
    with pytest.raises(NotWanted, match="is HDR video"):
        read_clip(media, "video", (2, 48, 80))
    bars = Bars(bottom=24)
    clips = [next(iter(read_clips(media, (2, *size), bars=cut, tone_map=True)))[1].clip
             for size, cut in (((48, 80), Bars()), ((24, 80), bars))]  # fmt: skip
    row = clips[0][0, 12, 4::8].astype(int)
    assert np.abs(row - row.mean(axis=1, keepdims=True)).max() <= 3
    assert row[0].max() <= 3
    assert (np.diff(row.mean(axis=1)) > 5).all()
    assert 120 < row[-1].mean() < 245
    red, green = clips[0][0, 36, [20, 60]].astype(int)
    assert red.argmax() == 0
    assert green.argmax() == 1
    assert np.abs(clips[1][0, 4:20].astype(int) - clips[0][0, 4:20]).max() <= 3
    assert probe(media, "video", bars).height == 24
    untold = write_video([picture] * 2, "mp4", "libx265", pixels="yuv420p10le",
                         tags={"color_trc": curve}, options=options)  # fmt: skip
    _, same = next(iter(read_clips(untold, (2, 48, 80), tone_map=True)))
    assert np.array_equal(same.clip, clips[0])


@pytest.mark.parametrize("matrix", [Colorspace.ITU709, Colorspace.ITU601, Colorspace.BT2020])
@pytest.mark.parametrize("wide", [ColorRange.MPEG, ColorRange.JPEG])
@pytest.mark.parametrize(
    ("container", "codec", "pixels"),
    [
        ("mp4", "libx264", "yuv444p"),
        ("mp4", "libx265", "yuv420p10le"),
        ("webm", "libvpx-vp9", "yuv420p"),
        ("mp4", "libsvtav1", "yuv420p10le"),
        ("mov", "prores_ks", "yuv422p10le"),
    ],
)
def test_matrices_and_ranges_are_as_tagged(matrix, wide, container, codec, pixels):
    if (codec, wide) == ("prores_ks", ColorRange.JPEG):
        pytest.skip("ProRes has the narrow range alone")
    tag = {Colorspace.ITU709: 1, Colorspace.ITU601: 6, Colorspace.BT2020: 9}[matrix]

    def convert(frame: av.VideoFrame) -> av.VideoFrame:
        changed = frame.reformat(format=pixels, dst_colorspace=matrix, dst_color_range=wide)
        changed.pts, changed.time_base = frame.pts, frame.time_base
        return changed

    options = {"x265-params": "log-level=-1:bframes=0"} if codec == "libx265" else {}
    media = write_video(
        [quadrants()] * 2, container, codec, pixels=pixels, options=options | {"crf": "5"},
        tags={"colorspace": tag, "color_range": wide}, prepare=convert, whole="rgb24",
    )  # fmt: skip
    corners = corners_of(read_clip(media, "video", (2, 48, 80)).clip[1])
    assert abs(corners - QUADRANTS).max() <= 8


@pytest.mark.parametrize(
    "pixels",
    [
        "yuv420p",
        "yuvj422p",
        "yuv444p",
        "nv12",
        "yuv420p10le",
        "gray",
        "bgra",
        "rgb565le",
        "gbrp10le",
    ],
)
@pytest.mark.parametrize("size", [(96, 130), (288, 512), (33, 47)])
def test_pixels_do_not_depend_on_how_they_are_laid_out_on_the_way(pixels, size):
    """Against one conversion to RGB by rows, as slow as it is."""
    noise = np.random.default_rng(0).integers(0, 256, (96, 130, 3), np.uint8)
    frame = av.VideoFrame.from_ndarray(noise, format="rgb24").reformat(format=pixels)
    scale = max(size[0] / 96, size[1] / 130)
    height, width = (max(n, round(m * scale)) for n, m in zip(size, (96, 130), strict=True))
    rows = frame.reformat(width, height, "rgb24", interpolation=EXACT_RESIZE, threads=1)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    wanted = rows.to_ndarray()[top : top + size[0], left : left + size[1]]
    assert np.array_equal(fitted_picture(frame, Orientation(), 1.0, size), wanted)


def test_sound_and_covers_alone_are_not_wanted():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as muxer:
        stream = muxer.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = 44100, 0
        muxer.mux(stream.encode(frame))
        muxer.mux(stream.encode())
    with pytest.raises(NotWanted, match="holds no video"):
        probe(buffer.getvalue(), "video")
