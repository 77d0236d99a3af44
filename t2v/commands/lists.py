"""Options of commands that read lists and captions, and what was found in them, on the screen."""

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from data_pipeline.making.presets import PRESETS, Columns
from data_pipeline.printable import plain
from t2v.commands.parser import word

if TYPE_CHECKING:
    from data_pipeline.shards.dataset import Dataset

CAPTION_COLUMN = (
    "column, or member of a json, that holds captions; may be repeated: a clip then has several, "
    "taken by their weights"
)
OPTIONS = {
    "file-column": ("NAME", "column of the file, or a text such as '{folder}/{id}.mp4'"),
    "root": ("FOLDER", "where the files of a list lie, if not beside it"),
    "where": ("SQL", "which rows are wanted, such as 'height >= 720 and aesthetic > 5'"),
    "select": ("SQL", "columns that become metadata; by default all others"),
    "encoding": ("NAME", "of lists that are neither UTF-8 nor marked: latin-1, ..."),
}
UNITS = ("seconds", "milliseconds", "frames")


def add_caption_column(verb: argparse.ArgumentParser) -> None:
    """The option that says where captions are."""
    meta = "NAME[=WEIGHT]"
    verb.add_argument(
        "--caption-column", type=weighted, action="append", metavar=meta, help=CAPTION_COLUMN
    )


def add_list_options(verb: argparse.ArgumentParser) -> None:
    """The options that say what the columns of a list mean."""
    told = "columns as a published collection names them; see docs/data.md"
    verb.add_argument("--preset", choices=sorted(PRESETS), help=told)
    add_caption_column(verb)
    for name, (meta, told) in OPTIONS.items():
        verb.add_argument(f"--{name}", metavar=meta, help=told)
    told = "columns of clips' times, or one column of ranges; none: files are clips already"
    verb.add_argument("--times", type=names, metavar="START,END", help=told)
    told = "by default as the columns' names say, else seconds"
    verb.add_argument("--time-unit", choices=UNITS, help=told)
    told = "rows whose file is not there cost no budget"
    verb.add_argument("--skip-missing", action="store_true", help=told)


def columns_from(options: argparse.Namespace) -> Columns:
    """What options say of columns, on top of a preset."""
    columns = PRESETS[options.preset] if options.preset else Columns()
    said: dict[str, Any] = {
        "file": options.file_column,
        "captions": dict(options.caption_column) if options.caption_column else None,
        "any_caption": False if options.caption_column else None,
        "times": options.times,
        "unit": options.time_unit,
        "where": options.where,
        "select": options.select,
        "encoding": options.encoding,
        "may_miss": options.skip_missing or None,
    }
    return replace(columns, **{name: value for name, value in said.items() if value is not None})


def say_dataset(dataset: "Dataset | None") -> None:
    """What a dataset holds, and what of its source it does not."""
    from rich.table import Table

    from data_pipeline.shards.warnings import caption_warnings
    from data_pipeline.terminal import Terminal

    if dataset is None:
        print("this task is done; the dataset is complete when the other tasks are.")
        return
    info = dataset.info
    print(plain(f"{dataset.path}: {info.samples} samples in {len(info.shards)} shards."))
    if "times" in info.notes:
        print(plain(f"clips are cut by {info.notes['times']}."))
    if rows := info.account.rows():
        table = Table("", "because", "how many", "for example")
        for side, reason, number, examples in rows:
            table.add_row(side, reason, str(number), examples)
        Terminal().print(table)
    for warning in caption_warnings(dataset):
        print(plain(warning))


def names(text: str) -> tuple[str, ...]:
    """Names of columns; `none`: no column."""
    return () if text == "none" else tuple(part.strip() for part in text.split(","))


@word("column", "NAME or NAME=WEIGHT, with a weight above 0")
def weighted(text: str) -> tuple[str, float]:
    """A name and its weight."""
    name, equals, weight = text.rpartition("=")
    value = float(weight) if equals else 1.0
    if not 0 < value < float("inf"):
        raise ValueError
    return (name, value) if equals else (text, 1.0)
