"""Which files the rows of lists mean, and which files belong to each other in a folder.

Table `present` holds what lies in a folder, table `planned` what is to be made clips of; between
them nothing is lost: what is not planned is counted.
"""

import os
import re
from collections.abc import Iterator, Sequence
from itertools import islice

import duckdb
import pyarrow

from data_pipeline.errors import ConfigError, InputMissing
from data_pipeline.making.database import quoted, reason, text
from data_pipeline.making.listing import ARCHIVES, TEXTS, Found, Kind, kind_of, scan, scan_archive
from data_pipeline.making.lists import OWN, Table
from data_pipeline.making.presets import PRESETS, Columns
from data_pipeline.making.scoring import dataset_in, tar_name
from data_pipeline.making.times import Times
from data_pipeline.progress import progress
from data_pipeline.shards.account import Side, Tally
from data_pipeline.shards.captions import COLUMNS, SEVERAL
from data_pipeline.shards.scan import PREVIEW

BATCH = 50_000
NO_TEXTS = ("DATE", "TIME", "INTERVAL", "UUID", "BIT")
FILE_COLUMNS = ("file", "file_name")
TYPE = "coalesce(nullif(lower(regexp_extract(file, '[.][^./]*$')), ''), 'none')"
PRESENT = pyarrow.schema(
    {name: pyarrow.string() for name in ("file", "stem", "kind", "place")}  # place: JSON
)


def note_files(database: duckdb.DuckDBPyConnection, folder: str, tally: Tally) -> None:
    """Make table `present` of the files of a folder; of those in its archives, where it holds no
    media beside them, or of those in its shards, where it is a dataset; and view `texts` of what
    may be captions, by stem."""
    ask = database.execute
    ask("CREATE TABLE present (file VARCHAR, stem VARCHAR, kind VARCHAR, place VARCHAR)")
    told = ", ".join(
        f"arg_max(place, file) FILTER (lower(file) LIKE '%{kind}') AS {kind[1:]}" for kind in TEXTS
    )
    ask(f"CREATE VIEW texts AS SELECT stem, {told} FROM present WHERE kind IS NULL GROUP BY stem")
    if data := dataset_in(folder):
        archives = [tar_name(data, shard.name) for shard in data.info.shards]
    else:
        _insert(database, scan(folder, tally))
        kinds = " OR ".join(f"lower(file) LIKE '%{kind}'" for kind in ARCHIVES)
        found = ask(f"SELECT file FROM present WHERE {kinds} ORDER BY file").fetchall()
        is_loose = ask("SELECT 1 FROM present WHERE kind IS NOT NULL LIMIT 1").fetchall()
        archives = [] if is_loose else [file for (file,) in found]
    for file in progress(archives, "list archives", total=len(archives)):
        _insert(database, scan_archive(folder, file, tally))
    if archives:
        ask("DELETE FROM present WHERE file IN (SELECT unnest($files))", {"files": archives})
        again = "present WHERE rowid NOT IN (SELECT min(rowid) FROM present GROUP BY file)"
        _count(database, tally, "passed_over", "'member is there twice'", again)
        ask(f"DELETE FROM {again}")
    preview = f"lower(file) LIKE '%.{PREVIEW}'"
    ask(
        f"UPDATE present SET kind = NULL WHERE {preview} AND stem IN "
        f"(SELECT stem FROM present WHERE kind IS NOT NULL AND NOT {preview})"
    )


def _insert(database: duckdb.DuckDBPyConnection, found: Iterator[Found]) -> None:
    while files := list(islice(found, BATCH)):
        columns = zip(
            *((f.file, f.stem, kind_of(f.file), str(f.place)) for f in files), strict=True
        )
        database.register("batch", pyarrow.table(list(map(list, columns)), schema=PRESENT))
        database.execute("INSERT INTO present FROM batch")
        database.unregister("batch")


