"""Reading lists: CSV, JSON and parquet of any length as one table of an embedded database.

The database lies on disk in a folder of its own and spills what memory does not hold. Extensions
are never fetched, and once lists are read it opens no other file, whatever a condition says.
"""

import csv
import gzip
import io
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any

import duckdb

from data_pipeline.errors import ConfigError, DataError, InputMissing
from data_pipeline.making.database import quoted, reason, text
from data_pipeline.shards.account import Tally
from data_pipeline.shards.captions import encoding_by_mark
from data_pipeline.store import storage

COMMAS, LINES, ARRAYS, TABLES = (".csv", ".tsv"), (".jsonl", ".ndjson"), (".json",), (".parquet",)
LISTS = (*COMMAS, *LINES, *ARRAYS, *TABLES)
MOST_ROW_BYTES = 64 << 20
OWN = ("t2v_row", "t2v_list")  # columns of ours: number of the row, and of its list
UNNAMED = "unnamed"
BAD_JSON = {
    "row is no JSON object": "coalesce(json_type(TRY_CAST(json AS JSON)), '') != 'OBJECT'",
    "row has two members of one name": "NOT list_unique(json_keys(json)) = len(json_keys(json))",
}
REJECTS = {
    "MISSING COLUMNS": "has too few fields",
    "TOO MANY COLUMNS": "has too many fields",
    "INVALID ENCODING": "is no UTF-8 (see --encoding)",
    "UNQUOTED VALUE": "has quotes that do not match",
    "LINE SIZE OVER MAXIMUM": "is too long",
}


@dataclass(frozen=True)
class Table:
    """The rows of lists as table `rows` of a database, numbered from 1 in their order."""

    database: duckdb.DuckDBPyConnection
    path: str  # of the lists, for messages
    types: dict[str, str]  # of the columns by name

    @property
    def names(self) -> list[str]:
        """The columns."""
        return list(self.types)

    def ask(self, query: str, parameters: object = None) -> list[tuple]:
        """All that a query of ours answers; keep it small."""
        return self.database.execute(query, parameters).fetchall()


def is_list(path: str) -> bool:
    """Whether a path is that of a list, or a pattern of such paths."""
    return _kind(path) in LISTS


def list_paths(path: str) -> list[str]:
    """The lists of a path, which may be a pattern with * and ?, or a folder of parts, in
    the order of their names."""
    if os.path.isdir(path):
        return storage.match(storage.join(escape(path), f"*{_kind(path)}"))
    if storage.exists(path):
        return [path]
    if any(sign in path for sign in "*?["):
        return storage.match(path)
    raise InputMissing(f"{path}: no such file; check the path of the list.")


