"""Times of clips in lists: which columns hold them, and what they say.

A clip is what is shown from its start until before its end, in seconds after the first frame; or
frames by number, the end not included.
"""

import ast
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from data_pipeline.errors import ConfigError, DataError

Unit = Literal["seconds", "milliseconds", "frames"]

START = "start_seconds"  # what a build writes of a clip: where it was cut from its source,
OURS = (START, "source", "original_fps")  # beside these
STARTS, ENDS = ("start", "begin", "from"), ("end", "stop", "finish", "to")
# Names of columns, without case and separators.
PAIR = re.compile(
    rf"(?P<of>clip|segment|scene|shot|time|video|t|ts)?(?P<edge>{'|'.join(STARTS + ENDS)})"
    r"(?P<what>s|sec|secs|second|seconds|time|times|timestamp|timesec|timeseconds|ms|millis"
    r"|milliseconds|frame|frames|frameid|frameidx|frameindex|framenumber|idx|index|pts)?"
)
SINGLE = re.compile(r"(clip|segment|scene|shot|video)?(time|frame)?"
                    r"(stamps?|spans?|ranges?|segments?|intervals?)")  # fmt: skip
DURATIONS = ("duration", "durationsec", "durationseconds")
WORDS = {"start", "begin", "end", "stop", "finish", "timestamp", "timestamps", "timespan", "onset",
         "offset", "interval", "t0", "t1"}  # fmt: skip
CLOCK = re.compile(r"(?:(?:(\d{1,9}):)?(\d{1,9}):)?(\d+(?:[.,]\d*)?)")
LONGEST_TIME = 1e15  # in any unit
SCALES = {"seconds": 1.0, "milliseconds": 1e-3}
LONGEST_LITERAL = 1 << 20


@dataclass(frozen=True)
class Times:
    """Which columns hold the times of clips: a start and perhaps an end, or ranges."""

    columns: tuple[str, ...]
    unit: Unit = "seconds"
    duration: str | None = None  # a column: of how long a clip is from its start

    @property
    def all_columns(self) -> tuple[str, ...]:
        """The columns in the order in which `ranges_of` takes their values."""
        return (*self.columns, self.duration) if self.duration else self.columns

    def __str__(self) -> str:
        return f"{', '.join(self.all_columns)} ({self.unit})"


@dataclass(frozen=True)
class Range:
    """From where to where of a video a clip goes, in a unit; no end: to the video's."""

    start: float
    end: float | None
    unit: Unit

    def seconds(self, time_of: Callable[[int], float]) -> tuple[float, float | None]:
        """The range in seconds, of a video whose frames by number are shown at some times."""
        start, end = (None if edge is None else time_of(int(edge)) if self.unit == "frames"
                      else edge * SCALES[self.unit] for edge in (self.start, self.end))  # fmt: skip
        return start or 0.0, end


def find_times(
    path: str, names: Sequence[str], columns: Sequence[str] | None, unit: Unit | None
) -> Times | None:
    """The columns of a list that hold times: those given (none: no column), or found by name.

    ConfigError for names that look like times and could not be used: they are never ignored.
    """
    if columns is not None:
        for column in columns:
            if column not in names:
                raise ConfigError(
                    f"{path}: times: there is no column '{column}'; choose of {', '.join(names)}."
                )
        if len(columns) > 2:
            raise ConfigError(
                f"{path}: times: value {','.join(columns)} is wrong because a clip has a start and "
                "an end; give these two columns, or one of ranges."
            )
        return Times(tuple(columns), unit or _unit(columns[0])) if columns else None
    looks = [name for name in names if _looks_like_time(name)]
    found = _find_pair(names) or _find_single(names)
    unused = [name for name in looks if not found or name not in found.columns]
    if unused:
        raise ConfigError(
            f"{path}: column '{unused[0]}' looks like a time of clips and is not used; say which "
            "columns are by --times START,END or --times RANGES, or --times none if none is."
        )
    return Times(found.columns, unit, found.duration) if found and unit else found


def without_own(names: Sequence[str]) -> list[str]:
    """Names of members but for the time that a build wrote beside a clip, which is cut already."""
    return [name for name in names if name != START or not set(OURS) <= set(names)]


