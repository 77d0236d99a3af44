"""A dataset folder: shards, their indexes, and `dataset.json`, which is written last."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from pydantic import Field, ValidationError

from data_pipeline.errors import ConfigError, DataError, InputMissing
from data_pipeline.shards.account import NOTHING, Account
from data_pipeline.shards.captions import COLUMNS, Captions
from data_pipeline.shards.tar import Record, index_digest, open_index, read_record, read_told
from data_pipeline.store import storage
from data_pipeline.strict import Size, Strict

Manifest = TypeVar("Manifest", bound=Strict)

MANIFEST = "dataset.json"
FORMAT = 1


class ShardInfo(Strict):
    """One shard of a dataset or of a set derived from one."""

    name: str = Field(pattern="^[^/]+$")
    samples: int = Field(ge=0)
    index_sha256: str


class DatasetInfo(Strict):
    """What `dataset.json` says."""

    format: Literal[1]
    kind: Literal["video", "image"]
    fingerprint: str = Field(description="digest of kind, geometry and every shard's index")
    samples: int = Field(ge=1)
    clip: Size | None = Field(description="size of every sample; none: sizes differ")
    fps: float | None = Field(description="frame rate of every sample; none: see its json")
    folder: Literal["shards", "."] = Field(description="where the tars lie")
    shards: list[ShardInfo]
    account: Account = Field(default=Account(), description="what of the source is no sample")
    captions: dict[str, float] = Field(
        default=COLUMNS, description="members of each sample's json that hold captions, by weight"
    )
    notes: dict[str, str] = Field(default={}, description="licence, origin")

    @property
    def rejected(self) -> dict[str, int]:
        """Files, rows and samples that could have been in the dataset, by why they are not."""
        return self.account.unusable | self.account.not_wanted


@dataclass(frozen=True)
class Dataset:
    """A dataset to read by (shard, row)."""

    path: str
    info: DatasetInfo

    @property
    def shard_folder(self) -> str:
        """Where the tars and indexes are."""
        return self.path if self.info.folder == "." else storage.join(self.path, self.info.folder)

    @cached_property
    def shard_sizes(self) -> np.ndarray:
        """Samples per shard."""
        return np.array([shard.samples for shard in self.info.shards], np.int64)

    def index(self, shard: int) -> np.ndarray:
        """The index rows of a shard."""
        info = self.info.shards[shard]
        return proven_index(self.shard_folder, info.name, info.index_sha256)

    def read(self, shard: int, row: int) -> Record:
        """One sample, its bytes checked against the index."""
        name, entry = self.info.shards[shard].name, self.index(shard)[row]
        return read_record(self.shard_folder, name, entry, self.info.captions)

    def read_told(self, shard: int, row: int) -> tuple[dict, Captions]:
        """(metadata, captions) of one sample, whose media stay unread."""
        name, entry = self.info.shards[shard].name, self.index(shard)[row]
        return read_told(self.shard_folder, name, entry, self.info.captions)

    def draw(self, count: int, *, seed: int) -> list[tuple[int, int]]:
        """(shard, row) of random samples, each at most once, in the order of the dataset."""
        count = min(count, self.info.samples)
        chosen = np.random.default_rng(seed).choice(self.info.samples, count, replace=False)
        return self.places(np.sort(chosen))

    def places(self, numbers: np.ndarray) -> list[tuple[int, int]]:
        """(shard, row) of samples by their number."""
        ends = np.cumsum(self.shard_sizes)
        shards = np.searchsorted(ends, numbers, side="right")
        rows = numbers - (ends - self.shard_sizes)[shards]
        return list(zip(shards.tolist(), rows.tolist(), strict=True))


@lru_cache(maxsize=1024)
def cached_index(folder: str, name: str) -> np.ndarray:
    """A mapped index; a process keeps the latest ones open."""
    return open_index(folder, name)


@lru_cache(maxsize=1024)
def proven_index(folder: str, name: str, sha256: str) -> np.ndarray:
    """A mapped index that is still the one its dataset was committed with."""
    if index_digest(folder, name) != sha256:
        raise ConfigError(
            f"{storage.join(folder, name)}.idx: is not the index that dataset.json was made with "
            "because the shard was replaced or damaged; `t2v data verify` tells which."
        )
    return cached_index(folder, name)


def open_dataset(path: str | Path) -> Dataset:
    """The dataset in a folder; refuses what is unfinished."""
    path, remedy = str(path), "`t2v data build` or `index`"
    manifest = storage.join(path, MANIFEST)
    return Dataset(path, read_manifest(DatasetInfo, manifest, f"{path}: is no dataset", remedy))


def commit_dataset(
    path: str,
    names: Sequence[str],
    *,
    kind: Literal["video", "image"],
    folder: Literal["shards", "."],
    clip: Size | None,
    fps: float | None,
    notes: dict[str, str],
    account: Account = NOTHING,
    captions: Mapping[str, float] = COLUMNS,
) -> Dataset:
    """Write `dataset.json` over finished shards; only then the folder is a dataset."""
    shard_folder = path if folder == "." else storage.join(path, folder)
    shards = shard_infos(shard_folder, names)
    samples = sum(shard.samples for shard in shards)
    if not samples:
        counts = account.unusable | account.not_wanted
        told = ", ".join(f"{count} x {why}" for why, count in counts.items()) or "nothing is there"
        raise DataError(f"{path}: would hold no sample: {told}; see the source.")
    info = DatasetInfo(
        format=FORMAT,
        kind=kind,
        fingerprint=fingerprint(kind, clip, fps, shards),
        samples=samples,
        clip=clip,
        fps=fps,
        folder=folder,
        shards=shards,
        account=account,
        captions=dict(captions),
        notes=notes,
    )
    text = json.dumps(info.model_dump(mode="json"), indent=1) + "\n"
    storage.write_atomic(storage.join(path, MANIFEST), text.encode())
    return Dataset(path, info)


def fingerprint(
    kind: str, clip: Size | None, fps: float | None, shards: Sequence[ShardInfo]
) -> str:
    """The digest that identifies a dataset."""
    identity = {"format": FORMAT, "kind": kind, "clip": clip, "fps": fps}
    return digest_json(identity | {"shards": [shard.model_dump() for shard in shards]})


def shard_infos(folder: str, names: Sequence[str]) -> list[ShardInfo]:
    """Names, counts and digests of finished shards, as they are on the disk now."""
    cached_index.cache_clear()
    return [
        ShardInfo(
            name=name,
            samples=len(open_index(folder, name)),
            index_sha256=index_digest(folder, name),
        )
        for name in names
    ]


def read_manifest(model: type[Manifest], path: str, missing: str, remedy: str) -> Manifest:
    """A manifest as its model; `missing` and `remedy` say what its absence means."""
    if not storage.exists(path):
        raise InputMissing(f"{missing} because there is no {path}; make it with {remedy}.")
    try:
        content = json.loads(storage.read_bytes(path))
    except ValueError as error:
        raise DataError(f"{path}: is damaged because {error}; make it again.") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: is damaged because it holds no mapping; make it again.")
    if content.get("format") != FORMAT:
        raise ConfigError(
            f"{path}: format {content.get('format')!r} is not {FORMAT}; make it with this version."
        )
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(
            f"{path}: {where}: is wrong because {first['msg']}; make it again."
        ) from None


def digest_json(value: object) -> str:
    """sha256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return sha256(text.encode()).hexdigest()
