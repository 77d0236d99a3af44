"""Sets derived from a dataset and cached beside it, row for row: embeddings, latents.

`DATASET/KIND/NAME/` holds `provenance.json`, which is written first and says what fills the folder;
a tar and an index for each shard of the dataset; and `manifest.json`, which is written last. The
`txt` member of a row is its origin: what of the sample it was made of, by which a row that must be
made again is told.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import numpy as np
from pydantic import Field

from data_pipeline.errors import ConfigError, DataError, UserError
from data_pipeline.parallel import refuse_bad_task
from data_pipeline.progress import progress
from data_pipeline.shards.dataset import (
    FORMAT,
    Dataset,
    ShardInfo,
    cached_index,
    digest_json,
    read_manifest,
    shard_infos,
)
from data_pipeline.shards.tar import open_index, read_member, write_index, write_tar
from data_pipeline.store import storage
from data_pipeline.strict import Strict

MANIFEST = "manifest.json"
PROVENANCE = "provenance.json"

Made = TypeVar("Made", bound=Strict)
Row = tuple[str, dict[str, bytes]]  # key, and members by suffix
Members = dict[str, bytes]  # by their place in an index row


class DerivedInfo(Strict, Generic[Made]):
    """What the `manifest.json` of a set says."""

    format: Literal[1]
    fingerprint: str = Field(description="digest of provenance, dataset and every shard's index")
    provenance: Made
    dataset_fingerprint: str
    shards: list[ShardInfo]


@dataclass(frozen=True)
class Kind(Generic[Made]):
    """A kind of set: how it is called, what its rows are made of, and what one must hold."""

    folder: str  # below the dataset, and the kind's name: "embeddings"
    verb: str  # of `t2v data`
    maker: str  # what makes rows
    option: str  # which names the maker
    origin: str  # what of a sample a row is made of
    info: type[DerivedInfo[Made]]
    origins: Callable[[np.ndarray], np.ndarray]  # digests by rows of the dataset's index
    check: Callable[[Members, str, Made], None]  # DataError for a row's members, of a tar
    tell: Callable[[Made], str]  # what rows are, and of what maker

    def place(self, dataset: Dataset, name: str) -> str:
        """The folder of a set."""
        return storage.join(dataset.path, self.folder, name)

    def names(self, dataset: Dataset) -> list[str]:
        """Names of a dataset's sets, finished or not."""
        return storage.list_folders(storage.join(dataset.path, self.folder))

    def remedy(self, dataset: Dataset, name: str) -> str:
        """The command that makes a set."""
        return f"`t2v data {self.verb} {dataset.path} {self.option} --name {name}`"


class Former:
    """What an earlier version of a set's shard holds, by the digests of its rows' origins."""

    def __init__(self, folder: str, name: str):
        self.tar = storage.join(folder, f"{name}.tar")
        try:
            self._rows = {int(row["caption"]): row for row in open_index(folder, name)}
        except UserError:
            self._rows = {}

    def read(self, origin: int) -> Members | None:
        """The members of a row; None where there is none, or it is damaged or half replaced."""
        row = self._rows.get(origin)
        return None if row is None else sound_members(self.tar, row)


def begin(kind: Kind[Made], data: Dataset, name: str, task: tuple[int, int]) -> str:
    """The folder of a set that is to be made; ConfigError for a name or task that is none."""
    if not name or "/" in name or name.startswith("."):
        raise ConfigError(f"name: value {name!r} is wrong because it names no folder; use letters.")
    refuse_bad_task(task)
    return kind.place(data, name)


def claim(kind: Kind[Made], folder: str, provenance: Made) -> None:
    """Write down what fills a folder; ConfigError where something else does."""
    content = text_of(provenance).encode()
    found = storage.claim(folder, PROVENANCE, content, what=f"{kind.folder[:-1]} set")
    if found not in (None, content):
        raise ConfigError(
            f"{folder}: holds {kind.folder} of another {kind.maker} or other settings (see "
            f"{PROVENANCE}); choose another --name, or delete the folder."
        )


