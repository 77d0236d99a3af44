"""Lists of captioned media: the same items from JSON lines, CSV and parquet."""

import csv
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from data_pipeline.errors import UserError
from data_pipeline.making.listing import list_media

ENTRIES = [
    {"file": "a.mp4", "caption": 'a "quoted", red\nball', "licence": "CC0"},
    {"file": "sub/b.mp4", "caption": "ein grünes Haus", "licence": "MIT"},
]


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "sub").mkdir()
    for entry in ENTRIES:
        (tmp_path / entry["file"]).touch()
    return tmp_path


def write_csv(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def test_every_kind_of_list_gives_the_same_items(folder):
    lines = folder / "list.jsonl"
    lines.write_text("".join(json.dumps(entry) + "\n" for entry in ENTRIES))
    table = write_csv(folder / "list.csv", [list(ENTRIES[0]), *(list(e.values()) for e in ENTRIES)])
    parquet.write_table(pyarrow.Table.from_pylist(ENTRIES), folder / "list.parquet")
    found = [list_media(path) for path in (lines, table, folder / "list.parquet")]
    assert found[0] == found[1] == found[2]
    assert [item.file for item in found[0].items] == ["a.mp4", "sub/b.mp4"]
    assert found[0].items[0].caption == ENTRIES[0]["caption"]
    assert found[0].items[1].metadata == {"licence": "MIT"}
    assert found[0].folder == str(folder)


def test_fields_of_a_parquet_that_json_cannot_hold_are_left_out(folder):
    entries = [entry | {"thumbnail": b"\x00", "score": 0.5} for entry in ENTRIES]
    parquet.write_table(pyarrow.Table.from_pylist(entries), folder / "list.parquet")
    assert list_media(folder / "list.parquet").items[0].metadata == {"licence": "CC0", "score": 0.5}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.csv", b"file,text\na.mp4,x\n", "column 'caption' is missing"),
        ("list.csv", b"file,caption\na.mp4\n", "line 2: is wrong because it has not as many"),
        ("list.csv", b"file,caption\na.mp4,x,y\n", "line 2: is wrong because it has not as many"),
        ("list.csv", b"file,caption\n\xff\xfe,x\n", "is no CSV in UTF-8"),
        ("list.csv", b"file,caption\n", "is empty"),
        ("list.csv", b"file,caption\nc.mp4,x\n", "line 2: file: value 'c.mp4' .* no such file"),
        ("list.csv", b"file,caption\ns3://b/c.mp4,x\n", "leaves the folder"),
        (
            "list.jsonl",
            b'{"file": "a.mp4", "caption": "half \\ud83d"}\n',
            r"line 1: caption: is wrong because character 5 is half of a pair",
        ),
        ("list.parquet", b"PAR1 not", "is no readable parquet"),
        ("none.parquet", None, "no such folder or list"),
    ],
)
def test_bad_lists_get_one_line(folder, name, content, message):
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        list_media(folder / name)
    assert "\n" not in str(error.value)
