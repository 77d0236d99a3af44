"""The plan of a build: which clips of which files, in one order that all its tasks share.

It is one parquet file beside the shards, made by whichever task comes first and read a shard at a
time: neither the making nor the reading holds all rows in memory.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import duckdb
import pyarrow
from pyarrow import parquet

from data_pipeline.errors import ConfigError, InputMissing
from data_pipeline.making.database import open_database
from data_pipeline.making.listing import TEXTS, Kind, Place, scan
from data_pipeline.making.lists import LISTS, is_list, list_paths, read_lists
from data_pipeline.making.matching import choose_kind, note_files, plan_folder, plan_lists
from data_pipeline.making.presets import Columns
from data_pipeline.making.scoring import TABLE, dataset_in
from data_pipeline.making.sidecars import MEDIA, write_beside
from data_pipeline.making.times import Times, find_times, without_own
from data_pipeline.making.ucf101 import is_ucf101, list_ucf101
from data_pipeline.shards.account import Account, Tally
from data_pipeline.shards.dataset import digest_json
from data_pipeline.store import storage

IN_FOLDERS = "captions.jsonl"
TOLD = b"t2v"
LINES_PER_GROUP = 20_000
TEXT_COLUMNS = ("file", "place", "captions", "times", "metadata", "json", "txt")
SCHEMA = pyarrow.schema(
    {"number": pyarrow.int64(), "row": pyarrow.int64()}  # of the file, and of the list
    | dict.fromkeys(TEXT_COLUMNS, pyarrow.string())
)


@dataclass(frozen=True)
class Material:
    """What a dataset is built of: files below a folder, and how they are planned."""

    source: str  # the list, or the folder
    folder: str
    version: str  # digest of what there is
    write: Callable[[BinaryIO], None]  # the plan, to a file
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """What a list says of a file: JSON as it was found, to be judged where clips are made."""

    number: int
    captions: str
    times: str | None
    metadata: str


@dataclass(frozen=True)
class Item:
    """One file of a source, with the rows that mean it or else the texts beside it."""

    file: str
    place: Place
    rows: tuple[Row, ...] = ()
    json: Place | None = None
    txt: Place | None = None

    def __str__(self) -> str:
        return self.file


@dataclass(frozen=True)
class Plan:
    """What a build makes clips of, as it lies beside the shards."""

    path: str
    kind: Kind
    files: int
    rows: int  # of lists, the unusable ones included; or as many as files
    times: Times | None
    account: Account

    def items(self, begin: int, end: int) -> list[Item]:
        """The files of some numbers."""
        chosen = [("number", ">=", begin), ("number", "<", end)]
        table = parquet.read_table(storage.local_file(self.path), filters=chosen)
        items: list[Item] = []
        for line in table.sort_by([("number", "ascending"), ("row", "ascending")]).to_pylist():
            rows = ()
            if line["captions"] is not None:
                rows = (Row(line["row"], line["captions"], line["times"], line["metadata"]),)
            if len(items) > line["number"] - begin:
                items[-1] = replace(items[-1], rows=items[-1].rows + rows)
            else:
                place, *beside = (
                    Place(*json.loads(line[name])) if line[name] else None
                    for name in ("place", "json", "txt")
                )
                items.append(Item(line["file"], place or Place(line["file"]), rows, *beside))
        return items


def find_material(
    source: str, columns: Columns, *, root: str | None, kind: Kind | None, split: str | None
) -> Material:
    """What a source is; `split` chooses some of UCF-101's."""
    if is_ucf101(source):
        items, told = list_ucf101(source, split)
        write = partial(write_rows, kind="video", items=items)
        return Material(source, source, digest_json(items), write, told)
    if split is not None:
        raise ConfigError(
            f"split: value '{split}' is wrong because {source} is not UCF-101 with its folders "
            "UCF-101 and ucfTrainTestlist; leave it out."
        )
    if root is not None and not is_list(source):
        raise ConfigError(f"root: value '{root}' is wrong because {source} is no list; leave it.")
    if not is_list(source) and not storage.exists(source):
        raise InputMissing(
            f"{source}: no such folder or list; give the folder that holds the media, or a list of "
            f"them ({', '.join(LISTS)})."
        )
    write = partial(write_plan, source=source, columns=columns, root=root, kind=kind)
    return Material(list_in(source) or source, folder_of(source, root), version(source), write)


def folder_of(source: str, root: str | None) -> str:
    """The folder below which the files of a folder or of lists lie."""
    if root is not None or not is_list(source):
        return root or source
    folders = {path.rpartition("/")[0] or "." for path in list_paths(source)}
    if len(folders) == 1:
        return folders.pop()
    head = os.path.commonpath([folder.partition("://")[2] or folder for folder in folders])
    return f"{storage.S3}{head}" if storage.is_remote(source) else head


