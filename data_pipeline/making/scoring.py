"""Scores of a dataset's clips, as columns beside it: `scores.parquet`.

`DATASET/scores/` holds a table for each shard, so that work that was stopped goes on; the whole
table is written last, with the near-duplicates of all shards.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
import pyarrow
from pyarrow import parquet

from data_pipeline.errors import ConfigError, DataError, UserError
from data_pipeline.making.duplicates import MOST_BITS, originals
from data_pipeline.media.measures import HASH_BYTES, Measures, measure_media
from data_pipeline.parallel import map_in_order, refuse_bad_task
from data_pipeline.progress import progress
from data_pipeline.shards.dataset import MANIFEST, Dataset, ShardInfo, open_dataset
from data_pipeline.shards.tar import digest64, examine_tar, read_member
from data_pipeline.store import storage

VERSION = 2  # of what is measured; another one is other scores
FOLDER, TABLE, PROVENANCE = "scores", "scores.parquet", "provenance.json"
TOLD = b"t2v"
NUMBERS = ("motion", "frozen", "black", "brightness", "sharpness")
SIDES = ("crop_top", "crop_bottom", "crop_left", "crop_right")  # bars, in pixels
COLUMNS = (*NUMBERS, *SIDES, "duplicate_of", "fault")  # for conditions
PART = pyarrow.schema(
    {"shard": pyarrow.string(), "key": pyarrow.string(), "fault": pyarrow.string()}
    | dict.fromkeys(NUMBERS, pyarrow.float64())
    | dict.fromkeys(SIDES, pyarrow.int32())
    | {"hash": pyarrow.binary(HASH_BYTES)}
)
AGAIN = "delete it and `t2v data score` again"
WHOLE = PART.append(pyarrow.field("duplicate_of", pyarrow.string()))

Place = tuple[str, np.void]  # a tar, and what of it


@dataclass(frozen=True)
class Scores:
    """The finished table of a dataset."""

    path: str

    def column(self, name: str) -> list:
        """The values of all clips that have one."""
        return [value for value in self._values(name).to_pylist() if value is not None]

    def ends(self, name: str, count: int) -> np.ndarray:
        """The numbers of the samples with the lowest values of a column, and with the highest;
        none where all are alike."""
        values = self._values(name).to_numpy().astype(float)
        order = np.argsort(values, kind="stable")[: np.count_nonzero(~np.isnan(values))]
        if not len(order) or values[order[0]] == values[order[-1]]:
            return order[:0]
        return np.concatenate([order[:count], order[count:][-count:]])

    def _values(self, name: str) -> pyarrow.ChunkedArray:
        try:
            return parquet.read_table(storage.local_file(self.path), columns=[name])[name]
        except (pyarrow.ArrowException, OSError) as error:
            why = str(error).splitlines()[0]
            raise DataError(f"{self.path}: is damaged because {why}; {AGAIN}.") from None


def score(
    path: str | Path,
    *,
    task: tuple[int, int] = (0, 1),
    workers: int = 1,
    deadline: float = 120.0,
) -> Scores | None:
    """Measure every clip of a dataset; the table is returned once every shard is there.

    Shards already measured are kept, so it can be killed and started again, and tasks (number,
    count) may run side by side. A clip that cannot be read has a `fault` and no numbers.
    """
    data = open_dataset(path)
    for name, value in (("workers", workers), ("deadline", deadline)):
        if not value > 0:
            raise ConfigError(f"{name}: value {value} is wrong because it is below 1; raise it.")
    refuse_bad_task(task)
    whole, folder = storage.join(data.path, TABLE), storage.join(data.path, FOLDER)
    if storage.exists(whole) and _told(whole) is None:
        raise ConfigError(f"{whole}: is there already and no table of ours; move it away first.")
    content = json.dumps(_settings(), indent=1).encode() + b"\n"
    if storage.claim(folder, PROVENANCE, content, what="table of scores") not in (None, content):
        raise ConfigError(
            f"{folder}: holds scores of another version (see {PROVENANCE}); delete the folder."
        )
    shards = data.info.shards
    mine = [n for n in range(task[0], len(shards), task[1]) if not _finished(folder, shards[n])]
    places = (place for n in mine for place in _places(data, n))
    total = sum(shards[n].samples for n in mine)
    measure = partial(_measure, kind=data.info.kind, deadline_seconds=deadline)
    measured = map_in_order(
        measure, places, workers, named=lambda p: f"{p[0]}, byte {p[1]['offset']}"
    )
    made = progress(measured, "score clips", total=total)
    for n in mine:
        _write_part(data, n, folder, list(islice(made, shards[n].samples)))
    if not all(_finished(folder, shard) for shard in shards):
        return None
    storage.remove_partial(folder)
    _write_whole(data, folder, whole)
    return Scores(whole)


def open_scores(data: Dataset) -> Scores | None:
    """The scores of a dataset, if it has any; ConfigError where they are of other data."""
    path = storage.join(data.path, TABLE)
    told = _told(path) if storage.exists(path) else None
    if told is None:
        return None
    if told.get("dataset_fingerprint") != data.info.fingerprint:
        raise ConfigError(
            f"{path}: is of other data, not of the dataset as it is; "
            f"`t2v data score {data.path}` again, or delete it."
        )
    return Scores(path)


def fault_of_scores(data: Dataset) -> str | None:
    """What is wrong with the scores of a dataset, if it has any and anything is."""
    path = storage.join(data.path, TABLE)
    if not storage.exists(path):
        return None
    samples = (
        (shard.name, int(row["key"]))
        for number, shard in enumerate(data.info.shards)
        for row in data.index(number)
    )
    try:
        if open_scores(data) is None:
            return f"is damaged, or no table of ours; {AGAIN}"
        with parquet.ParquetFile(storage.local_file(path)) as table:
            if table.schema_arrow != WHOLE or table.metadata.num_rows != data.info.samples:
                return f"has not a row of our columns for each sample; {AGAIN}"
            rows = (row for batch in table.iter_batches() for row in batch.to_pylist())
            for row, sample in zip(rows, samples, strict=True):
                if why := _fault_of(row, *sample):
                    return f"'{row['shard']}/{row['key']}' {why}; {AGAIN}"
    except UserError as error:
        return str(error)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        return f"is damaged because {str(error).splitlines()[0]}; {AGAIN}"
    return None


def _fault_of(row: dict, shard: str, key: int) -> str | None:
    numbers = [row[name] for name in NUMBERS if row[name] is not None]
    if row["shard"] != shard or key not in {digest64(row["key"]), digest64(f"./{row['key']}")}:
        return "is not the sample of its row"
    if not all(0 <= number < math.inf for number in numbers):
        return "has numbers that no clip has"
    return None if row["fault"] or row["hash"] else "has neither numbers nor a fault"


def dataset_in(folder: str) -> Dataset | None:
    """The dataset that a folder of files is, if it is one."""
    try:
        return open_dataset(folder) if storage.exists(storage.join(folder, MANIFEST)) else None
    except UserError:
        return None


def tar_name(data: Dataset, shard: str) -> str:
    """A shard's tar below its dataset."""
    return f"{shard}.tar" if data.info.folder == "." else f"{data.info.folder}/{shard}.tar"


