"""HDR video in the brightness and colours of a usual screen, by FFmpeg's scaler."""

from functools import lru_cache

import av
from av.filter import Graph

from data_pipeline.media.picture import HDR_CURVES

UNTOLD = 2  # of matrices and primaries
SDR = "out_transfer=bt709:out_primaries=bt709:out_color_matrix=bt709:intent=perceptual"


def to_sdr(frame: av.VideoFrame) -> av.VideoFrame:
    """A frame whose brightness is PQ or HLG as one of BT.709 in RGB, its colours being those of
    BT.2020 unless it tells others; any other frame as it is."""
    if frame.color_trc not in HDR_CURVES:
        return frame
    matrix = "bt2020nc" if frame.colorspace == UNTOLD else int(frame.colorspace)
    told = (f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base=1/1:"
            f"colorspace={matrix}:range={int(frame.color_range)}")  # fmt: skip
    graph = _graph(told, SDR + ":in_primaries=bt2020" * (frame.color_primaries == UNTOLD))
    graph.vpush(frame)
    return graph.vpull()


@lru_cache(maxsize=4)
def _graph(told: str, scaling: str) -> Graph:
    graph = Graph()
    graph.threads = 1
    parts = [("buffer", told), ("scale", scaling), ("format", "gbrp"), ("buffersink", None)]
    graph.link_nodes(*(graph.add(*part) for part in parts)).configure()
    return graph
