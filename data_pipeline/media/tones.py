"""HDR video in the brightness and colours of a usual screen, by FFmpeg's scaler."""

from functools import lru_cache

import av
from av.filter import Graph

from data_pipeline.media.picture import HDR_CURVES

SDR = "out_transfer=bt709:out_primaries=bt709:out_color_matrix=bt709:intent=perceptual"


def to_sdr(frame: av.VideoFrame) -> av.VideoFrame:
    """A frame whose brightness is PQ or HLG as one of BT.709 in RGB; any other as it is."""
    if frame.color_trc not in HDR_CURVES:
        return frame
    told = (f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base=1/1:"
            f"colorspace={int(frame.colorspace)}:range={int(frame.color_range)}")  # fmt: skip
    graph = _graph(told)
    graph.vpush(frame)
    return graph.vpull()


@lru_cache(maxsize=4)
def _graph(told: str) -> Graph:
    graph = Graph()
    graph.threads = 1
    parts = [("buffer", told), ("scale", SDR), ("format", "gbrp"), ("buffersink", None)]
    graph.link_nodes(*(graph.add(*part) for part in parts)).configure()
    return graph
