"""Which columns of a list mean what: as a user says it, or as published collections name them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from data_pipeline.making.times import Unit
from data_pipeline.shards.captions import COLUMNS


@dataclass(frozen=True)
class Columns:
    """What to take from a list."""

    file: str | None = None  # a column, or a text with columns in braces; none: file or file_name
    captions: Mapping[str, float] = field(default_factory=lambda: dict(COLUMNS))  # with weights
    any_caption: bool = False  # captions need not be in every column
    times: tuple[str, ...] | None = None  # start and end, or ranges; (): none; None: by name
    unit: Unit | None = None
    where: str | None = None  # SQL: which rows are wanted
    select: str | None = None  # SQL: what becomes metadata; none: every other column
    encoding: str | None = None  # of lists that are no UTF-8 and have no mark
    hidden: tuple[str, ...] = ()  # for `where` and `select` only
    may_miss: bool = False  # rows of files that are not there are not wanted, not unusable


# Lists of videos on the web name some that are gone, or were not fetched.
PRESETS = {
    "openvid": Columns(file="video", times=()),
    "panda70m": Columns(file="{videoID}", times=("timestamp",), may_miss=True),
    "internvid": Columns(
        file="{YoutubeID}",
        captions={"Caption": 1.0},
        times=("Start_timestamp", "End_timestamp"),
        may_miss=True,
    ),
    "koala36m": Columns(file="{videoID}", times=("timestamp",), may_miss=True),
    "webvid": Columns(file="{videoid}", captions={"name": 1.0}, times=(), may_miss=True),
    "huggingface": Columns(
        file="file_name",
        captions={"text": 1.0, "caption": 1.0, "prompt": 1.0},
        any_caption=True,
    ),
}
