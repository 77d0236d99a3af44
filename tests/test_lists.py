"""Lists of captioned media: read alike in every format, and no row lost without a word."""

import csv
import datetime
import gzip
import json
import os
import resource
import signal
import threading
from pathlib import Path

import pyarrow
import pytest
from numbered import write_csv, write_lines
from pyarrow import parquet

from data_pipeline.errors import StorageError, UserError
from data_pipeline.making.database import open_database
from data_pipeline.making.plan import Plan, open_plan, write_plan
from data_pipeline.making.presets import Columns
from t2v.cli import end_in_order

ROWS = [
    {"file": "a.mp4", "caption": 'a "quoted", red\nball', "score": 0.5, "id": "007"},
    {"file": "sub/b.mp4", "caption": "ein grünes Haus", "score": 3.0, "id": "012"},
    {"file": "c.mp4", "caption": "", "score": 2.0, "id": "100"},
]


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "media"
    (folder / "sub").mkdir(parents=True)
    for row in ROWS:
        (folder / row["file"]).touch()
    return folder


def plan(source: Path, root: Path | None = None, **columns) -> Plan:
    path = str(source.parent.parent / f"{source.name.replace('*', 'all')}.plan")
    where = str(root) if root else None
    with open(path, "wb") as file:
        write_plan(file, str(source), Columns(**columns), root=where, kind=None)
    return open_plan(path)


def told(found: Plan) -> list[tuple]:
    return [
        (item.file, json.loads(row.captions)["caption"], json.loads(row.metadata))
        for item in found.items(0, found.files)
        for row in item.rows
    ]


def write(path: Path, rows: list[dict]) -> Path:
    plain = path.with_name(path.name.removesuffix(".gz"))
    if plain.suffix in (".csv", ".tsv"):
        write_csv(plain, rows)
    elif plain.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), plain)
    elif plain.suffix == ".json":
        plain.write_text(json.dumps(rows, indent=1))
    else:
        write_lines(plain, rows)
    if path != plain:
        path.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
        plain.unlink()
    return path


@pytest.mark.parametrize("name", ["l.csv", "l.tsv", "l.jsonl", "l.ndjson", "l.json", "l.parquet",
                                  "l.csv.gz", "l.jsonl.gz"])  # fmt: skip
def test_every_format_gives_the_same_rows(folder, name):
    found = plan(write(folder / name, ROWS))
    rest = [{"score": row["score"], "id": row["id"]} for row in ROWS]
    assert told(found) == [(r["file"], r["caption"], m) for r, m in zip(ROWS, rest, strict=True)]
    assert (found.kind, found.files, found.rows) == ("video", 3, 3)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_lists_with_a_mark_are_read_in_their_encoding(folder, encoding):
    for path in (write(folder / "l.csv", ROWS), write(folder / "l.jsonl", ROWS)):
        expected = told(plan(path))
        path.write_bytes(path.read_text("utf-8").encode(encoding))
        assert told(plan(path)) == expected


@pytest.mark.parametrize(
    ("suffix", "delimiter"), [("c", ";"), ("c", "\t"), ("c", "|"), ("t", ","), ("t", ";")]
)
def test_columns_may_be_parted_by_other_signs(folder, suffix, delimiter):
    path = folder / ("l.csv" if suffix == "c" else "l.tsv")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    assert told(plan(path)) == told(plan(write(folder / "l.parquet", ROWS)))


def test_another_encoding_is_refused_row_by_row_or_told(folder):
    path = write(folder / "l.csv", ROWS)
    expected = told(plan(path))
    path.write_bytes(path.read_text("utf-8").encode("latin-1"))
    assert told(plan(path, encoding="latin-1")) == expected
    found = plan(path)
    assert [file for file, *_ in told(found)] == ["a.mp4", "c.mp4"]
    assert found.account.unusable == {"row is no UTF-8 (see --encoding)": 1}


