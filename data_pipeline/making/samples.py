"""One file of a collection into samples of a dataset: filtered, cut, resampled, encoded."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

from data_pipeline.errors import ConfigError, DataError, NotWanted
from data_pipeline.making.clips import Clip, clips_of, span_of
from data_pipeline.making.listing import Kind
from data_pipeline.making.plan import Item
from data_pipeline.making.presets import Columns
from data_pipeline.making.times import START, Times
from data_pipeline.media.bars import Bars, media_bars
from data_pipeline.media.clips import (
    NO_BARS,
    WHOLE,
    Cut,
    Media,
    Probe,
    Size,
    Span,
    probe,
    read_clips,
    read_still,
)
from data_pipeline.media.codec import encode_clip, encode_image
from data_pipeline.media.container import MAX_PIXELS
from data_pipeline.shards.captions import Captions

Members = dict[str, bytes]


@dataclass(frozen=True)
class Filters:
    """What of a collection is wanted; None sets no limit. Durations and frames are of videos."""

    min_height: int | None = None
    min_width: int | None = None
    max_aspect: float | None = None  # longer side / shorter side
    min_frames: int | None = None
    min_seconds: float | None = None
    max_seconds: float | None = None
    min_caption_words: int | None = None
    max_caption_words: int | None = None

    def reason(self, media: Probe, caption: str, kind: Kind) -> str | None:
        """Why media is not wanted."""
        aspect = max(media.height, media.width) / max(1, min(media.height, media.width))
        values = {"height": media.height, "width": media.width, "aspect": aspect,
                  "caption_words": len(caption.split())}  # fmt: skip
        if kind == "video":
            values |= {"frames": media.frames, "seconds": media.seconds}
        for limit, bound in asdict(self).items():
            side, _, name = limit.partition("_")
            if bound is None or name not in values:
                continue
            if values[name] < bound if side == "min" else values[name] > bound:
                return f"{'below' if side == 'min' else 'above'} {limit}: {values[name]:g}"
        return None


@dataclass(frozen=True)
class Target:
    """What every sample of a dataset is brought to; no fps: each clip keeps its own."""

    kind: Kind
    size: Size
    fps: float | None
    cut: Cut = "none"
    filters: Filters = field(default_factory=Filters)
    crop_bars: bool = False
    tone_map: bool = False


@dataclass(frozen=True)
class Source:
    """Where files lie, and what their rows mean."""

    folder: str
    columns: Columns = field(default_factory=Columns)
    times: Times | None = None


@dataclass
class Made:
    """The samples of one file, (end of the key, members), and why clips of it are none, by name."""

    samples: list[tuple[str, Members]] = field(default_factory=list)
    not_wanted: dict[str, str] = field(default_factory=dict)
    unusable: dict[str, str] = field(default_factory=dict)

    def lose(self, error: DataError, names: Sequence[str]) -> None:
        """Note why clips are none."""
        side = self.not_wanted if isinstance(error, NotWanted) else self.unusable
        side.update(dict.fromkeys(names, str(error)))


def make_samples(item: Item, *, source: Source, target: Target, deadline_seconds: float) -> Made:
    """The samples of one file; of a damaged one, those before the damage."""
    clips, unusable = clips_of(item, source.folder, source.columns, source.times)
    made = Made(unusable=unusable)
    if not clips:
        return made
    is_timed = any(clip.range for clip in clips)
    known: Probe | None = None
    try:
        media = item.place.read(source.folder)
        bars = media_bars(media, target.kind, deadline_seconds) if target.crop_bars else NO_BARS
        if is_timed or target.filters != Filters():
            known = probe(media, target.kind, bars)
    except DataError as error:
        made.lose(error, [clip.name for clip in clips])
        return made
    wanted: list[tuple[Clip, Span]] = []
    for clip in clips:
        try:
            span = span_of(clip.range, known, target.fps or known.fps) if known else WHOLE
            if known:
                clip = replace(clip, captions=_wanted(clip, known, span, target))
            wanted.append((clip, span))
        except DataError as error:
            made.lose(error, [clip.name])
    is_whole = target.cut == "none" and not is_timed
    pieces: list[list[Members]] = [[] for _ in wanted]
    try:
        spans = [span for _, span in wanted]
        for number, piece in _pieces(media, spans, target, bars, deadline_seconds):
            clip = wanted[number][0]
            if isinstance(piece, NotWanted):
                made.lose(piece, [clip.name])
            else:
                pieces[number].append(_members(piece, clip, item, target, is_whole))
    except DataError as error:
        lost = [clip.name for (clip, _), some in zip(wanted, pieces, strict=True)
                if not some and clip.name not in made.not_wanted]  # fmt: skip
        made.lose(error, lost or [item.file])
    samples = [members for some in pieces for members in some]
    made.samples = [("" if is_whole else f"-{n:04d}", m) for n, m in enumerate(samples)]
    return made


def _pieces(
    media: bytes, spans: list[Span], target: Target, bars: Bars, deadline_seconds: float
) -> Iterator[tuple[int, Media | NotWanted]]:
    """What is cut of each span of a file, by the span's number."""
    if target.kind == "image":
        yield from ((n, read_still(media, target.size, bars)) for n in range(len(spans)))
    elif spans:
        yield from read_clips(
            media,
            target.size,
            fps=target.fps or None,
            spans=spans,
            cut=target.cut,
            bars=bars,
            tone_map=target.tone_map,
            deadline_seconds=deadline_seconds,
        )