def plan_folder(database: duckdb.DuckDBPyConnection, folder: str, tally: Tally) -> int:
    """Make table `planned` of media with a file of captions beside; the number of all media."""
    ask = database.execute
    ask(
        "CREATE TABLE planned AS SELECT NULL::BIGINT AS row, media.file, media.kind, media.place, "
        "NULL::VARCHAR AS captions, NULL::VARCHAR AS times, NULL::VARCHAR AS metadata, "
        "json, txt FROM present AS media LEFT JOIN texts USING (stem) WHERE media.kind IS NOT NULL"
    )
    (total,), = ask("SELECT count(*) FROM planned").fetchall()  # fmt: skip
    if not total:
        types = f"SELECT {TYPE} AS type, count(*) FROM present GROUP BY 1 ORDER BY 2 DESC, 1"
        told = ", ".join(f"{count} of type {type_}" for type_, count in ask(types).fetchmany(3))
        but = f" ({told})" if told else ""
        raise InputMissing(f"{folder}: holds no video or image{but}; check the folder.")
    bare = "json IS NULL AND txt IS NULL"
    _count(database, tally, "unusable", "'has no caption'", f"planned WHERE {bare}")
    ask(f"DELETE FROM planned WHERE {bare}")
    _count(
        database,
        tally,
        "passed_over",
        f"'file of type ' || {TYPE}",
        "present WHERE kind IS NULL AND place NOT IN (SELECT json FROM planned WHERE json IS NOT "
        "NULL UNION ALL SELECT txt FROM planned WHERE txt IS NOT NULL)",
    )
    return total


def plan_lists(
    table: Table,
    lists: Sequence[str],
    folder: str,
    columns: Columns,
    times: Times | None,
    tally: Tally,
) -> int:
    """Make table `planned` of the rows that mean a file; the number of all rows."""
    (read,), = table.ask("SELECT count(*) FROM rows")  # fmt: skip
    total = read + tally.count("unusable")
    if not total:
        raise InputMissing(f"{table.path}: is empty; write one row per file.")
    captions, moments = _caption_columns(table, columns), times.all_columns if times else ()
    file, names = _file_of(table, columns)
    used = {*captions, *moments, *names, *columns.hidden}
    others = [n for n in table.names if n not in used]
    kept = columns.select or ", ".join(map(quoted, others))
    try:
        described = table.ask(f"DESCRIBE SELECT {kept}\n FROM rows") if kept else []
        metadata = _object([n for n, *_ in described if n not in OWN]) if kept else "'{}'"
        table.database.execute(
            f"CREATE TABLE said AS SELECT t2v_number AS row, t2v_of AS list, t2v_file AS value, "
            f"t2v_captions AS captions, t2v_times AS times, {metadata} AS metadata FROM (SELECT "
            f"t2v_row AS t2v_number, t2v_list AS t2v_of, {file} AS t2v_file, "
            f"{_object(captions)} AS t2v_captions, "
            f"{_array(moments)} AS t2v_times, {kept}\n FROM rows "
            f"WHERE ({columns.where or 'true'}\n) IS TRUE)"
        )
    except duckdb.Error as error:
        raise ConfigError(
            f"{table.path}: --where or --select is wrong because {reason(error)}; the columns are "
            f"{', '.join(table.names)}."
        ) from None
    (wanted,), = table.ask("SELECT count(*) FROM said")  # fmt: skip
    tally.add("not_wanted", "row is not --where", [], read - wanted)
    _find_files(table.database, lists, folder, columns, tally)
    return total


