"""Decoding and encoding of clips and images.

Two ways in: `read_clip` brings any media to a wanted size (building a dataset, foreign shards);
`decode_patches` reads what `build` stored, and converts only the frames that patches need.
A `DataError` from here says in a few words why the media is not usable; callers add where it is.
"""

import io
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.pyramid import Clip, Offsets, Patches, Pyramid, area_average, repeat_still
from data_pipeline.stages import stage

Picture = UInt8[np.ndarray, "height width 3"]
Size = tuple[int, int, int]

MAX_PIXELS = 8192 * 8192  # of one frame; larger ones are refused unread
# Playlists and other containers that name further files are no input.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv"
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
HDR_CURVES = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)
# The same pixels on every machine.
EXACT_RESIZE = (
    Interpolation.BICUBIC
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.ACCURATE_RND
    | Interpolation.BITEXACT
)
GOP_FRAMES = 32
# Between two P frames lie seven B frames, of which all but the middle one are referred to by no
# other: a reader that wants every eighth frame, and a few more, decodes a third of all.
X264_FRAMES = "bframes=7:b-adapt=0:b-pyramid=strict:scenecut=0"
CRF = 18
JPEG_QUALITY = 95


@dataclass(frozen=True)
class Media:
    """A source brought to a wanted size, and what it was before; an image has 0 fps."""

    clip: Clip
    fps: float
    original_height: int
    original_width: int
    original_fps: float


@dataclass(frozen=True)
class Probe:
    """What is known of media before it is decoded; sides as shown, 0 fps and seconds: an image."""

    frames: int
    fps: float
    height: int
    width: int
    seconds: float


def decode_clip(media: bytes) -> Clip:
    """Every frame of a stored clip."""
    with _open_video(media) as video:
        frames = [_rgb(frame) for frame in _frames(video, float("inf"))]
    if not frames:
        raise DataError("holds no frame")
    return np.stack(frames)


def decode_image(media: bytes) -> Picture:
    """A stored image."""
    with _open_image(media) as image:
        return np.array(image.convert("RGB"))


def decode_patches(
    media: bytes,
    kind: str,
    *,
    stored: Size,
    pyramid: Pyramid,
    offsets: Offsets,
    deadline_seconds: float = float("inf"),
) -> Patches:
    """The patches of a stored clip or image; `stored` is a whole multiple of the pyramid's clip.

    Equals `cut_patches(reduce_clip(decode_clip(media), ...), pyramid, offsets)` byte for byte.
    """
    frame_factor, *factors = reduction(stored, pyramid.clip_size, kind)
    frames = [
        (offset[0] + np.arange(pyramid.patch_size[0])) * pyramid.stride(level)[0] * frame_factor
        for level, offset in enumerate(offsets)
    ]
    if kind == "image":
        frames = [np.zeros(1, np.int64)] * pyramid.levels
        with stage("decode"):
            pictures = {0: decode_image(media)}
    else:
        pictures = _decode_frames(media, set(np.concatenate(frames).tolist()), deadline_seconds)
    for picture in pictures.values():
        if picture.shape[:2] != stored[1:]:
            raise DataError(f"is {picture.shape[:2]} pixels, not {stored[1:]} as its dataset")
    patches = []
    for level, numbers in enumerate(frames):
        _, *strides = pyramid.stride(level)
        rows, columns = (
            slice(offset * stride * factor, (offset + patch) * stride * factor)
            for offset, patch, stride, factor in zip(
                offsets[level, 1:].tolist(), pyramid.patch_size[1:], strides, factors, strict=True
            )
        )
        with stage("convert"):
            region = np.stack([pictures[number][rows, columns] for number in numbers.tolist()])
            patches.append(area_average(area_average(region, *factors), *strides))
    if kind == "image":
        patches = [repeat_still(patch[0], pyramid.patch_size[0]) for patch in patches]
    return np.stack(patches)


def reduction(stored: Size, wanted: Size, kind: str) -> Size:
    """Whole factors (frames, height, width) from stored clips to wanted ones; ConfigError if none.

    The frames of an image do not count: it is repeated.
    """
    stored_frames, frames = (1, 1) if kind == "image" else (stored[0], wanted[0])
    if stored_frames % frames or stored[1] % wanted[1] or stored[2] % wanted[2]:
        raise ConfigError(
            f"stored size {stored} is wrong because it is no whole multiple of the recipe's clip "
            f"size {wanted} on every axis (frames, height, width); build the dataset at that size."
        )
    return stored_frames // frames, stored[1] // wanted[1], stored[2] // wanted[2]