def test_a_pattern_is_all_its_lists_each_with_its_own_folder(folder):
    for name in ("one", "two"):
        (folder / name).mkdir()
        (folder / name / "x.mp4").touch()
        write_csv(folder / name / "list.csv", [{"file": "x.mp4", "caption": name}])
    found = plan(folder / "*" / "list.csv")
    assert [row[:2] for row in told(found)] == [("one/x.mp4", "one"), ("two/x.mp4", "two")]


def test_a_folder_of_parts_is_one_list(folder):
    parts = folder.parent / "l.parquet"
    parts.mkdir()
    for number, row in enumerate(ROWS):
        write(parts / f"part-{number}.parquet", [row])
    (parts / "_SUCCESS").touch()
    assert told(plan(parts, root=folder)) == told(plan(write(folder / "l.parquet", ROWS)))


def test_files_are_found_by_path_without_type_below_the_root_or_by_a_name_of_their_own(folder):
    (folder / "deep" / "er").mkdir(parents=True)
    accented, same = "re\u0301sume\u0301.mp4", "r\u00e9sum\u00e9.mp4"
    for name in ("deep/er/unique.mp4", "deep/twice.mp4", "twice.webm", "deep/er/twice.webm",
                 f"deep/{accented}"):  # fmt: skip
        (folder / name).touch()
    names = {
        "./a.mp4": "a.mp4", str(folder / "c.mp4"): "c.mp4", "sub/b": "sub/b.mp4",
        "unique": "deep/er/unique.mp4", "deep/twice": "deep/twice.mp4", "nothing": None,
        "deep\\er\\unique.mp4": "deep/er/unique.mp4", "deep//./er///unique": "deep/er/unique.mp4",
        f"deep/{same}": f"deep/{accented}",
        "..\\a.mp4": None, "../a.mp4": None, "s3://b/c.mp4": None, "/etc/a.mp4": None,
        "twice": None, "": None,
    }  # fmt: skip
    path = write_csv(folder.parent / "l.csv", [{"file": n, "caption": n} for n in names])
    found = plan(path, root=folder)
    assert {caption: file for file, caption, _ in told(found)} == {
        name: file for name, file in names.items() if file
    }
    assert found.account.unusable == {
        "file leaves the folder": 4, "no such file": 1, "row may mean more than one file": 1,
        "row names no file": 1,
    }  # fmt: skip
    assert found.account.passed_over == {"media in no wanted row": 2}


