"""How many clips a second `build` makes on one core, against FFmpeg doing no more than that work.

    python -m benchmarks.build [--minutes 10] [--out benchmarks/results/build-x86-64-2cpu.json]

Films of 1280x720 (drifting texture, blurred, with one change of scene) become clips of 64x288x512:
one of each film, as many as fit, or as many as fit between changes of scene. `bare` is FFmpeg's
libraries as `build` has them, in one pass of each film that decodes, scales and encodes by the same
settings and checks nothing; `ffmpeg` is the program, where one is installed. Both are told where
clips begin; for scenes, they look for changes nevertheless, by `scdet`. All run in turn, each on
one thread; seconds are of the processor, a build's of all that it does: list, plan, check, write,
index, and draw a contact sheet. Lists, and requests to a store, are in benchmarks/lists.py.
"""

import argparse
import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from fractions import Fraction
from pathlib import Path

import av
import cv2
from av.filter import Graph

from benchmarks.damage import film
from data_pipeline.making.build import build
from data_pipeline.media.clips import Cut
from data_pipeline.media.codec import CRF, GOP_FRAMES, X264_FRAMES, X264_SAME_BYTES

FRAMES, HEIGHT, WIDTH, FPS = 64, 288, 512, 24
SCENE_FRAMES = 132  # two clips and a rest
STARTS = {"none": (0,), "length": (0, 64, 128, 192), "scenes": (0, 64, 132, 196)}
FILMS = {"none": 8, "length": 4, "scenes": 4}
X264 = {"crf": str(CRF), "preset": "medium", "x264-params": f"{X264_FRAMES}:{X264_SAME_BYTES}"}


def write_film(path: Path) -> None:
    """H.264 as it is found, with a change of scene in its middle; and a caption."""
    texture = [cv2.resize(p, (1280, 720)) for p in film(SCENE_FRAMES // 2, HEIGHT, WIDTH)]
    there = [cv2.GaussianBlur(picture, (0, 0), 2.0) for picture in texture]
    scene = [*there, *there[::-1]]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "fast", "crf": "20"})
        stream.height, stream.width, stream.pix_fmt = 720, 1280, "yuv420p"
        for number, picture in enumerate([*scene, *(255 - picture[::-1] for picture in scene)]):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    path.with_suffix(".txt").write_text("a drifting texture")


def ours(films: Sequence[Path], cut: Cut) -> float:
    """Processor seconds of a build."""
    with tempfile.TemporaryDirectory() as out:
        begun = time.process_time()
        data = build(
            films[0].parent, f"{out}/o", frames=FRAMES, height=HEIGHT, width=WIDTH, cut=cut
        )
        taken = time.process_time() - begun
    assert data is not None
    assert data.info.samples == len(films) * len(STARTS[cut])
    return taken


def bare(films: Sequence[Path], cut: Cut) -> float:
    """Processor seconds of the same clips by FFmpeg's libraries."""
    begun = time.process_time()
    for path in films:
        with av.open(str(path)) as container:
            video = container.streams.video[0]
            video.thread_type = "NONE"
            look = watch(video) if cut == "scenes" else None
            starts, frames = list(STARTS[cut]), container.decode(video)
            for number, frame in enumerate(frames):
                if look:
                    look(frame)
                if starts and number == starts[0]:
                    writer = av.open(io.BytesIO(), "w", format="mp4")
                    stream = writer.add_stream("libx264", rate=FPS, options=X264)
                    stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
                    stream.codec_context.gop_size, stream.codec_context.thread_count = GOP_FRAMES, 1
                if not starts or number < starts[0]:
                    continue
                small = frame.reformat(WIDTH, HEIGHT, "yuv420p", interpolation="BICUBIC", threads=1)
                small.pts, small.time_base = number - starts[0], Fraction(1, FPS)
                writer.mux(stream.encode(small))
                if number == starts[0] + FRAMES - 1:
                    writer.mux(stream.encode())
                    writer.close()
                    starts.pop(0)
                    if not starts and cut == "none":
                        break
    return time.process_time() - begun