def _wanted(clip: Clip, known: Probe, span: Span, target: Target) -> Captions:
    """Those captions of a clip that are wanted; NotWanted where the clip is not, or none is."""
    if clip.range:
        seconds = min(span.end, known.seconds) - span.start
        known = replace(known, seconds=seconds, frames=round(seconds * known.fps))
    reasons = {t: target.filters.reason(known, t, target.kind) for t in clip.captions.texts}
    if all(reasons.values()):
        raise NotWanted(next(iter(reasons.values())))
    return clip.captions.only([text for text, why in reasons.items() if why is None])


def refuse_bad_target(target: Target) -> None:
    """ConfigError for sizes, rates and filters that cannot be."""
    frames, height, width = target.size
    for name, value in (("frames", frames), ("height", height), ("width", width)):
        if value < 1:
            raise ConfigError(f"{name}: value {value} is wrong because it is below 1; raise it.")
    for name, value in (("height", height), ("width", width)):
        if value % 2:
            raise ConfigError(
                f"{name}: value {value} is wrong because H.264 4:2:0 needs even sides; "
                f"use {value - 1 or 2} or {value + 1}."
            )
    if height * width > MAX_PIXELS:
        raise ConfigError(
            f"width: value {width} is wrong because {height}x{width} is more than the {MAX_PIXELS} "
            "pixels that a frame may have; lower it."
        )
    if target.cut != "none" and target.kind == "image":
        raise ConfigError(f"cut: value '{target.cut}' is wrong because images have no length.")
    bounds = asdict(target.filters)
    for name, value in bounds.items():
        if value is not None and not value >= 0:
            raise ConfigError(
                f"{name}: value {value} is wrong because it is not 0 or more; correct it."
            )
    for name in ("seconds", "caption_words"):
        low, high = bounds[f"min_{name}"], bounds[f"max_{name}"]
        if low is not None and high is not None and low > high:
            raise ConfigError(
                f"min_{name}: value {low} is wrong because max_{name} is {high}; swap them."
            )


def _members(media: Media, clip: Clip, item: Item, target: Target, is_whole: bool) -> Members:
    """Media and json of one sample."""
    frames, height, width = target.size
    metadata = clip.metadata | clip.captions.members() | {
        "frames": frames,
        "fps": media.fps,
        "height": height,
        "width": width,
        "original_height": media.original_height,
        "original_width": media.original_width,
        "original_fps": media.original_fps,
        "source": item.file,
    }  # fmt: skip
    if not is_whole:
        metadata[START] = round(media.start_seconds, 6)
    told = json.dumps(metadata, ensure_ascii=False, allow_nan=False)
    text = told.encode(errors="backslashreplace")  # halves of characters as JSON spells them
    if target.kind == "image":
        return {"jpg": encode_image(media.clip[0]), "json": text}
    return {"mp4": encode_clip(media.clip, media.fps), "json": text}
