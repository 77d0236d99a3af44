"""The clips that are judged: a dataset's and a folder's of samples, brought to a view alike."""

import json
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, TypeAdapter, ValidationError

from data_pipeline.errors import ConfigError, DataError, InputMissing
from data_pipeline.media.clips import Size, probe
from data_pipeline.media.codec import decode_clip, encode_clip, reduce_clip, reduction
from data_pipeline.pyramid import Clip
from data_pipeline.shards.dataset import Dataset, digest_json, open_dataset
from data_pipeline.shards.tar import digest64
from t2v.evaluation.protocol import FrameRule, Protocol, RealSet, View
from t2v.methods.method import Output

SUMMARY = "samples.json"
FPS_TOLERANCE = 0.01


class SampleFile(BaseModel):
    """A clip's file in a folder of samples."""

    file: str
    sha256: str | None = None


class SampleSettings(BaseModel):
    """What is asked of the settings that samples were made with."""

    fps: float = 0.0


class SampleRecord(SampleFile):
    """What is asked of a sample's record; the rest of it may be anything."""

    levels: dict[str, SampleFile] | None = None
    outputs: list[Output] | None = None
    settings: SampleSettings | None = None


SUMMARIES = TypeAdapter(list[SampleRecord])


@dataclass(frozen=True)
class Shown:
    """A clip as a view has it, and what it was asked to show."""

    clip: Clip
    caption: str | None


@dataclass(frozen=True)
class RealClips:
    """Clips of a dataset: all, or as many as were drawn by a seed."""

    dataset: Dataset
    places: list[tuple[int, int]]  # (shard, row) of each
    seed: int
    fps: float

    def __len__(self) -> int:
        return len(self.places)

    def __str__(self) -> str:
        return f"{self.dataset.path}: sample {self.places[0]}"

    def only(self, number: int) -> "RealClips":
        """The set of that clip alone: little to send to another process."""
        return replace(self, places=[self.places[number]])

    def rule(self, view: View) -> FrameRule:
        """Which frames of a clip are seen."""
        return view.real_window

    def id(self, number: int, level: int | None) -> str:
        """What a clip and its caption follow from."""
        shard, row = self.places[number]
        return f"{self.dataset.info.fingerprint}/{shard}/{row}"

    def read(self, number: int, view: View, codec: str) -> Shown:
        shard, row = self.places[number]
        record = self.dataset.read(shard, row)
        where = f"{self.dataset.path}: sample {row} of shard {shard}"
        clip = _decoded(record.media, where)
        clip = bring_to(clip, view, where)
        rng = np.random.default_rng([self.seed, digest64(self.id(number, view.level))])
        clip = window(clip, view, self.rule(view), rng)
        return Shown(coded(clip, codec, self.fps), record.caption)


@dataclass(frozen=True)
class GeneratedClips:
    """Clips of a folder that `t2v sample` wrote, or of mp4 files of any other origin."""

    folder: Path
    records: list[dict[str, Any]]
    seed: int
    fps: float

    def __len__(self) -> int:
        return len(self.records)

    def __str__(self) -> str:
        return str(self.folder / self.records[0]["file"])

    def only(self, number: int) -> "GeneratedClips":
        return replace(self, records=[self.records[number]])

    def rule(self, view: View) -> FrameRule:
        return view.generated_window

    def id(self, number: int, level: int | None) -> str:
        entry = self._entry(number, level)
        digest = entry.get("sha256") or sha256(self._media(entry)).hexdigest()
        return digest_json([digest, self.records[number].get("prompt")])

    def read(self, number: int, view: View, codec: str) -> Shown:
        entry = self._entry(number, view.level)
        media, where = self._media(entry), str(self.folder / entry["file"])
        if entry.get("sha256") not in (None, sha256(media).hexdigest()):
            raise DataError(f"{where}: is not the file that {SUMMARY} tells of; sample it again.")
        clip = bring_to(_decoded(media, where), view, where)
        rng = np.random.default_rng([self.seed, digest64(self.id(number, view.level))])
        clip = window(clip, view, self.rule(view), rng)
        shows = self.records[number].get("prompt")
        return Shown(coded(clip, codec, self.fps), shows if isinstance(shows, str) else None)

    def _entry(self, number: int, level: int | None) -> dict[str, Any]:
        record = self.records[number]
        if level is None or level + 1 == len(record.get("outputs") or []):
            return record
        levels = record.get("levels") or {}
        if str(level) not in levels:
            raise ConfigError(
                f"{self.folder}: {record['file']} has no clip of level {level}; sample with "
                "--levels, or give the run itself."
            )
        return levels[str(level)]

    def _media(self, entry: dict[str, Any]) -> bytes:
        path = self.folder / entry["file"]
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise InputMissing(
                f"{path}: missing although {SUMMARY} names it; sample again."
            ) from None


# A numbered set of clips; picklable, so that worker processes can read it.
Clips = RealClips | GeneratedClips


def is_samples(folder: Path) -> bool:
    """Whether a folder holds clips rather than a run or a checkpoint."""
    return (folder / SUMMARY).is_file() or any(folder.glob("*.mp4"))


