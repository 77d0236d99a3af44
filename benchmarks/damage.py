"""How much damage of videos is found: each codec, each kind of damage, many seeded places.

python -m benchmarks.damage [--files 25] [--out benchmarks/results/damage.json]

A file counts where the damage is to be seen: a decoder that nobody watches gives other pictures
than of the sound file (below 40 dB), or other than as many. It is caught if reading it as `build`
does ends in a `DataError`. The film is drifting texture under noise, 320x176, 30 frames, as
encoders write it by default.
"""

import argparse
import io
import json
import math
import os
import platform
import random
from collections.abc import Callable, Sequence
from datetime import date

import av
import numpy as np
from av import library_versions

from data_pipeline.errors import DataError
from data_pipeline.media.container import open_video, read_shots

# Container, encoder, pixels and options by what they are called in the table.
CODECS = {
    "H.264, mp4": ("mp4", "libx264", "yuv420p", {}),
    "H.264, MPEG-TS": ("mpegts", "libx264", "yuv420p", {}),
    "H.264, Matroska": ("matroska", "libx264", "yuv420p", {}),
    "HEVC with wavefronts, mp4": ("mp4", "libx265", "yuv420p", {"x265-params": "log-level=-1"}),
    "HEVC without, mp4": ("mp4", "libx265", "yuv420p", {"x265-params": "log-level=-1:wpp=0"}),
    "VP8, WebM": ("webm", "libvpx", "yuv420p", {}),
    "VP9, WebM": ("webm", "libvpx-vp9", "yuv420p", {"cpu-used": "5"}),
    "AV1, mp4": ("mp4", "libsvtav1", "yuv420p", {"preset": "10"}),
    "MPEG-4, AVI": ("avi", "mpeg4", "yuv420p", {}),
    "MPEG-2, MPEG-TS": ("mpegts", "mpeg2video", "yuv420p", {}),
    "Motion JPEG, AVI": ("avi", "mjpeg", "yuvj420p", {}),
    "ProRes, mov": ("mov", "prores_ks", "yuv422p10le", {}),
}
MIN_PACKET = 200  # bytes; in smaller ones there is little to damage
VISIBLE_ERROR = 255**2 / 10**4  # mean square of 40 dB

Media = bytes
Damage = Callable[[Media, random.Random], Media]