@pytest.mark.parametrize(
    ("name", "content", "reasons"),
    [
        ("l.csv", b"file,caption\na.mp4\nc.mp4,x\n", {"row has too few fields": 1}),
        ("l.csv", b"file,caption\na.mp4,x,y\nc.mp4,x\n", {"row has too many fields": 1}),
        ("l.csv", b'file,caption\nc.mp4,x\na.mp4,"x\nc.mp4,x\n',
         {"row has quotes that do not match": 2}),
        ("l.csv", b"file,caption\n\xff\xfe,x\nc.mp4,x\n", {"row is no UTF-8 (see --encoding)": 1}),
        ("l.jsonl", b'{"file": "a.mp4", "caption": "\\ud83d"}\n{"file": "c.mp4", "caption": ""}',
         {"row is no JSON object": 1}),
        ("l.jsonl", b'{bad\n\n[1]\n7\n{"file": "c.mp4", "caption": "x"}\n',
         {"row is no JSON object": 3}),
        ("l.jsonl", b'{"file": 7, "caption": "x"}\n{"file": "c.mp4", "caption": "x"}\n',
         {"row names no file": 1}),
        ("l.csv", b"file,caption\nl.csv,x\nc.mp4,x\n", {"file is of another type": 1}),
        ("l.jsonl", b'{"file": "a.mp4", "file": "c.mp4", "caption": "x"}\n'
         b'{"file": "c.mp4", "caption": "x"}\n', {"row has two members of one name": 1}),
    ],
)  # fmt: skip
def test_bad_rows_are_counted_by_reason_and_the_others_used(folder, name, content, reasons):
    (folder / name).write_bytes(content)
    found = plan(folder / name)
    assert [file for file, *_ in told(found)] == ["c.mp4"]
    assert found.account.unusable == reasons


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.csv", b"file,text\na.mp4,x\n", "column 'caption' is missing.*there are file, text"),
        ("l.csv", b"name,caption\na.mp4,x\n", "column 'file' is missing.*--file-column"),
        ("l.csv", b"file,caption,Caption\na.mp4,x,y\n", "'Caption' is there twice"),
        ("l.csv", b"file,caption\n", "is empty"),
        ("l.csv", b"", "'caption' is missing|is empty"),
        ("l.parquet", b"PAR1 not", "l.parquet: .*; correct it"),
        ("l.json", b'[{"file": "a.mp4"', "l.json: .*; correct it"),
        ("l.csv.gz", b"file,caption\n", "cannot be read because"),
        (
            "l.csv.gz",
            gzip.compress(b"file,caption\n", mtime=0)[:12] + b"\xff" * 20,
            "cannot be read because",
        ),
        ("none.parquet", None, "no such file"),
        ("none*.parquet", None, "no such file; check the pattern"),
    ],
)
def test_lists_that_cannot_be_used_get_one_line(folder, name, content, message):
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        plan(folder / name)
    assert "\n" not in str(error.value)


def test_a_condition_chooses_rows_and_a_selection_metadata(folder):
    for path in (write(folder / "l.csv", ROWS), write(folder / "l.jsonl", ROWS)):
        found = plan(path, where="score >= 2 and id != '100' -- a comment", select="score * 2 AS s")
        assert told(found) == [("sub/b.mp4", "ein grünes Haus", {"s": 6.0})]
        assert found.account.not_wanted == {"row is not --where": 2}
        rest = plan(path, select="* EXCLUDE (file, caption), upper(id) AS ID2")
        assert told(rest)[1][2] == {"score": 3.0, "id": "012", "ID2": "012"}


@pytest.mark.parametrize("where", ["scor > 2", "score >", "1); DROP TABLE rows; --", "sum(id) > 1",
                                   "id IN (SELECT column0 FROM read_csv('/etc/passwd'))",
                                   "id IN (SELECT * FROM read_text('/etc/passwd'))"])  # fmt: skip
def test_conditions_that_are_wrong_or_reach_out_are_refused(folder, where):
    with pytest.raises(UserError, match="--where or --select is wrong because") as error:
        plan(write(folder / "l.csv", ROWS), where=where)
    assert "\n" not in str(error.value)


def test_what_json_cannot_hold_is_told_or_null(folder):
    rows = [row | {"thumbnail": b"\x00", "bad": float("nan")} for row in ROWS]
    found = plan(write(folder / "l.parquet", rows))
    assert "thumbnail" not in told(found)[0][2]
    assert found.account.examples["column of bytes"] == ["thumbnail"]


def test_parquet_of_bytes_that_are_text_is_text(folder):
    rows = [{name: str(value).encode() for name, value in row.items()} for row in ROWS]
    rows[0]["blob"], rows[1]["blob"] = "gr\u00fcn".encode(), "gr\u00fcn".encode("latin-1")
    found = plan(write(folder / "l.parquet", rows), select="id")
    assert told(found) == told(plan(write(folder / "l.csv", ROWS), select="id"))
    assert found.account.examples["column of bytes"] == ["blob"]


