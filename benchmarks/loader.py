"""Loading clips beside its alternatives: clips per second of one process, from disk and from S3.

`plain` is webdataset with PyAV: the clip becomes a float tensor, pooled for each level, of which
patches are cut. `bare` decodes all frames and does nothing else. `ours` is the project's loader.
Each lives in its own process of one thread; they take turns clip batch by clip batch, so that
whatever disturbs the machine disturbs all. All read the same shards; what `plain` and `ours` make
of a clip is compared first. S3 is a local moto server; `bare` and `ours` read through the cache on
disk, empty at first.
"""

import argparse
import io
import json
import multiprocessing
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import av
import boto3
import numpy as np
import torch
import torch.nn.functional as F
import webdataset
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from data_pipeline.feeding.config import DataConfig, NoConditioning, Source
from data_pipeline.feeding.loader import Loader
from data_pipeline.making.build import build
from data_pipeline.media.codec import decode_patches, encode_clip
from data_pipeline.pyramid import Offsets, Patches, Pyramid, draw_offsets
from data_pipeline.shards.dataset import commit_dataset, open_dataset
from data_pipeline.shards.tar import write_index, write_tar

ROOT = Path(__file__).parent.parent
PYRAMID = Pyramid(levels=4, patch_size=(8, 36, 64), clip_size=(64, 288, 512))
PLAIN, BARE, OURS = "plain webdataset", "bare decoding", "ours"
CONTENDERS = (PLAIN, BARE, OURS)
BUCKET = "bench"