def _settings() -> dict:
    return {"version": VERSION, "opencv": cv2.__version__, "duplicate_bits": MOST_BITS}


def _places(data: Dataset, shard: int) -> Iterator[Place]:
    """Where the media of a shard's samples lie."""
    tar = storage.join(data.shard_folder, f"{data.info.shards[shard].name}.tar")
    # Copies, which can be sent between processes.
    return ((tar, row["media"].copy()) for row in data.index(shard))


def _measure(place: Place, *, kind: str, deadline_seconds: float) -> Measures | str:
    """The measures of a clip, or why it has none."""
    try:
        return measure_media(read_member(*place), kind, deadline_seconds)
    except DataError as error:
        return str(error)


def _write_part(data: Dataset, shard: int, folder: str, found: list[Measures | str]) -> None:
    info = data.info.shards[shard]
    tar = storage.join(data.shard_folder, f"{info.name}.tar")
    known = {digest64(key): key for key in examine_tar(tar, data.info.kind).keys}
    rows = []
    for sample, one in zip(data.index(shard), found, strict=True):
        if (key := known.get(int(sample["key"]))) is None:
            raise DataError(f"{tar}: is not what its index says; index it again.")
        row: dict = {"shard": info.name, "key": str(PurePosixPath(key))}
        if isinstance(one, str):
            row["fault"] = one
        else:
            row |= {f"crop_{side}": size for side, size in asdict(one.bars).items()}
            row |= {name: getattr(one, name) for name in (*NUMBERS, "hash")}
        rows.append(row)
    told = {"index_sha256": info.index_sha256}
    _write(storage.join(folder, f"{info.name}.parquet"), PART, told, [rows])