def read_lists(
    database: duckdb.DuckDBPyConnection,
    paths: Sequence[str],
    tally: Tally,
    *,
    encoding: str | None = None,
    told: str | None = None,
) -> Table:
    """All rows of lists of one kind; rows that cannot be read are counted as unusable. `told`: what
    messages call them, if not by their paths."""
    kinds = {_kind(path) for path in paths}
    if len(kinds) != 1:
        raise ConfigError(f"{paths[0]}: lists of one build must be of one kind, not {kinds}.")
    (kind,) = kinds
    told = told or (paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more")
    read = {**dict.fromkeys(COMMAS, _read_commas), **dict.fromkeys(TABLES, _read_tables)}
    try:
        with _readable(paths, encoding) as files:
            read.get(kind, _read_json)(database, files, told, kind, tally)
    except duckdb.Error as error:
        raise DataError(f"{told}: {reason(error)}; correct it.") from None
    database.execute("SET enable_external_access = false")
    database.execute("SET lock_configuration = true")
    described = database.execute("DESCRIBE rows").fetchall()
    return Table(database, told, {name: kind for name, kind, *_ in described if name not in OWN})


def _kind(path: str) -> str:
    return PurePosixPath(path.lower().removesuffix(".gz")).suffix


@contextmanager
def _readable(paths: Sequence[str], encoding: str | None) -> Iterator[list[str]]:
    """Local files with the bytes of lists, under names that are no patterns; of text in another
    encoding, or whose lines end in two ways, copies in UTF-8 whose lines end in LF."""
    with tempfile.TemporaryDirectory(prefix="t2v-text-") as folder:
        files = [str(Path(folder, str(number))) for number in range(len(paths))]
        for path, file in zip(paths, files, strict=True):
            _put_readable(path, Path(file), encoding)
        yield files


def _put_readable(path: str, beside: Path, encoding: str | None) -> None:
    local = storage.local_file(path)
    kind, is_packed = _kind(path), path.lower().endswith(".gz")
    if kind in TABLES:
        beside.symlink_to(local.resolve())
        return
    try:
        with _open(local, is_packed) as file:
            encoding = encoding_by_mark(file.read(4)) or encoding
        if not (encoding or is_packed or _ends_in_two_ways(local)):
            beside.symlink_to(local.resolve())
            return
        with (
            _open(local, is_packed) as file,
            io.TextIOWrapper(file, encoding=encoding or "utf-8-sig") as text_in,
            beside.open("w", encoding="utf-8", newline="") as text_out,
        ):
            shutil.copyfileobj(text_in, text_out, 1 << 20)
    except LookupError:
        raise ConfigError(f"encoding: value '{encoding}' is wrong; use latin-1, say.") from None
    except (UnicodeError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read because {error}; correct it.") from None


def _ends_in_two_ways(path: Path) -> bool:
    """Whether some lines end in CR LF and others in LF, which the database would take for faults of
    quoting; line ends within quotes count, too."""
    ends = dict.fromkeys((b"\r\n", b"\n"), 0)
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            piece += file.read(1) if piece.endswith(b"\r") else b""
            for end in ends:
                ends[end] += piece.count(end)
    return 0 < ends[b"\r\n"] < ends[b"\n"]


def _open(path: Path, is_packed: bool) -> Any:
    return gzip.open(path, "rb") if is_packed else path.open("rb")


def _read_commas(
    database: duckdb.DuckDBPyConnection, files: Sequence[str], told: str, kind: str, tally: Tally
) -> None:
    delimiters = "\t,;|" if kind == ".tsv" else ",;\t|"
    headers = [_header(file, told, delimiters) for file in files]
    if any(header != headers[0] for header in headers):
        raise DataError(f"{told}: lists have not the same columns; build them one by one.")
    delimiter, names = headers[0]
    how = f"header = true, delim = {text(delimiter)}, quote = '\"', escape = '\"'"
    _read_texts(database, files, names, how, tally)
    types = {name: _type_of_texts(database, name) for name in names}
    _keep(database, [f"{expression} AS {quoted(name)}" for name, expression in types.items()])


def _read_texts(
    database: duckdb.DuckDBPyConnection,
    files: Sequence[str],
    columns: Sequence[str],
    how: str,
    tally: Tally,
) -> None:
    """Make table `raw` of the texts between delimiters; rows that cannot be split are counted."""
    types = ", ".join(f"{text(name)}: 'VARCHAR'" for name in columns)
    database.execute(
        f"CREATE TABLE raw AS {_numbered(files)} FROM read_csv({list(files)}, {how}, "
        f"auto_detect = false, columns = {{{types}}}, store_rejects = true, "
        f"filename = 't2v_file', max_line_size = {MOST_ROW_BYTES})"
    )
    for error, lines, count in database.execute(
        "SELECT error, list(line ORDER BY line)[:3], sum(lines) FROM (SELECT file_id, line, "
        "min(error_type)::VARCHAR AS error, max(greatest(1, length(csv_line) - "
        "length(replace(csv_line, chr(10), '')))) AS lines FROM reject_errors GROUP BY ALL) "
        "GROUP BY error ORDER BY error"
    ).fetchall():
        why = f"row {REJECTS.get(error, error.lower())}"
        tally.add("unusable", why, [f"line {number}" for number in lines], int(count))


def _header(file: str, told: str, delimiters: str) -> tuple[str, list[str]]:
    """The first delimiter that parts the first line, or else the first one; and its columns."""
    found: dict[str, list[str]] = {}
    problem: Exception | None = None
    for delimiter in delimiters:
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            try:
                names = next(csv.reader(lines, delimiter=delimiter, strict=True), [])
                "".join(names).encode()
                found[delimiter] = names
            except (csv.Error, UnicodeError) as error:
                problem = problem or error
    if not found:
        raise DataError(
            f"{told}: is no CSV in UTF-8 because {problem}; correct it, or give --encoding."
        )
    delimiter = next((one for one, names in found.items() if len(names) > 1), next(iter(found)))
    names = found[delimiter]
    if not names:
        with open(file, "rb") as content:
            is_empty = not content.read(1 << 20).strip()
        why = "is empty; write one row per file."
        blank = "is wrong because its first line is empty; begin with the names of the columns."
        raise DataError(f"{told}: {why if is_empty else blank}")
    # The first column of tables that pandas writes has no name.
    names = [name.strip() or UNNAMED for name in names]
    _refuse_twins(told, names)
    return delimiter, names


def _type_of_texts(database: duckdb.DuckDBPyConnection, name: str) -> str:
    """A column of texts as numbers where every text is one and nothing is lost, as zeros are in
    front of a number; empty cells are texts without a character."""
    column = f"raw.{quoted(name)}"
    (whole, real, count), = database.execute(
        f"SELECT count(TRY_CAST({column} AS BIGINT)) FILTER "
        f"(TRY_CAST({column} AS BIGINT)::VARCHAR = {column}), count(TRY_CAST({column} AS DOUBLE)) "
        f"FILTER (regexp_full_match({column}, '-?(0|[1-9][0-9]*)([.][0-9]*)?(e-?[0-9]+)?', 'i')), "
        f"count({column}) FROM raw"
    ).fetchall()  # fmt: skip
    if count and whole == count:
        return f"TRY_CAST({column} AS BIGINT)"
    if count and real == count:
        return f"TRY_CAST({column} AS DOUBLE)"
    return f"coalesce({column}, '')"


def _read_tables(
    database: duckdb.DuckDBPyConnection, files: Sequence[str], told: str, kind: str, tally: Tally
) -> None:
    source = f"read_parquet({list(files)}, union_by_name = true, filename = 't2v_file')"
    described = database.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()
    names = [name for name, *_ in described if name != "t2v_file"]
    _refuse_twins(told, names)
    bytes_of = [name for name, kind, *_ in described if "BLOB" in kind]
    # Older writers do not mark which of their columns of bytes are text.
    texts = [n for n, kind, *_ in described if kind == "BLOB" and _is_text(database, source, n)]
    passed_over = [name for name in bytes_of if name not in texts]
    if passed_over:
        tally.add("passed_over", "column of bytes", passed_over)
    chosen = [name for name in names if name not in passed_over]
    columns = [f"decode({quoted(n)}) AS {quoted(n)}" if n in texts else quoted(n) for n in chosen]
    database.execute(
        f"CREATE TABLE raw AS {_numbered(files)} FROM "
        f"(SELECT {', '.join([*columns, 't2v_file'])} FROM {source})"
    )
    _keep(database, [f"raw.{quoted(name)}" for name in chosen])


def _is_text(database: duckdb.DuckDBPyConnection, source: str, name: str) -> bool:
    """Whether all bytes of a column are characters in UTF-8, none of them NUL."""
    no_text = f"coalesce(contains(TRY(decode({quoted(name)})), chr(0)), true)"
    return not database.execute(
        f"SELECT 1 FROM {source} WHERE {quoted(name)} IS NOT NULL AND {no_text} LIMIT 1"
    ).fetchall()


def _read_json(
    database: duckdb.DuckDBPyConnection, files: Sequence[str], told: str, kind: str, tally: Tally
) -> None:
    if kind in LINES:
        # A line is a cell of a table without delimiters, so that each bad one is found by itself.
        how = "header = false, delim = '\x01', quote = '', escape = '', strict_mode = false"
        _read_texts(database, files, ["json"], how, tally)
        database.execute("DELETE FROM raw WHERE trim(coalesce(json, ''), E' \\t\\r') = ''")
    else:
        database.execute(
            f"CREATE TABLE raw AS {_numbered(files)} FROM read_json_objects({list(files)}, "
            f"format = 'auto', filename = 't2v_file', maximum_object_size = {MOST_ROW_BYTES})"
        )
    for why, is_bad in BAD_JSON.items():
        (wrong, lines), = database.execute(
            f"SELECT count(*), list(t2v_row ORDER BY t2v_row)[:3] FROM raw WHERE {is_bad}"
        ).fetchall()  # fmt: skip
        if wrong:
            tally.add("unusable", why, [f"row {line}" for line in lines], wrong)
            database.execute(f"DELETE FROM raw WHERE {is_bad}")
    if kind in LINES and tally.count("unusable") and not _holds_rows(database):
        raise DataError(
            f"{told}: is wrong because none of its lines is a JSON object; write one on each line, "
            "or name an array of them .json."
        )
    found = database.execute(
        "SELECT name, min(t2v_row), min(place) FROM (SELECT t2v_row, unnest(json_keys(json)) AS "
        "name, generate_subscripts(json_keys(json), 1) AS place FROM raw) GROUP BY 1 ORDER BY 2, 3"
    ).fetchall()
    types = {name: _type_of_json(database, name) for name, *_ in found}
    _refuse_twins(told, [name or UNNAMED for name in types])
    _keep(database, [f"{kind} AS {quoted(name or UNNAMED)}" for name, kind in types.items()])


def _holds_rows(database: duckdb.DuckDBPyConnection) -> bool:
    return bool(database.execute("SELECT 1 FROM raw LIMIT 1").fetchall())


def _type_of_json(database: duckdb.DuckDBPyConnection, name: str) -> str:
    """A member of all objects as text, number or truth value where it is one in all of them."""
    pointer = text("/" + name.replace("~", "~0").replace("/", "~1"))
    value = f"json_extract(json, {pointer})"
    kinds = {
        kind
        for (kind,) in database.execute(f"SELECT DISTINCT json_type({value}) FROM raw").fetchall()
    } - {None, "NULL"}
    as_text = f"json_extract_string(json, {pointer})"
    if kinds <= {"VARCHAR"}:  # also where it is null in all of them
        return as_text
    for type_, taken in (("BIGINT", {"BIGINT", "UBIGINT"}),
                         ("DOUBLE", {"BIGINT", "UBIGINT", "DOUBLE"}),
                         ("BOOLEAN", {"BOOLEAN"})):  # fmt: skip
        if kinds and kinds <= taken:
            cast = f"TRY_CAST({as_text} AS {type_})"
            (lost,), = database.execute(  # numbers may be larger
                f"SELECT count({as_text}) - count({cast}) FROM raw"
            ).fetchall()  # fmt: skip
            return value if lost else cast
    return value


def _numbered(files: Sequence[str]) -> str:
    """The head of a query over files: numbers of row and list, and all that the rows hold."""
    return (
        f"SELECT row_number() OVER () AS t2v_row, list_position({list(files)}, t2v_file) - 1 AS "
        "t2v_list, * EXCLUDE (t2v_file)"
    )


def _keep(database: duckdb.DuckDBPyConnection, columns: Sequence[str]) -> None:
    """Call some expressions over the table as it was read `rows`."""
    chosen = ", ".join(["raw.t2v_row", "raw.t2v_list", *columns])
    database.execute(f"CREATE VIEW rows AS SELECT {chosen} FROM raw")


def _refuse_twins(told: str, names: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name.lower() in seen or name in OWN:
            raise DataError(
                f"{told}: column '{name}' is there twice, if only in other letters; rename one."
            )
        seen.add(name.lower())