def watch(video: av.VideoStream) -> Callable[[av.VideoFrame], None]:
    """A look for changes of scene at each frame."""
    graph = Graph()
    graph.threads = 1
    parts = (graph.add("scale", "256:-2"), graph.add("scdet"), graph.add("buffersink"))
    graph.link_nodes(graph.add_buffer(template=video), *parts).configure()

    def look(frame: av.VideoFrame) -> None:
        graph.vpush(frame)
        graph.vpull()

    return look


def program(films: Sequence[Path], cut: Cut) -> float:
    """Processor seconds of the same clips by the program."""
    starts, taken = STARTS[cut], 0.0
    chosen = "+".join(f"between(n,{start},{start + FRAMES - 1})" for start in starts)
    clip = f"select='{chosen}',scale={WIDTH}:{HEIGHT}:flags=bicubic,setpts=N/{FPS}/TB"
    looks = f"split[a][b];[a]scale=256:-2,scdet,nullsink;[b]{clip}"
    ends = [str(FRAMES * number) for number in range(1, len(starts))] or ["1000000"]
    options = ["-filter_complex", looks if cut == "scenes" else clip, "-filter_complex_threads",
               "1", "-frames:v", str(FRAMES * len(starts)), "-r", str(FPS), "-pix_fmt", "yuv420p",
               "-c:v", "libx264", "-threads", "1", "-g", str(GOP_FRAMES),
               *(word for name, value in X264.items() for word in (f"-{name}", value)),
               "-force_key_frames", f"expr:eq(mod(n,{FRAMES}),0)", "-f", "segment",
               "-segment_frames", ",".join(ends), "-segment_format", "mp4"]  # fmt: skip
    for path in films:
        with tempfile.TemporaryDirectory() as out:
            begin = ["ffmpeg", "-v", "error", "-threads", "1", "-i", str(path), "-an"]
            job = subprocess.Popen([*begin, *options, f"{out}/%d.mp4"])
            _, status, used = os.wait4(job.pid, 0)
            job.returncode = os.waitstatus_to_exitcode(status)
            assert not job.returncode
            assert len(os.listdir(out)) == len(starts)
        taken += used.ru_utime + used.ru_stime
    return taken


def main() -> None:
    """Measure in turn until the time is over, print, and keep the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="begin no round after these")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    begun = time.monotonic()
    cv2.setNumThreads(1)
    ways = {"build": ours, "bare": bare} | ({"ffmpeg": program} if shutil.which("ffmpeg") else {})
    seconds: dict[tuple[str, str], list[float]] = {(c, way): [] for c in STARTS for way in ways}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_film(folder / "film.mp4")
        for cut, count in FILMS.items():
            (folder / cut).mkdir()
            for copy, suffix in ((n, s) for n in range(count) for s in (".mp4", ".txt")):
                shutil.copy(folder / f"film{suffix}", folder / cut / f"{copy:06d}{suffix}")
        ours(sorted((folder / "none").glob("*.mp4")), "none")  # loads what is loaded once
        for _ in range(options.rounds):
            if time.monotonic() - begun > 60 * options.minutes:
                break
            for (cut, way), taken in seconds.items():
                taken.append(ways[way](sorted((folder / cut).glob("*.mp4")), cut))
                print(cut, way, round(taken[-1], 2), flush=True)
    result: dict = {"date": date.today().isoformat(), "pyav": av.__version__,
                    "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
                    "rounds": len(seconds["none", "build"]), "cuts": []}  # fmt: skip
    for cut, starts in STARTS.items():
        clips = FILMS[cut] * len(starts)
        told: dict = {"cut": cut, "clips": clips}
        for way in ways:
            median = statistics.median(seconds[cut, way])
            told[f"{way}_clips_per_core_second"] = round(clips / median, 3)
            if way != "build":
                pairs = zip(seconds[cut, way], seconds[cut, "build"], strict=True)
                ratios = sorted(round(theirs / own, 3) for theirs, own in pairs)
                told[f"times_{way}"] = {"median": statistics.median(ratios),
                                        "range": [ratios[0], ratios[-1]]}  # fmt: skip
        result["cuts"].append(told)
        print(told)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