def _write_whole(data: Dataset, folder: str, path: str) -> None:
    """One table of all shards, a group of rows for each."""
    like = _like(data, folder)
    begins = np.cumsum([0, *data.shard_sizes])
    wanted, names = set(like.values()), {}
    for begin, shard in zip(begins, data.info.shards, strict=False):
        for n, key in enumerate(_read(folder, shard)["key"].to_pylist(), start=int(begin)):
            if n in wanted:
                names[n] = f"{shard.name}/{key}"

    def groups() -> Iterator[list[dict]]:
        for begin, shard in zip(begins, data.info.shards, strict=False):
            rows = enumerate(_read(folder, shard).to_pylist(), start=int(begin))
            yield [row | {"duplicate_of": names.get(like.get(n, -1))} for n, row in rows]

    told = _settings() | {"dataset_fingerprint": data.info.fingerprint}
    _write(path, WHOLE, told, groups())


def _like(data: Dataset, folder: str) -> dict[int, int]:
    """The number of each duplicate, and of the clip that it is like."""
    hashes, numbers, begin = [], [], 0
    for shard in data.info.shards:
        column = _read(folder, shard)["hash"].combine_chunks()
        numbers.append(begin + np.flatnonzero(column.is_valid()))
        hashes.append(np.frombuffer(b"".join(column.drop_null().to_pylist()), np.uint8))
        begin += len(column)
    clips = np.concatenate(numbers)
    found = originals(np.concatenate(hashes).reshape(-1, HASH_BYTES))
    later = np.flatnonzero(found != np.arange(len(found)))
    return dict(zip(clips[later].tolist(), clips[found[later]].tolist(), strict=True))


def _read(folder: str, shard: ShardInfo) -> pyarrow.Table:
    return parquet.read_table(storage.local_file(storage.join(folder, f"{shard.name}.parquet")))


def _write(path: str, schema: pyarrow.Schema, told: dict, groups: Iterable[list[dict]]) -> None:
    schema = schema.with_metadata({TOLD: json.dumps(told, sort_keys=True).encode()})
    with (
        storage.open_atomic(path) as file,
        parquet.ParquetWriter(file, schema, compression="zstd") as writer,
    ):
        for rows in groups:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))


def _told(path: str) -> dict | None:
    """What a table of ours says of itself; None where it is none."""
    try:
        metadata = parquet.read_schema(storage.local_file(path)).metadata or {}
        return json.loads(metadata[TOLD])
    except (pyarrow.ArrowException, KeyError, ValueError):
        return None


def _finished(folder: str, shard: ShardInfo) -> bool:
    """Whether the table of a shard is there, of the samples that it has now."""
    path = storage.join(folder, f"{shard.name}.parquet")
    return storage.exists(path) and _told(path) == {"index_sha256": shard.index_sha256}