def ranges_of(values: Sequence[object], times: Times) -> tuple[list[Range], bool]:
    """The ranges that a row's values in the columns of `times` say, and whether as a list of them.

    DataError for what is no time, and for ends before starts.
    """
    parsed = [literal(value) for value in values]
    if len(times.columns) == 1 and not times.duration and isinstance(parsed[0], list):
        pairs = parsed[0]
        listed = bool(pairs) and isinstance(pairs[0], list)
        if not listed:
            pairs = [pairs]
        for pair in pairs:
            if not isinstance(pair, list) or len(pair) != 2:
                raise DataError(f"time is none: {times.columns[0]} {pair!r} is no (start, end)")
        return [_range(pair, times) for pair in pairs], listed
    if isinstance(parsed[0], list):
        lists = [value if isinstance(value, list) else [value] for value in parsed]
        if len({len(value) for value in lists}) != 1:
            raise DataError(f"time is none: {', '.join(times.columns)} are not equally long")
        return [_range(row, times) for row in zip(*lists, strict=True)], True
    return [_range(parsed, times)], False


def literal(value: object) -> object:
    """A value, or the list that a text is: CSV has no lists but such texts, in JSON or Python."""
    if not isinstance(value, str) or value[:1] not in "[(" or len(value) > LONGEST_LITERAL:
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            continue
        return _as_list(found)
    return value


def parse_time(value: object, unit: Unit) -> float:
    """A number in the unit, or a text of one, or HH:MM:SS.mmm."""
    time = math.nan
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        time = float(value) if abs(value) < LONGEST_TIME else math.inf
    elif isinstance(value, str) and (match := CLOCK.fullmatch(value.strip())):
        hours, minutes, seconds = match.groups()
        if minutes is not None and unit == "frames":
            raise DataError(f"time is none: {value!r} is no frame number")
        time = float(seconds.replace(",", "."))
        if minutes is not None:
            time += 60 * int(minutes) + 3600 * int(hours or 0)
            time *= 1000 if unit == "milliseconds" else 1
    if not 0 <= time < math.inf or (unit == "frames" and time != int(time)):
        raise DataError(f"time is none: {value!r:.40} is no time in {unit}")
    return time


def _as_list(value: object) -> object:
    return [_as_list(part) for part in value] if isinstance(value, (list, tuple)) else value


def _range(values: Sequence[object], times: Times) -> Range:
    """A range of its start alone, or with its end or duration."""
    start, end = values[0], values[1] if len(values) > 1 else None
    begin = parse_time(start, times.unit)
    if times.duration:
        end = begin + parse_time(end, times.unit)
    stop = None if end is None else parse_time(end, times.unit)
    if stop is not None and stop <= begin:
        raise DataError(f"time is none: the end {end!r} is not behind the start {start!r}")
    return Range(begin, stop, times.unit)


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).lower()


def _unit(name: str) -> Unit:
    plain = _plain(name)
    if re.search(r"frame|idx|index", plain):
        return "frames"
    return "milliseconds" if re.search(r"ms$|milli", plain) else "seconds"


def _find_pair(names: Iterable[str]) -> Times | None:
    """A start and the end of the same kind, or a start with a duration, or a start alone."""
    edges: dict[tuple[str, str], dict[str, str]] = {}
    plain = {_plain(name): name for name in names}
    for short, name in plain.items():
        if match := PAIR.fullmatch(short):
            side = "start" if match["edge"] in STARTS else "end"
            edges.setdefault((match["of"] or "", match["what"] or ""), {})[side] = name
    whole = [pair for pair in edges.values() if len(pair) == 2]
    if len(edges) > 1 or not edges:
        return None  # more than one: nobody can say which is meant
    if whole:
        return Times((whole[0]["start"], whole[0]["end"]), _unit(whole[0]["start"]))
    (edge,) = edges.values()
    if "start" not in edge:
        return None
    duration = next((plain[short] for short in DURATIONS if short in plain), None)
    return Times((edge["start"],), _unit(edge["start"]), duration)


def _find_single(names: Iterable[str]) -> Times | None:
    found = [name for name in names if SINGLE.fullmatch(_plain(name))]
    return Times((found[0],), _unit(found[0])) if len(found) == 1 else None


def _looks_like_time(name: str) -> bool:
    words = re.findall(r"[a-z]+\d*|\d+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    short = _plain(name)
    return bool(WORDS & set(words) or PAIR.fullmatch(short) or SINGLE.fullmatch(short))
