"""Odd names, values and nestings in lists: read, or one line; never a traceback, never NaN."""

import datetime
import decimal
import json
import os
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from numbered import SIZE, numbered_video, write_csv, write_lines
from pyarrow import parquet

from data_pipeline.shards.dataset import open_dataset
from t2v.cli import main

NAMES = ["[red]x[bold].mp4", "a\nb.mp4", '"q".mp4', "%s{x}.mp4", "'.mp4", "é.mp4", "a;b.mp4",
         "a b.MP4", "x.mp4.mp4", "-x.mp4", "日本.mp4"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    for name in NAMES:
        (folder / name).write_bytes(numbered_video(4))
        (folder / name).with_suffix(".txt").write_text(f"[bold]{name}")
    with open(os.fsencode(folder) + b"/\xff\xfe.mp4", "wb") as file:
        file.write(b"\xff")
    return folder


def build(source: Path, out: Path, *options: str) -> int:
    return main(["data", "build", str(source), str(out), "--size", f"4x{SIZE['height']}x160",
                 "--workers", "1", "--max-drop-rate", "1", *options])  # fmt: skip


@pytest.mark.parametrize("kind", ["csv", "jsonl", "folder", "where"])
def test_every_name_is_as_good_as_another(folder, tmp_path, kind, capsys):
    rows = [{"file": name, "caption": f"[bold]{name}"} for name in NAMES]
    options = [] if kind in ("folder", "where") else ["--root", str(folder)]
    if kind == "where":
        options = ["--where", "starts_with(caption, '[bold]')"]
    source = folder
    if kind == "csv":
        source = write_csv(tmp_path / "l.csv", rows)
    if kind == "jsonl":
        source = write_lines(tmp_path / "l.jsonl", rows)
    assert build(source, tmp_path / "out", *options) == 0
    dataset = open_dataset(tmp_path / "out")
    told = [dataset.read_told(0, row) for row in range(dataset.info.samples)]
    assert {(t["source"], c.first) for t, c in told} == {(n, f"[bold]{n}") for n in NAMES}
    assert dataset.info.account.passed_over["name is no UTF-8"] == 1
    assert "\\udcff" in capsys.readouterr().out


def test_columns_of_every_type_become_metadata(folder, tmp_path):
    count, nan = len(NAMES), float("nan")
    columns = {
        "file": NAMES, "caption": [["x", "y"]] * count,
        "struct": pyarrow.array([{"a": 1, "b": [nan]}] * count),
        "map": pyarrow.array([[("k", 1)]] * count, pyarrow.map_(pyarrow.string(), pyarrow.int32())),
        "decimal": pyarrow.array([decimal.Decimal("1.50")] * count),
        "moment": pyarrow.array([datetime.datetime(2020, 1, 1)] * count),
        "bytes": pyarrow.array([{"z": b"\xff"}] * count), "nothing": pyarrow.nulls(count),
        "large": pyarrow.array([2**63 + 5] * count, pyarrow.uint64()),
        "half": pyarrow.array(np.full(count, 1.5, np.float16)), "nan": [nan] * count,
        "inf": [float("inf")] * count, "some": [[1, None]] * count,
        "kinds": pyarrow.array(["a"] * count).dictionary_encode(),
    }  # fmt: skip
    parquet.write_table(pyarrow.table(columns), tmp_path / "l.parquet")
    assert build(tmp_path / "l.parquet", tmp_path / "out", "--root", str(folder)) == 0
    told, captions = open_dataset(tmp_path / "out").read_told(0, 0)
    assert captions.texts == ("x", "y")
    assert told.items() >= {
        "struct": {"a": 1, "b": [None]}, "map": {"k": 1}, "decimal": 1.5, "nothing": None,
        "moment": "2020-01-01 00:00:00", "large": 2**63 + 5, "half": 1.5, "nan": None,
        "inf": None, "some": [1, None], "kinds": "a",
    }.items()  # fmt: skip
    assert "bytes" not in told
    shard = (tmp_path / "out" / "shards" / "000000.tar").read_bytes()
    assert b"NaN" not in shard
    assert b"Infinity" not in shard


DEEP = f'{{"file": "é.mp4", "caption": "x", "n": {"[" * 5000}{"]" * 5000}}}\n'


@pytest.mark.parametrize(
    ("name", "content", "code", "said"),
    [
        ("l.jsonl", DEEP + '{"file": "é.mp4", "caption": "y"}\n', 0, "nested too deeply"),
        ("l.jsonl", '{"file":"é.mp4","caption":"x","":1,"a\\"b":2,"frames":"7"}\n', 0, "1 samples"),
        ("l.jsonl", '{"file":"é.mp4","caption":"x","t2v_row":3}\n', 65, "'t2v_row' is there twice"),
        ("l.jsonl", "\n\n", 66, "is empty"),
        ("l.jsonl", '[{"file": "é.mp4", "caption": "x"}]', 65, "name an array of them .json"),
        ("l.jsonl", '{\n "file": "é.mp4",\n "caption": "x"\n}', 65, "is a JSON object; write one"),
        ("l.csv", "\nfile,caption\né.mp4,x\n", 65, "its first line is empty"),
        ("l.csv", "file,caption\n.\\é.mp4,x\n", 0, "1 samples"),
        (
            "l.jsonl",
            f'{{"file": "é.mp4", "caption": "x", "n": [{"7" * 5000}]}}\n',
            65,
            "json is damaged",
        ),
        ("l.json", '{"a": {"file": "é.mp4", "caption": "x"}}', 78, "column 'caption' is missing"),
        ("l.json", "[[1, 2], 3]", 78, "column 'caption' is missing"),
        ("l.parquet", "", 65, "too small to be a Parquet file"),
        ("l.csv", "file,caption\n7,x\n", 65, "no sample: 1 x no such file"),
        ("l.jsonl", '{"file": "é.mp4", "caption": {"a": NaN}}', 65, "1 x caption is no text"),
    ],
)
def test_odd_lists_are_read_or_refused_in_one_line(
    folder, tmp_path, capsys, name, content, code, said
):
    (tmp_path / name).write_text(content)
    assert build(tmp_path / name, tmp_path / "out", "--root", str(folder)) == code
    out, err = capsys.readouterr()
    assert said in out + err
    assert err.count("\n") == (code != 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--file-column", "{nope}.mp4"), "column 'nope' is missing"),
        (("--caption-column", "nope"), "column 'nope' is missing"),
        (("--times", "nope"), "there is no column 'nope'"),
        (("--times", "file,caption,file"), "give these two columns"),
        (("--where", "nope > 1"), "--where or --select is wrong"),
        (("--encoding", "nope"), "encoding: value 'nope'"),
        (("--size", "4x20000x20000"), "more than the 67108864 pixels"),
        (("--preset", "webvid"), "column 'name' is missing"),
    ],
)
def test_options_that_name_what_is_not_there_are_told(folder, tmp_path, capsys, options, said):
    path = write_csv(tmp_path / "l.csv", [{"file": "é.mp4", "caption": "x"}])
    assert build(path, tmp_path / "out", "--root", str(folder), *options) == 78
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [("--where", "nope > 1"), ("--encoding", "latin-1")])
def test_options_that_texts_beside_media_cannot_follow_name_their_folder(
    folder, tmp_path, capsys, options
):
    assert build(folder, tmp_path / "out", *options) == 78
    assert capsys.readouterr().err.startswith(f"{folder}: ")
    assert not (tmp_path / "out").exists()


