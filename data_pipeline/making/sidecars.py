"""The texts beside media as a list, so that SQL chooses among them as among a list's rows."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import duckdb

from data_pipeline.errors import DataError
from data_pipeline.making.database import reason, text
from data_pipeline.making.listing import Place
from data_pipeline.making.presets import Columns
from data_pipeline.making.scoring import AGAIN, COLUMNS, dataset_in, open_scores, tar_name
from data_pipeline.shards.account import Tally
from data_pipeline.shards.captions import decode_text, parse_object
from data_pipeline.store import storage

MEDIA = "t2v_media"
READERS, AT_ONCE = 16, 4096
PAIRS = (
    "SELECT media.file, json, txt, scores.told FROM present AS media JOIN texts USING (stem) "
    "LEFT JOIN scores USING (stem) WHERE media.kind IS NOT NULL AND coalesce(json, txt) IS NOT NULL"
    " ORDER BY media.file"
)


def write_beside(
    database: duckdb.DuckDBPyConnection, folder: str, columns: Columns, path: Path, tally: Tally
) -> Columns:
    """Write a list of lines, one for each of the media `present` with a text beside, and take the
    texts out of that table; what the columns of the list mean."""
    caption = next(iter(columns.captions))
    hidden = _note_scores(database, folder)
    pairs = database.cursor().execute(PAIRS)

    def line(pair: tuple[str, str | None, str | None, str | None]) -> str | DataError:
        file, *places, scores = pair
        told, words = (Place(*json.loads(place)) if place else None for place in places)
        try:
            row = parse_object(told.read(folder)) if told else {}
            if words and not any(row.get(name) for name in columns.captions):
                row[caption] = decode_text(words.read(folder))
        except DataError as error:
            return error
        return json.dumps(row | (json.loads(scores) if scores else {}) | {MEDIA: file})

    with storage.open_atomic(str(path)) as lines, ThreadPoolExecutor(READERS) as readers:
        while some := pairs.fetchmany(AT_ONCE):
            for (file, *_), found in zip(some, readers.map(line, some), strict=True):
                if isinstance(found, DataError):
                    tally.add("unusable", str(found), [file])
                else:
                    lines.write(f"{found}\n".encode())
    database.execute(
        f"DELETE FROM present WHERE place IN (SELECT unnest([json, txt]) FROM ({PAIRS}) "
        "AS pairs(file, json, txt, told))"
    )
    return replace(columns, file=MEDIA, hidden=hidden)


def _note_scores(database: duckdb.DuckDBPyConnection, folder: str) -> tuple[str, ...]:
    """Make table `scores` of those of a dataset's samples, by what their media are called without
    the type; what columns it has."""
    data = dataset_in(folder)
    scores = data and open_scores(data)
    if not (data and scores):
        database.execute("CREATE TABLE scores (stem VARCHAR, told VARCHAR)")
        return ()
    stems = [text(part) for part in tar_name(data, "*").split("*")]
    packed = ", ".join(f"{name} := {name}" for name in COLUMNS)
    try:
        database.execute(
            f"CREATE TABLE scores AS SELECT nfc_normalize({stems[0]} || shard || {stems[1]} || '/' "
            f"|| key) AS stem, to_json(struct_pack({packed}))::VARCHAR AS told "
            "FROM read_parquet($path)",
            {"path": str(storage.local_file(scores.path))},
        )
    except duckdb.Error as error:
        raise DataError(f"{scores.path}: is damaged because {reason(error)}; {AGAIN}.") from None
    return COLUMNS