def open_real(rules: Protocol, origin: str) -> RealClips:
    """The real clips of a protocol, whose dataset is the one it means."""
    dataset = open_dataset(rules.real.dataset)
    info, real = dataset.info, rules.real
    if real.fingerprint not in (None, info.fingerprint):
        raise ConfigError(
            f"{origin}: real.fingerprint: is wrong because {real.dataset} has {info.fingerprint}; "
            "give the dataset that the protocol was made with."
        )
    if real.split not in (None, info.notes.get("split")):
        raise ConfigError(
            f"{origin}: real.split: '{real.split}' is wrong because {real.dataset} is "
            f"{info.notes.get('split') or 'of no known split'}; build that split."
        )
    if info.kind != "video" or info.clip is None:
        raise ConfigError(
            f"{real.dataset}: is wrong because it holds no clips of one size; build it from videos "
            "with --size."
        )
    if info.fps is None or abs(info.fps / rules.fps - 1) > FPS_TOLERANCE:
        has = "each clip's own frame rate" if info.fps is None else f"{info.fps:g} fps"
        raise ConfigError(
            f"{real.dataset}: {has} is wrong because the protocol has {rules.fps:g}; build it with "
            f"--fps {rules.fps:g}."
        )
    if real.clips is not None and real.clips > info.samples:
        raise ConfigError(
            f"{origin}: real.clips: {real.clips} is wrong because {real.dataset} has "
            f"{info.samples}; lower it."
        )
    if (real.clips or info.samples) < 2:
        raise ConfigError(
            f"{real.dataset}: 1 clip is wrong because a covariance needs two or more; add clips."
        )
    return RealClips(dataset, draw_places(dataset, real), real.seed, rules.fps)


def draw_places(dataset: Dataset, real: RealSet) -> list[tuple[int, int]]:
    """(shard, row) of the clips that are used; fewer are the first of more."""
    numbers = np.arange(dataset.info.samples)
    if real.clips is not None:
        numbers = np.random.default_rng(real.seed).permutation(numbers)[: real.clips]
    return dataset.places(numbers)


def open_generated(folder: Path, rules: Protocol) -> GeneratedClips:
    """The first clips of a folder, as many as the protocol has."""
    summary, wanted = folder / SUMMARY, rules.generated.clips
    if summary.is_file():
        records = read_records(summary)
    else:
        records = [{"file": path.name} for path in sorted(folder.glob("*.mp4"))]
    if not records:
        raise InputMissing(f"{folder}: holds no {SUMMARY} and no mp4; give a folder of samples.")
    if len(records) < wanted:
        remedy = "a covariance needs two or more" if len(records) < 2 else "scores depend on it"
        raise ConfigError(
            f"{folder}: {len(records)} clips are too few because the protocol has {wanted}, and "
            f"{remedy}; sample {wanted - len(records)} more."
        )
    clips = GeneratedClips(folder, records[:wanted], rules.generated.seed, rules.fps)
    for record in clips.records[:1]:
        settings = record.get("settings") or {}
        fps = settings.get("fps") or _frame_rate(clips._media(record), folder / record["file"])
        if abs(fps / rules.fps - 1) > FPS_TOLERANCE:
            raise ConfigError(
                f"{folder}: {fps:g} fps is wrong because the protocol has {rules.fps:g}; sample "
                f"with --set fps={rules.fps:g}."
            )
    return clips


def bring_to(clip: Clip, view: View, where: str) -> Clip:
    """A clip of a view's size: frames by stride, pixels by area average."""
    frames, height, width = clip.shape[:3]
    shape: Size = (frames, height, width)
    if any(side % wanted for side, wanted in zip(shape, view.size, strict=True)):
        have, want = ("x".join(map(str, size)) for size in (shape, view.size))
        raise ConfigError(
            f"{where}: {have} is wrong because view '{view.name}' has {want}, and it is no whole "
            "multiple; make clips of that size."
        )
    return reduce_clip(clip, reduction(shape, view.size, "video"))


def window(clip: Clip, view: View, rule: FrameRule, rng: np.random.Generator) -> Clip:
    """The frames that are judged."""
    room = len(clip) - view.span
    starts = {"first": 0, "center": room // 2, "random": int(rng.integers(0, room, endpoint=True))}
    return clip[starts[rule] :][: view.span : view.stride]


def coded(clip: Clip, codec: str, fps: float) -> Clip:
    """A clip as it comes back from the protocol's codec."""
    return decode_clip(encode_clip(clip, fps)) if codec == "h264" else clip


def _decoded(media: bytes, where: str) -> Clip:
    try:
        return decode_clip(media)
    except DataError as error:
        raise DataError(f"{where}: {error}; make it again.") from None


def _frame_rate(media: bytes, where: Path) -> float:
    try:
        return probe(media, "video").fps
    except DataError as error:
        raise DataError(f"{where}: {error}; make it again.") from None


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a folder of samples; DataError where they are damaged, or name files outside
    of it."""
    try:
        text = path.read_text()
        records = json.loads(text)
        SUMMARIES.validate_json(text, strict=True)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        reason = f"it is no list of samples{f' ({where!r})' if where else ''}"
        raise DataError(f"{path}: is damaged because {reason}; sample again.") from None
    except ValueError as error:
        raise DataError(f"{path}: is damaged because {error}; sample again.") from None
    names = [entry["file"] for r in records for entry in (r, *(r.get("levels") or {}).values())]
    if bad := next((n for n in names if Path(n).name != n), None):
        raise DataError(f"{path}: file {bad!r} is wrong because it leaves the folder; correct it.")
    return records
