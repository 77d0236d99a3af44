"""What is wanted of one file: clips with captions and metadata, judged row by row."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from data_pipeline.errors import DataError, UserError
from data_pipeline.making.plan import Item, Row
from data_pipeline.making.presets import Columns
from data_pipeline.making.times import (
    START,
    Range,
    Times,
    find_times,
    literal,
    ranges_of,
    without_own,
)
from data_pipeline.media.clips import WHOLE, Probe, Span
from data_pipeline.shards.captions import (
    SEVERAL,
    Captions,
    captions_of,
    decode_text,
    merged,
    parse_object,
)

SLACK_FRAMES = 0.25  # times are rounded
SLACK_SECONDS = 1.0  # lists take ends from durations that others measured


@dataclass(frozen=True)
class Clip:
    """A part of a file, or all of it; `name` is what an account calls it."""

    name: str
    captions: Captions
    metadata: dict = field(default_factory=dict)
    range: Range | None = None


def clips_of(
    item: Item, folder: str, columns: Columns, times: Times | None
) -> tuple[list[Clip], dict[str, str]]:
    """What rows, or else the texts beside a file, say of it; and why others are no clips, by
    name."""
    clips: list[Clip] = []
    unusable: dict[str, str] = {}
    if not item.rows:
        with _judging(item.file, unusable):
            clips = list(_from_texts(item, folder, columns))
        return clips, unusable
    by_range: dict[Range | None, list[Clip]] = {}
    for row in item.rows:
        name = item.file if len(item.rows) == 1 else f"{item.file} (row {row.number})"
        with _judging(name, unusable):
            for clip in _from_row(name, row, columns, times):
                by_range.setdefault(clip.range, []).append(clip)
    # Rows of the same clip are captions of it.
    for same in by_range.values():
        clips.append(replace(same[0], captions=merged([clip.captions for clip in same])))
    return clips, unusable


def span_of(range_: Range | None, probe: Probe, fps: float) -> Span:
    """A range as a part of a video, to the end of the last frame at a rate that begins in it.

    DataError where it does not lie in the video.
    """
    if range_ is None:
        return WHOLE
    begin, end = range_.seconds(probe.time_of)
    if begin >= probe.seconds or (end is not None and end > probe.seconds + SLACK_SECONDS):
        late = begin if begin >= probe.seconds or end is None else end
        raise DataError(
            f"time lies behind the video: {late:g} seconds of {probe.seconds:g}; see --time-unit, "
            "or give --times none if files are clips already"
        )
    if end is None:
        return Span(begin)
    frames = math.ceil((min(end, probe.seconds) - begin) * fps - SLACK_FRAMES)
    return Span(begin, begin + frames / fps)


@contextmanager
def _judging(name: str, unusable: dict[str, str]) -> Iterator[None]:
    """Whatever is wrong with what is said of a file costs that alone."""
    try:
        yield
    except DataError as error:
        unusable[name] = str(error)
    except RecursionError:
        unusable[name] = "is nested too deeply"
    except ValueError as error:  # a number of thousands of digits
        unusable[name] = f"json is damaged: {error}"


def _from_row(name: str, row: Row, columns: Columns, times: Times | None) -> Iterator[Clip]:
    values, metadata = json.loads(row.captions), _others(json.loads(row.metadata))
    # A cell of CSV is text, that of a list of captions, too.
    values = {column: _list_of_texts(value) for column, value in values.items()}
    if times is None or row.times is None:
        yield Clip(name, _captions(values, columns), metadata)
        return
    yield from _timed(name, json.loads(row.times), values, metadata, columns, times)


def _timed(
    name: str, moments: Sequence, values: dict, metadata: dict, columns: Columns, times: Times
) -> Iterator[Clip]:
    ranges, listed = ranges_of(moments, times)
    if not listed:
        yield Clip(name, _captions(values, columns), metadata, ranges[0])
        return
    lists = {key: part for key, value in metadata.items()
             if isinstance(part := literal(value), list) and len(part) == len(ranges)}  # fmt: skip
    for column, value in values.items():
        if isinstance(value, list) and len(value) != len(ranges):
            raise DataError(
                f"captions are not as many as times: {len(value)} in {column}, {len(ranges)} times"
            )
    for turn, range_ in enumerate(ranges):
        own = {c: value[turn] if isinstance(value, list) else value for c, value in values.items()}
        told = metadata | {key: part[turn] for key, part in lists.items()}
        yield Clip(f"{name} [{turn}]", _captions(own, columns), told, range_)


def _from_texts(item: Item, folder: str, columns: Columns) -> Iterator[Clip]:
    metadata: dict = {}
    if item.json:
        metadata = parse_object(item.json.read(folder))
    captions = captions_of(metadata, columns.captions)
    values = {name: metadata.get(name) for name in columns.captions}
    if item.txt and not (captions and captions.first):
        captions = Captions((decode_text(item.txt.read(folder)),))
        values = {next(iter(values)): captions.first}
    if captions is None:
        keys = f"; it has {', '.join(map(str, metadata))}; see --caption-column" if metadata else ""
        raise DataError(f"has no caption: none is in {', '.join(columns.captions)}{keys}")
    try:
        times = find_times("", without_own(list(metadata)), columns.times, columns.unit)
    except UserError as error:
        raise DataError(f"time is none{error}") from None
    used = {*columns.captions, *(times.all_columns if times else ())}
    kept = _others({name: value for name, value in metadata.items() if name not in used})
    if times is None:
        yield Clip(item.file, captions, kept)
        return
    yield from _timed(
        item.file, [metadata.get(n) for n in times.all_columns], values, kept, columns, times
    )


def _captions(values: Mapping[str, object], columns: Columns) -> Captions:
    captions = captions_of(values, columns.captions)
    if captions is None:
        raise DataError("has no caption")
    return captions


def _list_of_texts(value: object) -> object:
    found = literal(value)
    texts = isinstance(found, list) and all(isinstance(part, str) for part in found)
    return found if texts or not isinstance(value, str) else value


def _others(metadata: dict) -> dict:
    """What a sample keeps of what is said of it; of a clip of ours, not where and how that one was
    made."""
    dropped = (*SEVERAL, START) if "original_fps" in metadata else ()
    return _finite({name: value for name, value in metadata.items() if name not in dropped})


def _finite(value: object):
    """A value of JSON without NaN and infinities, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
