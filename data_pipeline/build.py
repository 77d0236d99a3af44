"""Making datasets: raw captioned media into shards, and foreign shards usable as they are."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline import storage
from data_pipeline.dataset import MANIFEST, Dataset, commit_dataset, digest_json, open_dataset
from data_pipeline.errors import ConfigError, DataError, InputMissing
from data_pipeline.listing import Item, Kind, list_media
from data_pipeline.progress import progress
from data_pipeline.shards import index_tar, write_index, write_tar
from data_pipeline.video import Size, encode_clip, encode_image, read_clip

PLAN = "build.json"


@dataclass(frozen=True)
class Target:
    """What every sample of a dataset is brought to; no fps: each clip keeps its own."""

    kind: Kind
    size: Size
    fps: float | None


class Rejected:
    """The files of a collection that are left out, and why; refuses to hold too many."""

    def __init__(self, source: str, total: int, max_drop_rate: float):
        self.source, self.total, self.max_drop_rate = source, total, max_drop_rate
        self.reasons: dict[str, str] = {}

    def add(self, file: str, why: str) -> None:
        """Leave out one more."""
        self.reasons[file] = why
        if len(self.reasons) <= self.max_drop_rate * self.total:
            return
        count = len(self.reasons)
        more = f" ({count} of {self.total} files so far are unusable)" if count > 1 else ""
        raise DataError(
            f"{storage.join(self.source, file)}: {why}{more}; repair or remove it and build "
            f"again, or accept more than {self.max_drop_rate:.2%} by --max-drop-rate."
        )


def build(
    source: str | Path,
    out: str | Path,
    *,
    frames: int,
    height: int,
    width: int,
    fps: float | None = None,
    kind: Kind | None = None,
    shard_samples: int = 1000,
    task: tuple[int, int] = (0, 1),
    max_drop_rate: float = 0.01,
    deadline: float = 120.0,
    notes: dict[str, str] | None = None,
) -> Dataset | None:
    """Shard the captioned media of a folder at one clip size.

    What `out` already holds is kept, so a killed build goes on where it stopped, and tasks (number,
    count) may run side by side; the one that completes the shards returns the dataset.
    """
    source, out = str(source), str(out)
    _refuse_bad_settings(frames, height, width, fps, shard_samples, task)
    kind, items = list_media(source, kind)
    is_video = kind == "video"
    target = Target(kind, (frames if is_video else 1, height, width), fps if is_video else 0.0)
    listing = [(item.file, item.caption, item.metadata) for item in items]
    plan = {"kind": kind, "clip": target.size, "fps": target.fps, "shard_samples": shard_samples}
    _claim(out, plan | {"items": digest_json(listing)})
    if storage.exists(storage.join(out, MANIFEST)):
        return open_dataset(out)
    folder = storage.join(out, "shards")
    groups = [items[at : at + shard_samples] for at in range(0, len(items), shard_samples)]
    names = [f"{number:06d}" for number in range(len(groups))]
    mine = range(task[0], len(groups), task[1])
    rejected = Rejected(source, len(items), max_drop_rate)
    try:
        for number in progress(mine, f"build {kind} shards", total=len(mine)):
            if not _finished(folder, names[number]):
                _build_shard(folder, names[number], groups[number], target, rejected, deadline)
    except BaseException:
        if task[1] == 1 and not storage.list_files(folder, ".idx"):
            shutil.rmtree(out, ignore_errors=True)
        raise
    if not all(_finished(folder, name) for name in names):
        return None
    storage.remove_partial(folder)
    rejected = Rejected(source, len(items), max_drop_rate)
    for name in names:
        for file, why in _rejections(folder, name).items():
            rejected.add(file, why)
    return commit_dataset(
        out,
        names,
        kind=kind,
        folder="shards",
        clip=target.size,
        fps=target.fps,
        rejected=dict(Counter(why.split(":")[0] for why in rejected.reasons.values())),
        notes=notes or {},
    )


def index(
    path: str | Path, *, kind: Kind | None = None, notes: dict[str, str] | None = None
) -> Dataset:
    """Make shards written by others (KEY.mp4 or KEY.jpg with KEY.json or KEY.txt) a dataset.

    Their media keep their sizes; the loader brings each to the recipe's clip size.
    """
    path = str(path)
    if storage.exists(storage.join(path, PLAN)):
        raise ConfigError(f"{path}: is a build of ours, indexed already; finish it with build.")
    folder = "shards" if storage.exists(storage.join(path, "shards")) else "."
    shard_folder = storage.join(path, folder) if folder == "shards" else path
    names = [name.removesuffix(".tar") for name in storage.list_files(shard_folder, ".tar")]
    if not names:
        raise InputMissing(f"{shard_folder}: holds no .tar; give the folder of the shards.")
    kind = kind or _kind_inside(shard_folder, names)
    for name in progress(names, f"index {kind} shards", total=len(names)):
        write_index(shard_folder, name, kind)
    return commit_dataset(
        path,
        names,
        kind=kind,
        folder=folder,
        clip=None,
        fps=None,
        rejected={},
        notes=notes or {},
    )


def _build_shard(
    folder: str,
    name: str,
    items: Sequence[Item],
    target: Target,
    rejected: Rejected,
    deadline_seconds: float,
) -> None:
    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for row, item in enumerate(items):
            path = storage.join(rejected.source, item.file)
            try:
                yield f"{name}{row:06d}", _members(path, item, target, deadline_seconds)
            except DataError as error:
                rejected.add(item.file, str(error))

    write_tar(storage.join(folder, f"{name}.tar"), samples())
    reasons = {i.file: rejected.reasons[i.file] for i in items if i.file in rejected.reasons}
    text = json.dumps(reasons, indent=1, ensure_ascii=False) + "\n"
    storage.write_atomic(storage.join(folder, f"{name}.rejected.json"), text.encode())
    write_index(folder, name, target.kind)


def _members(path: str, item: Item, target: Target, deadline_seconds: float) -> dict[str, bytes]:
    """The members of one sample: media and json."""
    media = read_clip(
        storage.read_bytes(path),
        target.kind,
        target.size,
        fps=target.fps or None,
        deadline_seconds=deadline_seconds,
    )
    frames, height, width = target.size
    metadata = item.metadata | {
        "caption": item.caption,
        "frames": frames,
        "fps": media.fps,
        "height": height,
        "width": width,
        "original_height": media.original_height,
        "original_width": media.original_width,
        "original_fps": media.original_fps,
        "source": item.file,
    }
    text = json.dumps(metadata, ensure_ascii=False).encode()
    if target.kind == "image":
        return {"jpg": encode_image(media.clip[0]), "json": text}
    return {"mp4": encode_clip(media.clip, media.fps), "json": text}


def _refuse_bad_settings(
    frames: int, height: int, width: int, fps: float | None, shard_samples: int, task: tuple
) -> None:
    for name, value in (
        ("frames", frames), ("height", height), ("width", width), ("shard_samples", shard_samples)
    ):  # fmt: skip
        if value < 1:
            raise ConfigError(f"{name}: value {value} is wrong because it is below 1; raise it.")
    for name, value in (("height", height), ("width", width)):
        if value % 2:
            raise ConfigError(
                f"{name}: value {value} is wrong because H.264 4:2:0 needs even sides; "
                f"use {value - 1 or 2} or {value + 1}."
            )
    if fps is not None and fps <= 0:
        raise ConfigError(f"fps: value {fps} is wrong because it is not above 0; raise it.")
    if not 0 <= task[0] < task[1]:
        raise ConfigError(
            f"task: value {task[0]}/{task[1]} is wrong because tasks count from 0 to N-1; "
            "give I/N with I below N."
        )


def _claim(out: str, plan: dict) -> None:
    """Write down what is built in a folder, or refuse if something else is."""
    path = storage.join(out, PLAN)
    text = json.dumps(plan, indent=1) + "\n"
    if storage.exists(path):
        if storage.read_bytes(path).decode() != text:
            raise ConfigError(
                f"{out}: holds a dataset of another source or other settings (see {PLAN}); "
                "give a new folder, or delete it first."
            )
        return
    if storage.exists(out) and (storage.list_files(out) or storage.exists(f"{out}/shards")):
        raise ConfigError(f"{out}: is not empty and no build of ours; give a new folder.")
    storage.write_atomic(path, text.encode())


def _finished(folder: str, name: str) -> bool:
    return storage.exists(storage.join(folder, f"{name}.idx"))


def _rejections(folder: str, name: str) -> dict[str, str]:
    return json.loads(storage.read_bytes(storage.join(folder, f"{name}.rejected.json")))


def _kind_inside(folder: str, names: Sequence[str]) -> Kind:
    kinds: tuple[Kind, ...] = ("video", "image")
    for name in names:
        for kind in kinds:
            if len(index_tar(storage.join(folder, f"{name}.tar"), kind)):
                return kind
    raise DataError(f"{folder}: its shards hold no video and no image; check the folder.")