def fill(
    kind: Kind[Made],
    data: Dataset,
    folder: str,
    provenance: Made,
    *,
    task: tuple[int, int],
    rows: Callable[[int, Former], Iterable[Row]],
) -> bool:
    """Make those shards of a task (number, count) that are not there yet by `rows` of (shard, its
    earlier version); whether all shards of the set are there now, and so its manifest."""
    names = [shard.name for shard in data.info.shards]
    mine = range(task[0], len(names), task[1])
    for shard in progress(mine, f"{kind.verb} shards", total=len(mine)):
        if _finished(kind, data, shard, folder):
            continue
        name = names[shard]
        tar = storage.join(folder, f"{name}.tar")
        write_tar(tar, _sound(kind, rows(shard, Former(folder, name)), tar, provenance))
        write_index(folder, name, "tensor")
        if not _finished(kind, data, shard, folder):
            raise DataError(
                f"{data.path}: shard {name} is not what its index says; index it again."
            )
    if not all(_finished(kind, data, shard, folder) for shard in range(len(names))):
        return False
    storage.remove_partial(folder)
    info = kind.info(
        format=FORMAT,
        fingerprint="",
        provenance=provenance,
        dataset_fingerprint=data.info.fingerprint,
        shards=shard_infos(folder, names),
    )
    info = info.model_copy(update={"fingerprint": fingerprint(info)})
    storage.write_atomic(storage.join(folder, MANIFEST), text_of(info).encode())
    return True


def fingerprint(info: DerivedInfo[Made]) -> str:
    """The digest that identifies a set."""
    return digest_json(
        {
            "provenance": info.provenance.model_dump(),
            "dataset": info.dataset_fingerprint,
            "shards": [shard.model_dump() for shard in info.shards],
        }
    )


def open_info(kind: Kind[Made], dataset: Dataset, name: str) -> tuple[str, DerivedInfo[Made]]:
    """(folder, manifest) of a finished set; refuses one made for other data."""
    folder, remedy = kind.place(dataset, name), kind.remedy(dataset, name)
    path, missing = storage.join(folder, MANIFEST), f"{dataset.path}: has no {kind.folder} '{name}'"
    info = read_manifest(kind.info, path, missing, remedy)
    if info.dataset_fingerprint != dataset.info.fingerprint:
        raise ConfigError(
            f"{path}: dataset_fingerprint: value {info.dataset_fingerprint[:12]} is wrong because "
            f"the dataset's is {dataset.info.fingerprint[:12]}; {kind.verb} this dataset again: "
            f"{remedy}."
        )
    ours = [(shard.name, shard.samples) for shard in info.shards]
    if ours != [(shard.name, shard.samples) for shard in dataset.info.shards]:
        raise DataError(f"{path}: shards differ from the dataset's; {kind.verb} again: {remedy}.")
    return folder, info


def read_row(
    kind: Kind[Made], folder: str, dataset: Dataset, shard: int, row: int
) -> tuple[str, Members]:
    """(tar, members) of a row, its bytes checked; DataError where it is of another sample."""
    name = dataset.info.shards[shard].name
    path = storage.join(folder, f"{name}.tar")
    entry, sample = cached_index(folder, name)[row], dataset.index(shard)[row : row + 1]
    if entry["key"] != sample["key"][0] or entry["caption"] != kind.origins(sample)[0]:
        raise DataError(f"{path}: row {row} is of another sample or {kind.origin}")
    return path, members_of(path, entry)


def text_of(model: Strict) -> str:
    """A model as the text of its file."""
    return model.model_dump_json(indent=1) + "\n"


def members_of(path: str, row: np.void) -> Members:
    """The members of a row of a set's tar, checked."""
    return {slot: read_member(path, row[slot]) for slot in ("media", "json") if row[slot]["size"]}


def sound_members(path: str, row: np.void) -> Members | None:
    """The members of a row, or None where they are damaged or cannot be read."""
    try:
        return members_of(path, row)
    except UserError:
        return None


def _sound(kind: Kind[Made], rows: Iterable[Row], tar: str, provenance: Made) -> Iterator[Row]:
    """The same rows; DataError at one that `verify` would refuse."""
    for key, members in rows:
        held = {"media": members["safetensors"], "json": members.get("json", b"")}
        try:
            kind.check(held, tar, provenance)
        except DataError as error:
            raise DataError(
                f"{tar}: '{key}' {error}; look for damage in the files of the {kind.maker}."
            ) from None
        yield key, members


def _finished(kind: Kind[Made], data: Dataset, shard: int, folder: str) -> bool:
    """Whether a shard of a set is there, of the samples that the dataset's has now."""
    name = data.info.shards[shard].name
    if not storage.exists(storage.join(folder, f"{name}.idx")):
        return False
    ours, theirs = open_index(folder, name), data.index(shard)
    return np.array_equal(ours["key"], theirs["key"]) and np.array_equal(
        ours["caption"], kind.origins(theirs)
    )