def choose_kind(
    database: duckdb.DuckDBPyConnection, source: str, kind: Kind | None, tally: Tally
) -> Kind:
    """The kind of media to take, the only one unless it is given; others are counted."""
    ask = database.execute
    found = dict(ask("SELECT kind, count(*) FROM planned GROUP BY kind").fetchall())
    if kind is None and len(found) > 1:
        raise ConfigError(
            f"{source}: holds videos and images, which make separate datasets; "
            "choose one with --kind video or --kind image."
        )
    chosen = kind or next(iter(found), "video")
    others = f"planned WHERE kind != {text(chosen)}"
    _count(database, tally, "not_wanted", "kind || ', by --kind'", others)
    ask(f"DELETE FROM {others}")
    if chosen not in found and not tally.count("unusable"):
        counts = tally.account().not_wanted
        reasons = ", ".join(f"{count} x {why}" for why, count in counts.items())
        raise InputMissing(
            f"{source}: holds no captioned {chosen} that is wanted ({reasons or 'nothing'}); "
            "check --kind, --where and the folder."
        )
    return chosen


def _caption_columns(table: Table, columns: Columns) -> list[str]:
    """The columns of captions that a list has."""
    there = [name for name in columns.captions if name in table.names]
    absent = [name for name in columns.captions if name not in table.names]
    if absent and not (columns.any_caption and there):
        options = "" if columns.captions != COLUMNS else ", or give a --preset"
        raise ConfigError(
            f"{table.path}: column '{absent[0]}' is missing; name that of captions by "
            f"--caption-column{options}; there are {', '.join(table.names)}."
        )
    for name in there:
        if table.types[name].startswith(NO_TEXTS):  # which JSON has as texts
            raise ConfigError(
                f"{table.path}: column '{name}' holds no captions but values of type "
                f"{table.types[name]}; name that of captions by --caption-column."
            )
    is_ours = columns.captions == COLUMNS and {table.types.get(name) for name in SEVERAL} == {
        "JSON"
    }
    return [*there, *SEVERAL] if is_ours else there


def _file_of(table: Table, columns: Columns) -> tuple[str, list[str]]:
    """The name of the file as SQL, and the columns that it is made of."""
    choices = [columns.file] if columns.file else FILE_COLUMNS
    chosen = next((name for name in choices if name in table.names), choices[0])
    is_template = columns.file is not None and "{" in columns.file
    parts = re.split(r"[{}]", chosen) if is_template else ["", chosen, ""]
    names = parts[1::2]
    for name in names:
        if name not in table.names:
            raise ConfigError(
                f"{table.path}: column '{name}' is missing; name that of files by --file-column, "
                f"or give a --preset of {', '.join(PRESETS)}; there are {', '.join(table.names)}."
            )
    pieces = [text(p) if n % 2 == 0 else _as_text(table, p) for n, p in enumerate(parts)]
    return " || ".join(pieces), names


def _as_text(table: Table, name: str) -> str:
    """A column as text; null where it is neither text nor a whole number."""
    match table.types[name]:
        case "VARCHAR":
            return quoted(name)
        case "JSON":
            pointer = f"json_extract_string({quoted(name)}, '$')"
            return f"CASE WHEN json_type({quoted(name)}) = 'VARCHAR' THEN {pointer} END"
        case kind if kind.endswith("INT") or kind.endswith("INTEGER"):
            return f"{quoted(name)}::VARCHAR"
    return "NULL::VARCHAR"


def _object(names: Sequence[str]) -> str:
    packed = ", ".join(f"{quoted(name)} := {quoted(name)}" for name in names)
    return f"to_json(struct_pack({packed}))::VARCHAR"


def _array(names: Sequence[str]) -> str:
    packed = ", ".join(f"to_json({quoted(name)})" for name in names)
    return f"json_array({packed})::VARCHAR" if names else "NULL::VARCHAR"