def reduce_clip(clip: Clip, factors: Size) -> Clip:
    """A clip with fewer frames (by stride) and pixels (by area average)."""
    return area_average(clip[:: factors[0]], factors[1], factors[2])


def read_clip(
    media: bytes,
    kind: str,
    size: Size,
    *,
    fps: float | None = None,
    start_seconds: float = 0.0,
    deadline_seconds: float = 1e9,
) -> Media:
    """Any media as a clip of a size: frames by time at `fps` (none: its own) from a start, pixels
    resized to cover and cropped around the centre. Images come as still clips."""
    if kind == "image":
        with _open_image(media) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        fitted = ImageOps.fit(upright, (size[2], size[1]), Image.Resampling.BICUBIC)
        still = repeat_still(np.array(fitted), size[0])
        return Media(still, 0.0, upright.height, upright.width, 0.0)
    with _open_video(media) as video:
        stream = video.streams.video[0]
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        if rate <= 0:
            raise DataError("has no frame rate")
        if fps and rate < 0.98 * fps:
            raise DataError(f"has {rate:g} frames per second, fewer than {fps:g}")
        aspect = float(stream.sample_aspect_ratio or 1)
        frames, shape = [], (0, 0)
        source = _frames(video, deadline_seconds, start_seconds)
        chosen = _frames_at(source, rate, fps or rate)
        for frame, _ in zip(chosen, range(size[0]), strict=False):
            picture, shape = _fitted(frame, size[1:], aspect)
            frames.append(picture)
    if len(frames) < size[0]:
        raise DataError(f"is too short: {len(frames)} of {size[0]} frames")
    return Media(np.stack(frames), fps or rate, *shape, rate)


def probe(media: bytes, kind: str) -> Probe:
    """What media says of itself; a video's first frame is decoded, the rest is taken on trust."""
    if kind == "image":
        with _open_image(media) as image:
            upright = ImageOps.exif_transpose(image)
        return Probe(1, 0.0, upright.height, upright.width, 0.0)
    with _open_video(media) as video:
        stream = video.streams.video[0]
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        if stream.duration and stream.time_base:
            seconds = float(stream.duration * stream.time_base)
        else:
            seconds = (video.duration or 0) / av.time_base
        for frame in _frames(video, float("inf")):
            shape = (frame.height, round(frame.width * float(stream.sample_aspect_ratio or 1)))
            height, width = shape[::-1] if frame.rotation // 90 % 2 else shape
            return Probe(stream.frames or round(seconds * rate), rate, height, width, seconds)
    raise DataError("holds no frame")


def count_frames(media: bytes, deadline_seconds: float) -> int:
    """How many frames a video has, each of them decoded."""
    with _open_video(media) as video:
        return sum(1 for _ in _frames(video, deadline_seconds))


