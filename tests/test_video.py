"""Media in and out: right pixels at right times, whatever the file is like."""

import io
import struct
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.making.toy import Toy, render
from data_pipeline.media.clips import read_clip
from data_pipeline.media.codec import (
    decode_clip,
    decode_image,
    decode_patches,
    encode_clip,
    encode_image,
    reduce_clip,
    reduction,
)
from data_pipeline.pyramid import Pyramid, cut_patches, draw_offsets, level_clip, repeat_still

BARS = np.array(
    [(230, 30, 30), (30, 200, 40), (40, 70, 240), (240, 220, 30), (250, 250, 250), (5, 5, 5)],
    np.uint8,
)


def bars(height: int, width: int) -> np.ndarray:
    """Six upright stripes."""
    return np.broadcast_to(BARS[np.arange(width) * 6 // width], (height, width, 3)).copy()


def stripe_colors(picture: np.ndarray) -> np.ndarray:
    centers = (np.arange(6) * 2 + 1) * picture.shape[1] // 12
    return picture[picture.shape[0] // 2, centers].astype(int)


def moving() -> np.ndarray:
    return render(Toy("yellow", "cross", "right"), (16, 48, 64))


def encode(
    pictures,
    *,
    rate: int = 8,
    format: str = "mp4",
    codec: str = "libx264",
    pixels: str = "yuv420p",
    matrix: Colorspace = Colorspace.ITU601,
    color_range: ColorRange = ColorRange.MPEG,
    tags: dict | None = None,
    aspect: int | None = None,
    times: list[int] | None = None,
) -> bytes:
    """A file made by plain FFmpeg calls, not by the code under test."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pixels
        if codec == "libx264":
            stream.options = {"crf": "5"}
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(
                format=pixels, dst_colorspace=matrix, dst_color_range=color_range
            )
            frame.pts = times[number] if times else number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def test_equal_clips_give_equal_bytes_and_decode_to_nearly_themselves():
    clip = moving()
    media = encode_clip(clip, 8.0)
    assert media == encode_clip(clip, 8.0)
    decoded = decode_clip(media)
    assert decoded.shape == clip.shape
    assert abs(decoded.astype(int) - clip).mean() < 1  # colour is stored at half resolution
    still = encode_image(clip[0])
    assert still == encode_image(clip[0])
    assert abs(decode_image(still).astype(int) - clip[0]).mean() < 1


@pytest.mark.parametrize("frames", [1, 9, 400])
def test_a_clip_with_its_index_first_has_the_same_frames_behind_it(frames):
    clip = np.random.default_rng(0).integers(0, 256, (frames, 16, 16, 3), dtype=np.uint8)
    plain, first = (dict(boxes(encode_clip(clip, 24.0, index_first=f))) for f in (False, True))
    assert list(plain) == [b"ftyp", b"free", b"mdat", b"moov"]
    assert [name for name in first if name != b"free"] == [b"ftyp", b"moov", b"mdat"]
    assert first[b"mdat"] == plain[b"mdat"]
    shown = [decode_clip(encode_clip(clip, 24.0, index_first=f)) for f in (False, True)]
    assert np.array_equal(*shown)


def boxes(media: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(name, content) of each box of an mp4 file."""
    while media:
        length = int.from_bytes(media[:4])
        yield media[4:8], media[8:length]
        media = media[length:]


def test_a_clip_gives_equal_bytes_whatever_lay_in_memory():
    # x264's code for AVX-512 gave other bytes for one clip in three of this kind.
    rows, columns = np.mgrid[:32, :32]
    clip = np.full((8, 32, 32, 3), (200, 180, 190), np.uint8)
    for number, picture in enumerate(clip):
        picture[(columns - 10 - 2 * number) ** 2 + (rows - 12) ** 2 < 30] = (220, 20, 30)
    clip += np.random.default_rng(0).integers(0, 12, clip.shape, dtype=np.uint8)
    lengths = np.random.default_rng(1).integers(1, 300_000, 40)
    made = set()
    for length in lengths:
        _ = [np.full(length, 255, np.uint8) for _ in range(20)]
        made.add(encode_clip(clip, 8.0))
    assert len(made) == 1


@pytest.mark.parametrize(
    ("pyramid", "factor"),
    [
        (Pyramid(levels=2, patch_size=(8, 24, 32), clip_size=(16, 48, 64)), 1),
        (Pyramid(levels=3, patch_size=(4, 12, 16), clip_size=(16, 48, 64)), 1),
        (Pyramid(levels=2, patch_size=(4, 12, 16), clip_size=(8, 24, 32)), 2),
        (Pyramid(levels=2, patch_size=(16, 6, 8), clip_size=(16, 12, 16)), None),
        (Pyramid(levels=1, patch_size=(2, 6, 8), clip_size=(2, 6, 8)), 8),
    ],
)
def test_decoded_patches_are_cut_from_the_decoded_clip(pyramid, factor):
    factors = (factor,) * 3 if factor else (1, 4, 4)
    clip, image = encode_clip(moving(), 8.0), encode_image(moving()[5])
    whole = reduce_clip(decode_clip(clip), factors)
    still = reduce_clip(repeat_still(decode_image(image), pyramid.clip_size[0]), (1, *factors[1:]))
    for number in range(6):
        offsets = draw_offsets(pyramid, np.random.default_rng(number))
        patches = decode_patches(
            clip, "video", stored=(16, 48, 64), pyramid=pyramid, offsets=offsets
        )
        np.testing.assert_array_equal(patches, cut_patches(whole, pyramid, offsets))
        patches = decode_patches(
            image, "image", stored=(1, 48, 64), pyramid=pyramid, offsets=offsets
        )
        np.testing.assert_array_equal(patches, cut_patches(still, pyramid, offsets))


def test_a_base_reads_from_the_pyramids_clips_what_level_0_would():
    pyramid = Pyramid(levels=3, patch_size=(4, 12, 16), clip_size=(16, 48, 64))
    base = Pyramid(levels=1, patch_size=(4, 12, 16), clip_size=(4, 12, 16))
    clip = encode_clip(moving(), 8.0)
    patches = decode_patches(
        clip, "video", stored=(16, 48, 64), pyramid=base, offsets=np.zeros((1, 3), np.int64)
    )
    np.testing.assert_array_equal(patches[0], level_clip(decode_clip(clip), pyramid, 0))


def test_a_size_that_is_no_whole_multiple_is_refused():
    assert reduction((64, 288, 512), (8, 36, 64), "video") == (8, 8, 8)
    assert reduction((1, 288, 512), (8, 36, 64), "image") == (1, 8, 8)
    said = r"no whole multiple of the recipe's clip size \(8, 36, 60\)"
    with pytest.raises(ConfigError, match=said):
        reduction((64, 288, 512), (8, 36, 60), "video")


def test_a_clip_of_other_length_or_size_than_its_dataset_is_refused():
    pyramid = Pyramid(levels=1, patch_size=(16, 48, 64), clip_size=(16, 48, 64))
    offsets = np.zeros((1, 3), np.int64)
    for clip in (moving()[:12], moving()[:, :40]):
        with pytest.raises(DataError):
            decode_patches(
                encode_clip(clip, 8.0), "video", stored=(16, 48, 64), pyramid=pyramid,
                offsets=offsets,
            )  # fmt: skip


def test_frames_are_those_shown_at_the_wanted_times():
    levels = np.arange(24) * 10
    pictures = [np.full((32, 32, 3), level, np.uint8) for level in levels]
    media = encode(pictures, rate=24)
    for fps, expected in ((24, range(24)), (8, range(0, 24, 3)), (6, range(0, 24, 4))):
        clip = read_clip(media, "video", (len(expected), 32, 32), fps=fps).clip
        assert np.round(clip.mean(axis=(1, 2, 3)) / 10).tolist() == list(expected)
    with pytest.raises(DataError, match="too short: 8 of 9 frames"):
        read_clip(media, "video", (9, 32, 32), fps=8)
    with pytest.raises(DataError, match="fewer than 30 frames per second: 24"):
        read_clip(media, "video", (4, 32, 32), fps=30)


def test_uneven_time_stamps_are_resampled():
    pictures = [np.full((32, 32, 3), 20 * number, np.uint8) for number in range(8)]
    times = [0, 1, 2, 6, 8, 12, 13, 14]  # in eighths of a second
    media = encode(pictures, times=times)
    clip = read_clip(media, "video", (7, 32, 32), fps=4).clip
    shown = [max(i for i, time in enumerate(times) if time <= due) for due in range(0, 14, 2)]
    assert np.round(clip.mean(axis=(1, 2, 3)) / 20).tolist() == shown


@pytest.mark.parametrize("matrix", [Colorspace.ITU709, Colorspace.ITU601])
@pytest.mark.parametrize("color_range", [ColorRange.MPEG, ColorRange.JPEG])
@pytest.mark.parametrize("pixels", ["yuv420p", "yuv444p", "yuv420p10le"])
def test_tagged_colours_come_out_right(matrix, color_range, pixels):
    tag = {Colorspace.ITU709: 1, Colorspace.ITU601: 6}[matrix]
    tags = {"colorspace": tag, "color_range": color_range}
    media = encode(
        [bars(48, 96)] * 2, pixels=pixels, matrix=matrix, color_range=color_range, tags=tags
    )
    clip = read_clip(media, "video", (2, 48, 96)).clip
    assert abs(stripe_colors(clip[1]) - BARS).max() <= 4  # 8-bit YUV and back


def test_untagged_colours_are_read_as_ffmpeg_writes_them():
    clip = read_clip(encode([bars(48, 96)] * 2), "video", (2, 48, 96)).clip
    assert abs(stripe_colors(clip[0]) - BARS).max() <= 4


@pytest.mark.parametrize(
    ("format", "codec"),
    [("avi", "mpeg4"), ("webm", "libvpx-vp9"), ("matroska", "libx264"), ("mp4", "libx265")],
)
def test_other_codecs_and_containers_are_read(format, codec):
    media = encode([bars(48, 96)] * 3, format=format, codec=codec)
    clip = read_clip(media, "video", (3, 48, 96)).clip
    assert abs(stripe_colors(clip[2]) - BARS).max() <= 16  # lossy at default quality


# Display matrices by clockwise quarter turns: x' = a x + c y, y' = b x + d y, rows (a, b), (c, d).
TURNS = {0: (1, 0, 0, 1), 1: (0, 1, -1, 0), 2: (-1, 0, 0, -1), 3: (0, -1, 1, 0)}


def with_rotation(media: bytes, turns: int) -> bytes:
    a, b, c, d = (value << 16 for value in TURNS[turns])
    at = media.index(b"tkhd") + 4 + 40
    matrix = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return media[:at] + matrix + media[at + len(matrix) :]


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_rotated_video_comes_out_upright(turns):
    picture = bars(48, 96)
    picture[:24, :, :] //= 4  # dark above
    upright = np.rot90(picture, -turns)
    media = with_rotation(encode([picture] * 2), turns)
    read = read_clip(media, "video", (2, *upright.shape[:2]))
    assert (read.original_height, read.original_width) == upright.shape[:2]
    assert abs(read.clip[0].astype(int) - upright).mean() < 4


def test_wide_pixels_are_shown_wide():
    read = read_clip(encode([bars(48, 48)] * 2, aspect=2), "video", (2, 48, 96))
    assert (read.original_height, read.original_width) == (48, 96)
    assert abs(stripe_colors(read.clip[0]) - BARS).max() <= 6


def test_media_are_resized_to_cover_and_cropped_around_the_centre():
    picture = np.zeros((40, 120, 3), np.uint8)
    picture[:, 40:80] = 200
    for kind, media in (("video", encode([picture] * 2)), ("image", encode_image(picture))):
        clip = read_clip(media, kind, (2, 20, 20)).clip
        assert clip.shape == (2, 20, 20, 3)
        assert clip[:, :, 2:-2].min() > 190


def test_an_image_is_a_still_clip_of_no_frame_rate():
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise
    Image.fromarray(bars(48, 96)).save(buffer, "JPEG", quality=95, subsampling=0, exif=exif)
    read = read_clip(buffer.getvalue(), "image", (4, 96, 48))
    assert (read.fps, read.original_height, read.original_width) == (0.0, 96, 48)
    assert (read.clip == read.clip[:1]).all()
    assert abs(stripe_colors(np.rot90(read.clip[0])) - BARS).max() <= 6


def bad_videos() -> dict[str, bytes]:
    media = encode_clip(moving(), 8.0)
    return {
        "empty": b"",
        "zeros": bytes(4000),
        "cut": media[: len(media) // 2],
        "text": b"<html>not found</html>" * 50,
        "sound only": sound(),
        "a playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n",
        "a list of files": b"ffconcat version 1.0\nfile /etc/hostname\n",
    }


def sound() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = 44100, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize("name", list(bad_videos()))
def test_unusable_videos_are_refused_in_few_words(name):
    media = bad_videos()[name]
    for read in (decode_clip, lambda media: read_clip(media, "video", (4, 16, 16))):
        with pytest.raises(DataError) as error:
            read(media)
        assert len(str(error.value)) < 100
        assert "\n" not in str(error.value)


def test_unusable_images_are_refused_in_few_words():
    image = encode_image(bars(48, 96))
    bomb = io.BytesIO()
    Image.new("1", (1, 1)).save(bomb, "PNG")
    header = bytearray(bomb.getvalue())
    header[16:24] = struct.pack(">II", 60000, 60000)
    for media in (b"", image[: len(image) // 2], b"GIF89a" + bytes(20), bytes(header)):
        for read in (decode_image, lambda media: read_clip(media, "image", (1, 16, 16))):
            with pytest.raises(DataError) as error:
                read(media)
            assert len(str(error.value)) < 100


def test_hdr_video_is_refused_by_name():
    media = encode([bars(48, 96)] * 2, pixels="yuv420p10le", tags={"color_trc": 16})
    with pytest.raises(DataError, match="is HDR video"):
        read_clip(media, "video", (2, 48, 96))


def test_decoding_stops_at_its_deadline():
    media = encode_clip(moving(), 8.0)
    with pytest.raises(DataError, match="took more than 0 seconds"):
        read_clip(media, "video", (8, 48, 64), deadline_seconds=0.0)


def test_odd_sides_cannot_be_encoded():
    with pytest.raises(ConfigError, match=r"47x64 is wrong because H\.264"):
        encode_clip(moving()[:, :47], 8.0)


@pytest.mark.parametrize(
    ("file", "fps", "shown"),
    [
        ("av1_video.mkv", 25, (360, 640)),
        ("bt709_full_range.mp4", 30, (720, 1280)),
        ("h265_10bits.mp4", 30, (200, 200)),
        ("nasa_13013_rotated.mp4", 30000 / 1001, (480, 270)),
        ("test_non_zero_start.mp4", 30, (112, 199)),
        ("testsrc2_mpeg4.avi", 30, (720, 1280)),
        ("testsrc2_odd_height_and_width_444.mp4", 25, (241, 321)),
        ("testsrc2_vp9.webm", 30, (720, 1280)),
    ],
)
def test_odd_real_files_are_read(shared_clips: Path, file, fps, shown):
    read = read_clip((shared_clips / "odd" / file).read_bytes(), "video", (8, 36, 64))
    assert read.fps == pytest.approx(fps)
    assert (read.original_height, read.original_width) == shown
    assert read.clip.std() > 20  # a picture, not grey


def test_bars_of_real_test_pictures_have_their_colours(shared_clips: Path):
    """FFmpeg's test source shows red, green, yellow, blue, magenta and cyan at full strength."""
    for file in (
        "testsrc2_mpeg4.avi",
        "testsrc2_vp9.webm",
        "testsrc2_odd_height_and_width_444.mp4",
    ):
        clip = read_clip((shared_clips / "odd" / file).read_bytes(), "video", (1, 90, 160)).clip
        row = clip[0, 65, np.array([4, 20, 45, 75, 140, 156])].astype(int)
        names = ((255, 0, 0), (0, 255, 0), (255, 255, 0), (0, 0, 255), (255, 0, 255), (0, 255, 255))
        nearest = [min(names, key=lambda name: abs(color - name).sum()) for color in row]
        assert [abs(row[i] - nearest[i]).max() < 40 for i in range(6)] == [True] * 6