def test_json_of_any_depth_beside_media_costs_that_media_only(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.mp4").write_bytes(numbered_video(4))
    (folder / "a.json").write_text(f'{{"caption": "x", "n": {"[" * 100000}{"]" * 100000}}}')
    (folder / "b.json").write_text('{"caption": 1e999}')
    (folder / "c.json").write_text(json.dumps({"caption": "c", "deep": [[[1]]]}))
    assert build(folder, tmp_path / "out") == 0
    account = open_dataset(tmp_path / "out").info.account
    assert account.unusable == {"caption is no text": 1, "json is damaged": 1}


def test_texts_of_any_spelling_and_halves_of_characters_survive(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.mp4", "re\u0301.mp4"):
        (folder / name).write_bytes(numbered_video(4))
    (folder / "a.JSON").write_text('{"caption": "a", "title": "\\ud83d", "\\udc00": "é"}')
    (folder / "r\u00e9.TXT").write_text("b")
    assert build(folder, tmp_path / "out") == 0
    dataset = open_dataset(tmp_path / "out")
    told = [dataset.read_told(0, row) for row in range(2)]
    assert [captions.first for _, captions in told] == ["a", "b"]
    assert (told[0][0]["title"], told[0][0]["\udc00"]) == ("\ud83d", "é")
    assert not dataset.info.account.passed_over


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet"])
def test_lists_may_lie_in_any_folder_and_be_built_beside(folder, tmp_path, kind, monkeypatch):
    place = tmp_path / "it's [1] *?"
    place.mkdir()
    (place / "é.mp4").write_bytes((folder / "é.mp4").read_bytes())
    rows = [{"file": "é.mp4", "caption": "x"}]
    path = place / f"l's [2].{kind}"
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        (write_csv if kind == "csv" else write_lines)(path, rows)
    monkeypatch.chdir(place)
    assert build(Path(path.name), Path("out")) == 0
    assert open_dataset(place / "out").info.samples == 1
