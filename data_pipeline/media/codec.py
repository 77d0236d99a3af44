"""What `build` stores and samples are: clips in H.264 and images in JPEG, written and read.

`decode_patches` converts only the frames that patches need. A `DataError` from here says in a few
words why the media is not usable; callers add where it is.
"""

import io
import math
import time
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.media.clips import Size
from data_pipeline.media.container import choose_streams, open_container, read_packets
from data_pipeline.media.damage import Decoder
from data_pipeline.media.image import open_image
from data_pipeline.media.orientation import Orientation, Picture, orientation_of
from data_pipeline.media.picture import EXACT_RESIZE, picture_of
from data_pipeline.pyramid import Clip, Offsets, Patches, Pyramid, area_average, repeat_still
from data_pipeline.stages import stage

GOP_FRAMES = 32
# Between two P frames lie seven B frames, of which all but the middle one are referred to by no
# other: a reader that wants every eighth frame, and a few more, decodes a third of all.
X264_FRAMES = "bframes=7:b-adapt=0:b-pyramid=strict:scenecut=0"
# The bit budget of macroblocks by plain C, the same on every CPU: x264's AVX-512 code for it reads
# memory that nobody wrote, so that one clip gives many files.
X264_SAME_BYTES = "cpu-independent=1"
CRF = 18
# More than the index of any clip of ours takes: six numbers of a frame, and what comes once.
INDEX_BYTES, INDEX_BYTES_PER_FRAME = 2048, 32
JPEG_QUALITY = 95


def decode_clip(media: bytes) -> Clip:
    """Every frame of a clip, pixel by pixel."""
    pictures = [picture_of(frame, orientation_of(frame)) for frame in _frames(media)]
    if not pictures:
        raise DataError("holds no frame")
    if len({picture.shape for picture in pictures}) > 1:
        raise DataError("changes its size on the way")
    return np.stack(pictures)


def decode_image(media: bytes) -> Picture:
    """An image, pixel by pixel."""
    return np.array(open_image(media))


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


def count_frames(media: bytes, deadline_seconds: float) -> int:
    """How many frames a video has, each of them decoded."""
    return sum(1 for _ in _frames(media, deadline_seconds))


def encode_clip(clip: Clip, fps: float, *, index_first: bool = False) -> bytes:
    """H.264 in mp4, 4:2:0, BT.709; equal clips give equal bytes. With its index first, a clip is
    shown by browsers while it loads; it is 2 kB larger."""
    frames, height, width, _ = clip.shape
    if height % 2 or width % 2:
        raise ConfigError(
            f"clip size {height}x{width} is wrong because H.264 4:2:0 needs even sides; change it."
        )
    buffer = io.BytesIO()
    options = {"fflags": "+bitexact"}
    if index_first:  # FFmpeg's faststart, which needs a file to read again, does the same
        options["moov_size"] = str(INDEX_BYTES + INDEX_BYTES_PER_FRAME * frames)
    with av.open(buffer, "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        parameters = f"{X264_FRAMES}:{X264_SAME_BYTES}"
        stream.options = {"crf": str(CRF), "preset": "medium", "x264-params": parameters}
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
    with open_container(media, stream_options=[{"skip_frame": "all"}]) as container:
        stream = choose_streams(container)[0]
        context = stream.codec_context
        packets = [packet for packet in container.demux(stream) if packet.size]
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
                if frame.is_corrupt:
                    raise DataError("is damaged: frames were mended")
                if frame.pts in wanted:
                    with stage("convert"):
                        pictures[wanted[frame.pts]] = picture_of(frame, Orientation())
    if len(pictures) < len(numbers):
        raise DataError(f"lacks frame {min(numbers - pictures.keys())}")
    return pictures


def _frames(media: bytes, deadline_seconds: float = math.inf) -> Iterator[av.VideoFrame]:
    """All frames of a clip."""
    deadline = time.monotonic() + deadline_seconds
    with open_container(media) as container:
        stream = choose_streams(container)[0]
        decoder = Decoder(stream)
        for packet in read_packets(container, [stream]):
            _refuse_late(deadline, deadline_seconds)
            yield from decoder.decode(packet, follows=True)


def _refuse_late(deadline: float, deadline_seconds: float) -> None:
    if time.monotonic() > deadline:
        raise DataError(f"took more than {deadline_seconds:g} seconds to decode")
