"""One file of a collection into samples of a dataset: filtered, cut, resampled, encoded."""

import json
from dataclasses import asdict, dataclass, field

from data_pipeline.errors import ConfigError, DataError, NotWanted
from data_pipeline.making.listing import Item, Kind
from data_pipeline.media.clips import Cut, Media, Probe, Size, probe, read_clips, read_still
from data_pipeline.media.video import encode_clip, encode_image
from data_pipeline.store import storage

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


@dataclass
class Made:
    """The samples of one file, (end of the key, members), and why others are none."""

    samples: list[tuple[str, Members]] = field(default_factory=list)
    filtered: str | None = None
    unusable: str | None = None


def make_samples(item: Item, *, folder: str, target: Target, deadline_seconds: float) -> Made:
    """The samples of one file; of a damaged one, those before the damage."""
    made = Made()
    try:
        content = storage.read_bytes(storage.join(folder, item.file))
        if target.filters != Filters():
            found = probe(content, target.kind)
            made.filtered = target.filters.reason(found, item.caption, target.kind)
        if made.filtered:
            return made
        if target.kind == "image":
            made.samples.append(("", _members(read_still(content, target.size), item, target)))
            return made
        clips = read_clips(
            content,
            target.size,
            fps=target.fps or None,
            cut=target.cut,
            deadline_seconds=deadline_seconds,
        )
        for number, (_, clip) in enumerate(clips):
            if isinstance(clip, NotWanted):
                raise clip
            suffix = "" if target.cut == "none" else f"-{number:04d}"
            made.samples.append((suffix, _members(clip, item, target)))
    except NotWanted as error:
        made.filtered = str(error)
    except DataError as error:
        made.unusable = str(error)
    return made


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


def _members(media: Media, item: Item, target: Target) -> Members:
    """Media and json of one sample."""
    frames, height, width = target.size
    metadata = item.metadata | {
        "caption": item.caption,
        "frames": frames,
        "fps": media.fps,
        "height": height,
        "width": width,
        "original_height": media.original_height,
        "original_width": media.original_width,
        "original_fps": media.original_fps,
        "source": item.file,
    }
    if target.cut != "none":
        metadata["start_seconds"] = round(media.start_seconds, 6)
    text = json.dumps(metadata, ensure_ascii=False).encode()
    if target.kind == "image":
        return {"jpg": encode_image(media.clip[0]), "json": text}
    return {"mp4": encode_clip(media.clip, media.fps), "json": text}