def encode_clip(clip: Clip, fps: float) -> bytes:
    """H.264 in mp4, 4:2:0, BT.709; equal clips give equal bytes."""
    _, height, width, _ = clip.shape
    if height % 2 or width % 2:
        raise ConfigError(
            f"clip size {height}x{width} is wrong because H.264 4:2:0 needs even sides; change it."
        )
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": str(CRF), "preset": "medium", "x264-params": X264_FRAMES}
        codec = stream.codec_context
        codec.gop_size, codec.thread_count = GOP_FRAMES, 1
        codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for number, picture in enumerate(clip):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = frame.reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=EXACT_RESIZE,
                threads=1,
            )
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def encode_image(picture: Picture) -> bytes:
    """JPEG; equal pictures give equal bytes."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def _decode_frames(media: bytes, numbers: set[int], deadline_seconds: float) -> dict[int, Picture]:
    """The frames of these numbers; of the rest only those are decoded that others refer to."""
    deadline = time.monotonic() + deadline_seconds
    # What opening would find out by decoding the first frames, decoding itself finds again.
    with _open_video(media, stream_options=[{"skip_frame": "all"}]) as video:
        context = video.streams.video[0].codec_context
        packets = [packet for packet in video.demux(video=0) if packet.size]
        times = sorted(packet.pts for packet in packets if packet.pts is not None)
        wanted = {times[number]: number for number in numbers if number < len(times)}
        if len(wanted) < len(numbers):
            raise DataError(f"ends before frame {max(numbers)}")
        last = max(turn for turn, packet in enumerate(packets) if packet.pts in wanted)
        pictures = {}
        for packet in [*packets[: last + 1], None]:
            is_wanted = packet is None or packet.pts in wanted
            context.skip_frame = "DEFAULT" if is_wanted else "NONREF"
            _refuse_late(deadline, deadline_seconds)
            with stage("decode"):
                frames = context.decode(packet)
            for frame in frames:
                _refuse_mended(frame)
                if frame.pts in wanted:
                    with stage("convert"):
                        pictures[wanted[frame.pts]] = _rgb(frame)
    if len(pictures) < len(numbers):
        raise DataError(f"lacks frame {min(numbers - pictures.keys())}")
    return pictures


@contextmanager
def _open_video(media: bytes, **options: Any) -> Iterator[InputContainer]:
    try:
        with av.open(
            io.BytesIO(media), "r", options={"format_whitelist": CONTAINERS}, **options
        ) as container:
            if not container.streams.video:
                raise DataError("holds no video")
            stream = container.streams.video[0]
            stream.thread_type, stream.codec_context.thread_count = "NONE", 1
            if stream.width * stream.height > MAX_PIXELS:
                raise DataError(f"has frames of {stream.width}x{stream.height}, too large to read")
            yield container
    except (av.FFmpegError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be decoded ({getattr(error, 'strerror', error)})") from None


def _frames(
    video: InputContainer, deadline_seconds: float, start_seconds: float = 0.0
) -> Iterator[av.VideoFrame]:
    """The frames from a start on; decoders hide damage, so a frame they mended is refused."""
    deadline = time.monotonic() + deadline_seconds
    begin = _seek(video, start_seconds) if start_seconds else float("-inf")
    for frame in video.decode(video=0):
        _refuse_late(deadline, deadline_seconds)
        if frame.time is None or frame.time >= begin:
            _refuse_mended(frame)
            yield frame


def _refuse_late(deadline: float, deadline_seconds: float) -> None:
    if time.monotonic() > deadline:
        raise DataError(f"took more than {deadline_seconds:g} seconds to decode")


def _refuse_mended(frame: av.VideoFrame) -> None:
    if frame.is_corrupt:
        raise DataError("holds damaged frames")


def _seek(video: InputContainer, start_seconds: float) -> float:
    """Go to the key frame before a start, counted from the first frame; the first time due."""
    stream = video.streams.video[0]
    time_base = stream.time_base or Fraction(1, av.time_base)
    first = (stream.start_time or 0) * time_base
    video.seek(int((float(first) + start_seconds) / time_base), stream=stream)
    slack = 0.25 / float(stream.average_rate or stream.guessed_rate or 25)
    return float(first) + start_seconds - slack


def _rgb(frame: av.VideoFrame) -> Picture:
    return frame.reformat(format="rgb24", threads=1).to_ndarray()


def _frames_at(frames: Iterator[av.VideoFrame], rate: float, fps: float) -> Iterator[av.VideoFrame]:
    """The frame shown at times 0, 1/fps, 2/fps, ... after the first; a quarter frame of slack
    absorbs rounded time stamps."""
    step, slack = 1 / fps, 0.25 / rate
    shown, start, due, begin = None, None, 0.0, 0.0
    for number, frame in enumerate(frames):
        at = number / rate if frame.time is None else frame.time
        start = at if start is None else start
        begin = at - start
        while shown is not None and due + slack < begin:
            yield shown
            due += step
        shown = frame
    while shown is not None and due + slack < begin + 1 / rate:
        yield shown
        due += step


def _fitted(
    frame: av.VideoFrame, size: tuple[int, int], aspect: float
) -> tuple[Picture, tuple[int, int]]:
    """A frame upright, covering (height, width), cropped; and the (height, width) it is shown at.

    `aspect` is the width of a stored pixel over its height.
    """
    if frame.color_trc in HDR_CURVES:
        raise DataError("is HDR video, whose brightness would be wrong")
    if frame.rotation % 90:
        raise DataError(f"is rotated by {frame.rotation} degrees")
    quarter_turns = frame.rotation // 90 % 4
    shown = (frame.height, round(frame.width * aspect))
    wanted = size[::-1] if quarter_turns % 2 else size
    scale = max(want / have for want, have in zip(wanted, shown, strict=True))
    height, width = (
        max(want, round(have * scale)) for want, have in zip(wanted, shown, strict=True)
    )
    resized = frame.reformat(
        width=width, height=height, format="rgb24", interpolation=EXACT_RESIZE, threads=1
    ).to_ndarray()
    top, left = (height - wanted[0]) // 2, (width - wanted[1]) // 2
    picture = resized[top : top + wanted[0], left : left + wanted[1]]
    return np.rot90(picture, quarter_turns), shown[::-1] if quarter_turns % 2 else shown


@contextmanager
def _open_image(media: bytes) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(media), formats=IMAGE_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise DataError(f"is {image.width}x{image.height}, too large to read")
                yield image
    except UnidentifiedImageError:
        raise DataError("cannot be decoded (not JPEG, PNG or WebP)") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot be decoded ({error})") from None
