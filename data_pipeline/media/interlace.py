"""Frames that were woven of two fields, made whole (bwdif, which FFmpeg brings along)."""

import av
from av.error import BlockingIOError, EOFError
from av.filter import Graph


class Deinterlacer:
    """Lets frames through as they are until one says it is interlaced, and mends from there on."""

    def __init__(self) -> None:
        self._graph: Graph | None = None
        self._shape = (0, 0, "")

    def mend(self, frames: list[av.VideoFrame], *, is_end: bool = False) -> list[av.VideoFrame]:
        """The frames that are ready with these, in order; bwdif waits for the next one."""
        ready = []
        for frame in frames:
            shape = (frame.width, frame.height, frame.format.name)
            if self._graph and shape != self._shape:
                ready += self._finish()
            if self._graph is None and frame.interlaced_frame:
                self._graph, self._shape = _graph(frame), shape
            if self._graph is None:
                ready.append(frame)
            else:
                self._graph.vpush(frame)
                ready += _pull(self._graph)
        return ready + self._finish() if is_end else ready

    def _finish(self) -> list[av.VideoFrame]:
        graph, self._graph = self._graph, None
        if graph is None:
            return []
        graph.vpush(None)
        return _pull(graph)


def _pull(graph: Graph) -> list[av.VideoFrame]:
    ready = []
    while True:
        try:
            ready.append(graph.vpull())
        except (BlockingIOError, EOFError):
            return ready


def _graph(frame: av.VideoFrame) -> Graph:
    graph = Graph()
    graph.threads = 1
    source = graph.add_buffer(
        width=frame.width,
        height=frame.height,
        format=frame.format,
        time_base=frame.time_base,
    )
    graph.link_nodes(
        source,
        graph.add("bwdif", "mode=send_frame:deint=interlaced"),
        graph.add("buffersink"),
    ).configure()
    return graph