@pytest.mark.parametrize("packed", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize(
    "content",
    [
        b"file,caption\na.mp4,x\r\nc.mp4,y\n",
        b"file,caption\r\na.mp4,x\nc.mp4,y",
        b'file,caption\na.mp4,"x"\r\n"c.mp4","y"\n',
    ],
)
def test_lines_may_end_in_two_ways(folder, packed, content):
    path = folder / ("l.csv.gz" if packed is gzip.compress else "l.csv")
    path.write_bytes(packed(content))
    assert [item[:2] for item in told(plan(path))] == [("a.mp4", "x"), ("c.mp4", "y")]


def test_a_column_of_moments_holds_no_captions(folder):
    rows = [row | {"caption": datetime.datetime(2020, 1, 1)} for row in ROWS]
    with pytest.raises(UserError, match=r"column 'caption' holds no captions but .* TIMESTAMP"):
        plan(write(folder / "l.parquet", rows))


def test_a_plan_is_read_by_parts_in_one_order(folder):
    names = [f"{number * 7 % 300:03d}.mp4" for number in range(300)]
    for name in names:
        (folder / name).touch()
    path = write_csv(folder / "l.csv", [{"file": n, "caption": n} for n in [*names, *names]])
    found = plan(path)
    parts = [item for begin in range(0, 300, 70) for item in found.items(begin, begin + 70)]
    assert [item.file for item in parts] == names
    assert all([json.loads(r.captions)["caption"] for r in i.rows] == [i.file] * 2 for i in parts)
    assert Path(found.path).read_bytes() == Path(plan(path).path).read_bytes()


def test_a_folder_is_accounted_for(folder):
    (folder / "a.txt").write_text("a")
    (folder / "c.json").write_text("{}")
    for name in ("notes.md", "film.wmv", ".hidden.mp4", "alone.txt", "sub/.DS_Store", "2.tar.gz"):
        (folder / name).touch()
    (folder.parent / "elsewhere").mkdir()
    (folder / "link").symlink_to(folder.parent / "elsewhere")
    (folder / "broken.mp4").symlink_to(folder / "nowhere")
    (folder / "circle.mp4").symlink_to(folder / "circle.mp4")
    (folder / "c.gif").touch()
    os.mkdir(folder / "dir.mp4")
    found = plan(folder)
    assert [item.file for item in found.items(0, found.files)] == ["a.mp4", "c.mp4"]
    assert found.account.unusable == {"has no caption": 1}
    assert found.account.passed_over == {
        "file of type .gz": 1, "file of type .gif": 1, "file of type .md": 1,
        "file of type .txt": 1, "file of type .wmv": 1, "hidden file": 2, "link to a folder": 1,
        "link that leads nowhere, or no file": 2,
    }  # fmt: skip
    assert found.account.examples["has no caption"] == ["sub/b.mp4"]


def test_names_that_are_no_text_are_counted(folder):
    (folder / "a.txt").write_text("a")
    with open(os.fsencode(folder) + b"/\xff.mp4", "wb"):
        found = plan(folder)
    assert found.account.passed_over["name is no UTF-8"] == 1


def fill_database() -> None:
    with open_database() as database:
        database.execute("SET memory_limit = '40MB'")
        database.execute("CREATE TABLE t AS SELECT repeat(range::VARCHAR, 30) FROM range(500000)")


@pytest.mark.parametrize("most", [100, 100_000])
def test_a_full_disk_below_the_database_is_told(most):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        with pytest.raises(StorageError, match="is full; make room"):
            fill_database()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("way", ["fetchall", "to_arrow_reader"])
@pytest.mark.parametrize(
    "endless",
    [
        "SELECT count(*) FROM range(10000000) AS a, range(10000000) AS b WHERE a.range < b.range",
        "SELECT max(hash(range)) FROM range(1000000000000)",
    ],
)
@pytest.mark.parametrize(
    ("number", "ends"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_signals_end_a_query_in_its_midst(number, ends, way, endless):
    def ask() -> None:
        with open_database() as database:
            threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
            getattr(database.sql(endless), way)()

    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, end_in_order)
    try:
        with pytest.raises(ends):
            ask()
    finally:
        signal.signal(signal.SIGTERM, before)