def _find_files(
    database: duckdb.DuckDBPyConnection,
    lists: Sequence[str],
    folder: str,
    columns: Columns,
    tally: Tally,
) -> None:
    """Make table `planned` of table `said`: a value is a path below the folder or below its
    list's own or inside an archive, with or without the type; or a name that only one file has,
    wherever it lies."""
    below, absolute = f"{folder.rstrip('/')}/", f"{os.path.abspath(folder).rstrip('/')}/"
    heads = [
        path.removeprefix(below).rpartition("/")[0] if path.startswith(below) else ""
        for path in lists
    ]
    heads = [f"{head}/" if head else "" for head in heads]
    inside = "|".join(map(re.escape, ARCHIVES))
    ask = database.execute
    ask(
        "CREATE TABLE named AS SELECT *, nfc_normalize(regexp_replace(replace(name, '\\', '/'), "
        "'/+([.]/+)*', '/', 'g')) AS plain FROM ("
        "SELECT *, CASE WHEN starts_with(value, $below) THEN substr(value, length($below) + 1) "
        "WHEN starts_with(value, $absolute) THEN substr(value, length($absolute) + 1) "
        "ELSE $heads[list + 1] || regexp_replace(value, '^([.][/\\\\]+)+', '') END AS name "
        "FROM said)",
        {"below": below, "absolute": absolute, "heads": heads},
    )
    ask(
        "CREATE TABLE known AS SELECT name, min(file) AS file, count(DISTINCT file) AS files FROM ("
        "SELECT unnest([path, regexp_extract(path, '[^/]+$'), "
        f"regexp_extract(path, '(?i)(?:{inside})/(.+)$', 1)]) AS name, file FROM ("
        "SELECT file, unnest([nfc_normalize(file), CASE WHEN kind IS NOT NULL THEN stem END]) AS "
        "path FROM present)) WHERE name != '' GROUP BY name"
    )
    ask(
        "CREATE TABLE found AS SELECT named.*, present.file, present.kind, present.place, CASE "
        "WHEN coalesce(value, '') = '' THEN 'row names no file' "
        "WHEN contains(value, '://') OR starts_with(plain, '/') OR "
        "list_contains(string_split(plain, '/'), '..') THEN 'file leaves the folder' "
        "WHEN known.files > 1 AND exact.file IS NULL THEN 'row may mean more than one file' "
        "WHEN present.file IS NULL THEN 'no such file' "
        "WHEN present.kind IS NULL THEN 'file is of another type' END AS why "
        "FROM named LEFT JOIN present AS exact ON exact.file = named.name "
        "LEFT JOIN known ON known.name = plain "
        "LEFT JOIN present ON present.file = coalesce(exact.file, known.file)"
    )
    bad = (
        "(SELECT 'row ' || row || coalesce(' (' || value || ')', '') AS file, why, row FROM found)"
    )
    for missing in (True, False):
        lost = columns.may_miss and missing
        same = f"why {'=' if missing else '!='} 'no such file'"
        _count(database, tally, "not_wanted" if lost else "unusable", "why", f"{bad} WHERE {same}")
    ask(
        "CREATE TABLE planned AS SELECT row, file, kind, place, captions, times, metadata, "
        "NULL::VARCHAR AS json, NULL::VARCHAR AS txt FROM found WHERE why IS NULL"
    )
    _count(
        database,
        tally,
        "passed_over",
        f"CASE WHEN kind IS NULL THEN 'file of type ' || {TYPE} ELSE 'media in no wanted row' END",
        "present WHERE file NOT IN (SELECT file FROM found WHERE file IS NOT NULL AND "
        "coalesce(why, '') != 'row may mean more than one file')",
        but=[path.removeprefix(below) for path in lists],
    )


def _count(
    database: duckdb.DuckDBPyConnection,
    tally: Tally,
    side: Side,
    why: str,
    of: str,
    but: Sequence[str] = (),
) -> None:
    """Count files of a table by a reason, both in SQL."""
    for reason_, count, files in database.execute(
        f"SELECT why, count(*), list(file ORDER BY file)[:3] FROM (SELECT {why} AS why, file "
        f"FROM {of}) WHERE NOT list_contains($but, file) GROUP BY why ORDER BY why",
        {"but": list(but)},
    ).fetchall():
        tally.add(side, reason_, files, count)