def list_in(source: str) -> str | None:
    """The list of captions that lies in a folder."""
    inside = storage.join(source, IN_FOLDERS)
    return inside if not is_list(source) and storage.exists(inside) else None


def version(source: str) -> str:
    """A digest of what a source holds, for another content makes another dataset: of lists, of
    datasets with their scores, and of folders of this machine. A prefix of a store is listed once,
    for the plan."""
    if is_list(source):
        return digest_json([storage.identity(path) for path in list_paths(source)])
    if data := dataset_in(source):
        scores = storage.join(source, TABLE)
        told = [storage.identity(scores)] if storage.exists(scores) else []
        return digest_json([data.info.fingerprint, *told])
    if storage.is_remote(source):
        return source
    told = []
    for found in scan(source, Tally()):
        edited = 0
        if found.file.endswith((*TEXTS, IN_FOLDERS)):
            edited = os.stat(storage.join(source, found.file)).st_mtime_ns
        told.append((found.file, found.place.size, edited))
    return digest_json(sorted(told))


def write_plan(
    file: BinaryIO, source: str, columns: Columns, *, root: str | None, kind: Kind | None
) -> None:
    """Plan a folder or lists; `root`: where the files of lists lie, if not beside them."""
    tally, folder = Tally(), folder_of(source, root)
    inside = list_in(source)
    lists = list_paths(source) if is_list(source) else [inside] if inside else []
    with tempfile.TemporaryDirectory(prefix="t2v-plan-") as own, open_database() as database:
        if columns.encoding and not lists:
            raise ConfigError(
                f"{source}: encoding: value '{columns.encoding}' is wrong because it is that of a "
                "list, and there is none; leave it, and convert texts beside media to UTF-8."
            )
        note_files(database, folder, tally)
        times = None
        if not lists and (columns.where or columns.select):
            lists = [f"{own}/beside.jsonl"]
            columns = write_beside(database, folder, columns, Path(lists[0]), tally)
        if lists:
            is_beside = columns.file == MEDIA
            told = source if is_beside else None
            table = read_lists(database, lists, tally, encoding=columns.encoding, told=told)
            names = without_own(table.names) if is_beside else table.names
            times = find_times(table.path, names, columns.times, columns.unit)
            rows = plan_lists(table, lists, folder, columns, times, tally)
        else:
            rows = plan_folder(database, folder, tally)
        kind = choose_kind(database, source, kind, tally)
        if kind == "image" and times:
            raise ConfigError(
                f"{source}: times: {times} are wrong because images have no length; "
                "give --times none."
            )
        counted = database.execute("SELECT count(DISTINCT file) FROM planned").fetchall()
        told = {
            "kind": kind,
            "files": counted[0][0],
            "rows": rows,
            "times": times and asdict(times),
            "account": tally.account().model_dump(),
        }
        with _writer(file, told) as writer:
            for batch in _in_order(database):
                writer.write_batch(batch, LINES_PER_GROUP)


def write_rows(file: BinaryIO, kind: Kind, items: Iterable[tuple[str, dict, dict]]) -> None:
    """A plan of (file, captions by column, metadata), in their order."""
    lines = [
        {"number": number, "row": number + 1, "file": name, "captions": json.dumps(captions),
         "metadata": json.dumps(metadata)}
        for number, (name, captions, metadata) in enumerate(items)
    ]  # fmt: skip
    told = {"kind": kind, "files": len(lines), "rows": len(lines), "times": None, "account": {}}
    with _writer(file, told) as writer:
        writer.write_table(pyarrow.Table.from_pylist(lines, schema=SCHEMA), LINES_PER_GROUP)


def open_plan(path: str) -> Plan:
    """The plan in a file."""
    metadata = parquet.read_schema(storage.local_file(path)).metadata or {}
    told = json.loads(metadata[TOLD])
    times = told["times"] and Times(**told["times"] | {"columns": tuple(told["times"]["columns"])})
    account = Account.model_validate(told["account"])
    return Plan(path, told["kind"], told["files"], told["rows"], times, account)


def _in_order(database: duckdb.DuckDBPyConnection) -> Iterator[pyarrow.RecordBatch]:
    """Lines of the plan: files in the order of their first rows, or of their names."""
    lines = database.sql(
        "SELECT numbers.number, planned.row, planned.file, place, captions, times, metadata, json, "
        "txt FROM planned JOIN (SELECT file, row_number() OVER (ORDER BY min(row), file) - 1 AS "
        "number FROM planned GROUP BY file) AS numbers ON numbers.file = planned.file "
        "ORDER BY numbers.number, planned.row"
    )
    for batch in lines.to_arrow_reader(LINES_PER_GROUP):
        yield pyarrow.record_batch(batch.columns, schema=SCHEMA)


def _writer(file: BinaryIO, told: dict[str, Any]) -> parquet.ParquetWriter:
    schema = SCHEMA.with_metadata({TOLD: json.dumps(told).encode()})
    return parquet.ParquetWriter(file, schema, compression="zstd")
