"""From a decoded frame to the picture that people see: upright, in sRGB, over white."""

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.video.reformatter import ColorTrc, Interpolation
from jaxtyping import UInt8

from data_pipeline.errors import NotWanted
from data_pipeline.media.orientation import Orientation, Picture

# The same pixels on every machine.
EXACT_RESIZE = (
    Interpolation.BICUBIC
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.ACCURATE_RND
    | Interpolation.BITEXACT
)
HDR_CURVES = {ColorTrc.SMPTE2084: "PQ", ColorTrc.ARIB_STD_B67: "HLG"}
CURVES = (
    *(ColorTrc.UNSPECIFIED, ColorTrc.BT709, ColorTrc.GAMMA22, ColorTrc.GAMMA28),
    *(ColorTrc.SMPTE170M, ColorTrc.SMPTE240M, ColorTrc.IEC61966_2_4, ColorTrc.BT1361_ECG),
    *(ColorTrc.IEC61966_2_1, ColorTrc.BT2020_10, ColorTrc.BT2020_12),
)
# RGB, BT.709, none told, FCC, BT.470, SMPTE 170M and 240M, BT.2020: what swscale converts.
MATRICES = (0, 1, 2, 4, 5, 6, 7, 9)


def shown_size(frame: av.VideoFrame, upright: Orientation, aspect: float) -> tuple[int, int]:
    """(height, width) that a frame is shown at; `aspect`: width of a stored pixel / its height."""
    return upright.turn_size((frame.height, max(1, round(frame.width * aspect))))


def picture_of(frame: av.VideoFrame, upright: Orientation) -> Picture:
    """A frame as it is shown, pixel by pixel."""
    refuse_strange_colours(frame)
    return np.ascontiguousarray(upright.turn(_pixels(over_white(frame), "rgb24")))


def fitted_picture(
    frame: av.VideoFrame, upright: Orientation, aspect: float, size: tuple[int, int]
) -> Picture:
    """A frame as it is shown, covering (height, width) and cropped around the centre."""
    refuse_strange_colours(frame)
    stored = (frame.height, max(1, round(frame.width * aspect)))
    wanted = upright.turn_size(size)
    scale = max(want / have for want, have in zip(wanted, stored, strict=True))
    height, width = (
        max(want, round(have * scale)) for want, have in zip(wanted, stored, strict=True)
    )
    shown = over_white(frame)
    # Of YUV, planes come out with the same bytes as rows of RGB, and twice as fast.
    layout = "rgb24" if shown.format.is_rgb or shown.format.has_palette else "gbrp"
    resized = shown.reformat(
        width=width, height=height, format=layout, interpolation=EXACT_RESIZE, threads=1
    ).to_ndarray()
    top, left = (height - wanted[0]) // 2, (width - wanted[1]) // 2
    return upright.turn(resized[top : top + wanted[0], left : left + wanted[1]])


def over_white(frame: av.VideoFrame) -> av.VideoFrame:
    """A frame without transparency: what was behind it is white."""
    kind = frame.format
    if not (kind.has_palette or any(component.is_alpha for component in kind.components)):
        return frame
    pixels = _pixels(frame, "rgba")
    alpha = pixels[..., 3:].astype(np.uint32)
    if alpha.min() == 255:
        return frame
    blended = (pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255
    return av.VideoFrame.from_ndarray(blended.astype(np.uint8), format="rgb24")


def refuse_strange_colours(frame: av.VideoFrame) -> None:
    """NotWanted for brightness and colours that would come out wrong."""
    if frame.color_trc in HDR_CURVES:
        raise NotWanted(f"is HDR video: its brightness is {HDR_CURVES[frame.color_trc]}")
    if Type.DOVI_METADATA in frame.side_data and frame.color_trc == ColorTrc.UNSPECIFIED:
        raise NotWanted("is HDR video: Dolby Vision")
    if frame.color_trc not in CURVES:
        raise NotWanted(f"has a strange brightness curve: number {int(frame.color_trc)}")
    if frame.colorspace not in MATRICES:
        raise NotWanted(f"has a strange colour matrix: number {int(frame.colorspace)}")


def _pixels(frame: av.VideoFrame, layout: str) -> UInt8[np.ndarray, "height width channels"]:
    return frame.reformat(format=layout, threads=1).to_ndarray()