def draw_clip(seed: int) -> np.ndarray:
    """Textured background that pans, a textured patch that moves otherwise, and camera noise."""
    rng = np.random.default_rng(seed)
    far, near = (
        np.asarray(Image.fromarray(rng.integers(0, 256, (*coarse, 3), np.uint8)).resize(fine))
        for coarse, fine in (((40, 70), (700, 420)), ((12, 14), (180, 140)))
    )
    clip = np.empty((*PYRAMID.clip_size, 3), np.uint8)
    for number, picture in enumerate(clip):
        picture[:] = far[number // 2 : number // 2 + 288, number : number + 512]
        top, left = 20 + 2 * number, 300 - 4 * number
        picture[top : top + 140, left : left + 180] = near
        noise = rng.normal(0, 2, (288, 512, 1))
        picture[:] = np.clip(picture + noise, 0, 255)
    return clip


def draw_dataset(folder: Path, *, clips: int) -> None:
    """A dataset of drawn clips in shards of 16."""
    names = []
    for first in track(range(0, clips, 16), "clips", console=Console(stderr=True)):
        names.append(f"{len(names):06d}")
        samples = []
        for number in range(first, min(first + 16, clips)):
            text = json.dumps(
                {"caption": "", "fps": 24.0, "original_height": 288, "original_width": 512}
            )
            media = encode_clip(draw_clip(number), 24.0)
            samples.append((f"{number:06d}", {"mp4": media, "json": text.encode()}))
        write_tar(f"{folder}/shards/{names[-1]}.tar", samples)
        write_index(f"{folder}/shards", names[-1], "video")
    commit_dataset(
        str(folder), names, kind="video", folder="shards", clip=PYRAMID.clip_size, fps=24.0,
        notes={},
    )  # fmt: skip


def pooled_patches(media: bytes, offsets: Offsets) -> Patches:
    """Patches by way of the whole clip as floats at each level."""
    with av.open(io.BytesIO(media)) as video:
        video.streams.video[0].thread_type = "NONE"
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    clip = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 255
    patches = []
    for level, (t, h, w) in enumerate(offsets.tolist()):
        by_t, *strides = PYRAMID.stride(level)
        whole = F.avg_pool2d(clip[::by_t], strides)
        frames_of, height, width = PYRAMID.patch_size
        patches.append(whole[t : t + frames_of, :, h : h + height, w : w + width])
    result = (torch.stack(patches) * 255).round().to(torch.uint8)
    return result.permute(0, 1, 3, 4, 2).numpy()


def plain(path: str, url: str) -> Iterator[object]:
    shards = [f"{url}/shards/{shard.name}.tar" for shard in open_dataset(path).info.shards]
    rng = np.random.default_rng(0)
    while True:
        for sample in webdataset.WebDataset(shards, shardshuffle=False):
            yield pooled_patches(sample["mp4"], draw_offsets(PYRAMID, rng))


def bare(path: str, _url: str) -> Iterator[object]:
    dataset = open_dataset(path)
    while True:
        for shard, info in enumerate(dataset.info.shards):
            for row in range(info.samples):
                with av.open(io.BytesIO(dataset.read(shard, row).media)) as video:
                    video.streams.video[0].thread_type = "NONE"
                    for _ in video.decode(video=0):
                        pass
                yield None


def ours(path: str, _url: str) -> Iterator[object]:
    loader = Loader(
        DataConfig(sources=[Source(path=path)], num_workers=0),
        PYRAMID,
        NoConditioning(kind="none"),
        seed=0,
        global_batch_size=1,
        micro_batch_size=1,
        rank=0,
        world_size=1,
    )
    for (batch,) in loader.steps(0, 10**9):
        yield batch


def contend(name: str, path: str, url: str, environment: dict[str, str], pipe: Connection) -> None:
    """A contender's process: asked for a number of clips, it answers (wall, CPU) seconds."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    make: Callable[[str, str], Iterator[object]]
    make = {PLAIN: plain, BARE: bare, OURS: ours}[name]
    clips = make(path, url)
    while count := pipe.recv():
        begin, begin_cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            next(clips)
        pipe.send((time.perf_counter() - begin, time.process_time() - begin_cpu))


def race(
    path: str, url: str, environment: dict[str, str], *, rounds: int, clips: int
) -> dict[str, dict[str, float]]:
    """Clips per second (median of rounds) of each contender, by the wall clock and by CPU time."""
    context = multiprocessing.get_context("spawn")
    pipes, processes, seconds = {}, [], {name: [] for name in CONTENDERS}
    for name in CONTENDERS:
        pipes[name], theirs = context.Pipe()
        process = context.Process(
            target=contend, args=(name, path, url, environment, theirs), daemon=True
        )
        process.start()
        processes.append(process)
    for pipe in pipes.values():  # warm up
        pipe.send(2)
        pipe.recv()
    for _ in track(range(rounds), f"race on {url}", console=Console(stderr=True)):
        for name, pipe in pipes.items():
            pipe.send(clips)
            seconds[name].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(0)
    for process in processes:
        process.join()
    return {
        name: {
            "clips_per_second": clips / statistics.median(wall for wall, _ in taken),
            "clips_per_cpu_second": clips / statistics.median(cpu for _, cpu in taken),
        }
        for name, taken in seconds.items()
    }


def largest_difference(path: str, samples: int = 4) -> int:
    """Between the pixels that `plain` and `ours` make of the same windows."""
    dataset, rng, worst = open_dataset(path), np.random.default_rng(1), 0
    for row in range(samples):
        media, offsets = dataset.read(0, row).media, draw_offsets(PYRAMID, rng)
        patches = decode_patches(
            media, "video", stored=PYRAMID.clip_size, pyramid=PYRAMID, offsets=offsets
        )
        difference = patches.astype(int) - pooled_patches(media, offsets)
        worst = max(worst, int(abs(difference).max()))
    return worst


def upload(folder: Path, endpoint: str) -> None:
    """Put a dataset into the local server's bucket."""
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    client.create_bucket(Bucket=BUCKET)
    for file in folder.rglob("*"):
        if file.is_file():
            client.upload_file(
                str(file), BUCKET, str(file.relative_to(folder)), ExtraArgs={"ACL": "public-read"}
            )


def race_on_s3(folder: Path, cache: str, *, rounds: int, clips: int) -> dict:
    """The same race with every shard behind a local S3 server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    environment = {
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench",
        "T2V_CACHE": cache,
    }
    os.environ.update(environment)
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        upload(folder, endpoint)
        return race(
            f"s3://{BUCKET}", f"{endpoint}/{BUCKET}", environment, rounds=rounds, clips=clips
        )
    finally:
        server.terminate()
        server.wait()


def print_table(title: str, results: dict[str, dict[str, float]]) -> None:
    table = Table(title=title)
    for column in ("contender", "clips/s", "clips/CPU s", "of plain", "of bare"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for name, result in results.items():
        speed = result["clips_per_second"]
        table.add_row(
            name,
            f"{speed:.1f}",
            f"{result['clips_per_cpu_second']:.1f}",
            f"{speed / results[PLAIN]['clips_per_second']:.2f}x",
            f"{speed / results[BARE]['clips_per_second']:.2f}x",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=64, help="of the drawn dataset")
    parser.add_argument("--media", help="collection to build the dataset from instead")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--per-round", type=int, default=6, help="clips of a turn")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "dataset")
        if options.media:
            frames, height, width = PYRAMID.clip_size
            build(options.media, folder, frames=frames, height=height, width=width,
                  kind="video", max_drop_rate=1.0)  # fmt: skip
        else:
            draw_dataset(folder, clips=options.clips)
        dataset = open_dataset(folder)
        size = sum(Path(p).stat().st_size for p in folder.glob("shards/*.tar"))
        turns = {"rounds": options.rounds, "clips": options.per_round}
        machine = re.sub(r"[^a-z0-9]+", "-", f"{platform.machine()}-{os.cpu_count()}cpu".lower())
        result = {
            "machine": machine,
            "clips": dataset.info.samples,
            "bytes_per_clip": size // dataset.info.samples,
            "largest_pixel_difference": largest_difference(str(folder)),
            "disk": race(str(folder), str(folder), {}, **turns),
            "s3": race_on_s3(folder, f"{scratch}/cache", **turns),
        }
    print(f"{result['clips']} clips of {result['bytes_per_clip']} bytes; pixels of plain and ours "
          f"differ by at most {result['largest_pixel_difference']}.")  # fmt: skip
    print_table("from disk, one process each", result["disk"])
    print_table("from S3 (moto), one process each", result["s3"])
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"loader-{machine}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{path}: written.")


if __name__ == "__main__":
    main()