def film(frames: int = 30, height: int = 176, width: int = 320) -> list[np.ndarray]:
    """Texture that drifts one way, under noise that drifts another."""
    rng = np.random.default_rng(0)
    coarse = rng.uniform(20, 235, (40, 64, 3)).repeat(12, 0).repeat(12, 1)
    fine = rng.uniform(-30, 30, (height + frames, width + frames, 3))
    pictures = []
    for t in range(frames):
        drifted = coarse[t : t + height, 2 * t : 2 * t + width]
        noise = fine[t // 2 : t // 2 + height, t : t + width]
        pictures.append((drifted * 0.8 + noise + 20).clip(0, 255).astype(np.uint8))
    return pictures


def encode(
    pictures: Sequence[np.ndarray], container: str, codec: str, pixels: str, options: dict
) -> Media:
    """A sound file."""
    buffer = io.BytesIO()
    # The index comes first, or a file that is cut could not even be opened.
    muxing = {"moov_size": "20000"} if container in ("mp4", "mov") else {}
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    with av.open(buffer, "w", format=container, options=muxing) as muxer:
        stream = muxer.add_stream(codec, rate=24, options=options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.codec_context.thread_count = pixels, 1
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
            frame.pts = number
            muxer.mux(stream.encode(frame))
        muxer.mux(stream.encode())
    os.sched_setscheduler(0, policy, parameters)  # SVT-AV1 makes root's processes real-time ones
    return buffer.getvalue()


def payload(media: Media, rng: random.Random) -> tuple[int, int]:
    """Where the bytes of a random packet lie in a file, and how many they are."""
    with av.open(io.BytesIO(media)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    large = [packet for packet in packets[1:] if len(packet) >= MIN_PACKET]
    for packet in rng.sample(large, len(large)):
        # Packets of a transport stream lie in pieces.
        at = media.find(packet[:60])
        if at >= 0:
            return at + 24, min(len(packet), len(media) - at) - 24
    raise ValueError("no packet is found in its file")


def overwrite(media: Media, rng: random.Random) -> Media:
    """Eight random bytes."""
    at, size = payload(media, rng)
    at += rng.randrange(size - 8)
    return media[:at] + rng.randbytes(8) + media[at + 8 :]


def flip(media: Media, rng: random.Random) -> Media:
    """One bit."""
    at, size = payload(media, rng)
    at += rng.randrange(size)
    return media[:at] + bytes([media[at] ^ 1 << rng.randrange(8)]) + media[at + 1 :]


def zero(media: Media, rng: random.Random) -> Media:
    """A block of 512 zeros, as disks lose them."""
    at, size = payload(media, rng)
    at += rng.randrange(size)
    count = min(512, len(media) - at)
    return media[:at] + bytes(count) + media[at + count :]


def cut(media: Media, rng: random.Random) -> Media:
    """The end is missing."""
    return media[: round(len(media) * rng.uniform(0.4, 0.95))]


def drop(media: Media, rng: random.Random) -> Media:
    """One packet is missing."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(media)) as source:
        stream = source.streams.video[0]
        packets = [packet for packet in source.demux(stream) if packet.size]
        name = {"matroska,webm": "matroska"}.get(source.format.name, source.format.name)
        if name.startswith("mov"):
            name = "mov" if stream.name == "prores" else "mp4"
        gone = rng.randrange(1, len(packets) - 2)
        with av.open(buffer, "w", format=name) as muxer:
            copy = muxer.add_stream_from_template(stream, opaque=True)
            for number, packet in enumerate(packets):
                if number != gone:
                    packet.stream = copy
                    muxer.mux(packet)
    return buffer.getvalue()


KINDS: dict[str, Damage] = {
    "8 bytes": overwrite,
    "1 bit": flip,
    "512 zeros": zero,
    "end cut": cut,
    "packet missing": drop,
}


def luma_of(media: Media) -> list[np.ndarray]:
    """What a decoder gives that goes on over whatever it meets, and that nobody watches."""
    pictures: list[np.ndarray] = []
    try:
        with av.open(io.BytesIO(media)) as container:
            stream = container.streams.video[0]
            stream.thread_type, stream.codec_context.thread_count = "NONE", 1
            for packet in container.demux(stream):
                try:
                    frames = packet.decode()
                except av.FFmpegError:
                    continue
                for frame in frames:
                    plane = frame.planes[0]
                    rows = np.frombuffer(memoryview(plane), np.uint8)
                    pictures.append(rows.reshape(plane.height, -1)[:, : plane.width].astype(int))
    except av.FFmpegError:
        pass
    return pictures


def is_visible(media: Media, sound: list[np.ndarray]) -> bool:
    """Whether a damaged file shows other pictures than its sound one."""
    pictures = luma_of(media)
    return len(pictures) != len(sound) or any(
        one.shape != other.shape or ((one - other) ** 2).mean() > VISIBLE_ERROR
        for one, other in zip(pictures, sound, strict=True)
    )


def is_caught(media: Media) -> bool:
    """Whether reading a file to its end is refused."""
    try:
        for _ in read_shots(open_video(media), [(0.0, math.inf)]):
            pass
    except DataError:
        return True
    return False


def measure(name: str, files: int, pictures: Sequence[np.ndarray]) -> dict[str, dict[str, int]]:
    """Of one codec: for each kind of damage, how many files show it, and how many are caught."""
    media = encode(pictures, *CODECS[name])
    sound = luma_of(media)
    assert not is_caught(media), f"{name}: sound, and refused"
    rows = {}
    for kind, spoil in KINDS.items():
        rng = random.Random(f"{name} {kind}")
        spoilt = [spoil(media, rng) for _ in range(files)]
        visible = [one for one in spoilt if is_visible(one, sound)]
        rows[kind] = {"visible": len(visible), "caught": sum(map(is_caught, visible))}
    return rows


def main() -> None:
    """Measure, print the table of docs/data.md, and keep the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=25)
    parser.add_argument("--out", default="benchmarks/results/damage.json")
    options = parser.parse_args()
    pictures, table = film(), {}
    print(f"| codec | {' | '.join(KINDS)} |\n|---|{'---|' * len(KINDS)}")
    for name in CODECS:
        table[name] = measure(name, options.files, pictures)
        cells = (f"{row['caught']} of {row['visible']}" for row in table[name].values())
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "ffmpeg": {name: list(version) for name, version in library_versions.items()},
        "files": options.files,
        "caught": table,
    }
    with open(options.out, "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
