"""How fast clips are scored on one core, against decoding them alone, and hashes are compared.

    python -m benchmarks.score [--out benchmarks/results/score-x86-64-2cpu.json]

A clip is drifting texture under noise, at its size and enlarged, as `build` writes it; or the same
blurred, which takes few bits, as calm films do. `bare` decodes all frames and converts none,
`checked` looks for damage and times on the way, as all reading of ours does, and `score` is all of
`t2v data score` but the files. Seconds are of the processor, medians of rounds in turn. Hashes are
random, a tenth of them copies with some bits changed.
"""

import argparse
import io
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date

import av
import cv2
import numpy as np

from benchmarks.damage import film
from data_pipeline.making.duplicates import originals
from data_pipeline.media.codec import encode_clip
from data_pipeline.media.container import open_video, read_shots
from data_pipeline.media.measures import measure_media

FRAMES, SIZES, BLURS = 64, ((288, 512), (720, 1280)), (0.0, 4.0)
HASHES = (10_000, 100_000, 1_000_000)


def bare(media: bytes) -> None:
    """Decode every frame by one thread."""
    with av.open(io.BytesIO(media)) as container:
        container.streams.video[0].thread_type = "NONE"
        for _ in container.decode(video=0):
            pass


def checked(media: bytes) -> None:
    """Decode every frame, and look for damage."""
    for _ in read_shots(open_video(media), [(0.0, math.inf)]):
        pass


def score(media: bytes) -> None:
    """Measure a clip."""
    measure_media(media, "video")


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds of the processor."""
    begun = time.process_time()
    run()
    return time.process_time() - begun


def clips_per_second(size: tuple[int, int], blur: float, rounds: int) -> dict:
    """Of one size, by each way."""
    pictures = [cv2.resize(picture, size[::-1]) for picture in film(FRAMES, *SIZES[0])]
    if blur:
        pictures = [cv2.GaussianBlur(picture, (0, 0), blur) for picture in pictures]
    media = encode_clip(np.stack(pictures), 24.0)
    found: dict[str, list[float]] = {way.__name__: [] for way in (bare, checked, score)}
    for _ in range(rounds):
        for way in (bare, checked, score):
            found[way.__name__].append(seconds_of(lambda way=way: way(media)))
    middle = {name: statistics.median(times) for name, times in found.items()}
    return {
        "size": "x".join(map(str, (FRAMES, *size))),
        "blurred": bool(blur),
        "kilobytes": round(len(media) / 1e3),
        "clips_per_core_second": {name: round(1 / value, 2) for name, value in middle.items()},
        "score_over_bare": round(middle["score"] / middle["bare"], 2),
    }


def hashes_per_second(count: int) -> dict:
    """Of so many clips."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 256, (count, 32), np.uint8)
    copies = hashes[: count // 10].copy()
    copies[:, 0] ^= rng.integers(0, 256, len(copies), np.uint8)
    hashes[-len(copies) :] = copies
    found: list[np.ndarray] = []
    seconds = seconds_of(lambda: found.append(originals(hashes)))
    alike = int((found[0] != np.arange(count)).sum())
    return {"clips": count, "cpu_seconds": round(seconds, 2), "duplicates": alike}


def main() -> None:
    """Measure, print, and keep the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", default="benchmarks/results/score-x86-64-2cpu.json")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "opencv": cv2.__version__,
        "clips": [clips_per_second(size, blur, options.rounds) for size in SIZES for blur in BLURS],
        "hashes": [hashes_per_second(count) for count in HASHES],
    }
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="")
    with open(options.out, "w", encoding="utf-8") as file:
        file.write(text)


if __name__ == "__main__":
    main()
