"""What a dataset holds: counts, durations, captions, sizes, as text and as one page of HTML."""

import base64
import html
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError, UserError
from data_pipeline.making.scoring import COLUMNS, NUMBERS, SIDES, open_scores
from data_pipeline.making.verify import KINDS
from data_pipeline.media.clips import probe
from data_pipeline.progress import progress
from data_pipeline.shards.contact_sheet import SAMPLES, sheet_of
from data_pipeline.shards.dataset import Dataset, open_dataset
from data_pipeline.shards.derived import open_info
from data_pipeline.shards.tar import open_index
from data_pipeline.store import html_page, storage

PAGE = "stats.html"
BINS = 20
AT_AN_END = 6  # pictures of the samples with the lowest scores, and with the highest
BAR = (560, 14)  # width of the longest bar, height of each, in pixels


@dataclass(frozen=True)
class Stats:
    """A dataset in numbers; those per sample are of the samples that were read."""

    data: Dataset
    samples: int
    shards: int
    media_bytes: int
    distinct_captions: int
    read: int
    unreadable: int
    seconds: list[float]
    fps: list[float]
    caption_words: list[int]
    resolutions: dict[str, int]  # width x height before building, most frequent first
    derived: dict[str, str]  # what embeddings and latents there are, by kind and name
    scores: dict[str, list]  # by column, of all clips that have any

    @property
    def hours(self) -> float:
        """Length of the whole dataset, from the samples that were read."""
        return float(np.mean(self.seconds)) * self.samples / 3600 if self.seconds else 0.0

    def rows(self) -> list[tuple[str, str]]:
        """(what, how much) for a table."""
        words, info = self.caption_words, self.data.info
        rows = [
            ("kind", info.kind),
            ("samples", f"{self.samples:,} in {self.shards:,} shards"),
            ("media", f"{self.media_bytes / 1e9:,.3f} GB, "
                      f"{self.media_bytes / self.samples / 1e3:,.1f} kB per sample"),
            ("captions", f"{self.distinct_captions:,} distinct; {words.count(0)} of "
                         f"{self.read:,} read are empty"),
            ("caption words", _spread(words)),
        ]  # fmt: skip
        if info.kind == "video":
            rows += [("duration", f"{self.hours:,.3f} hours; seconds: {_spread(self.seconds)}"),
                     ("frame rate", _spread(self.fps))]  # fmt: skip
        top = ", ".join(f"{size} ({count})" for size, count in list(self.resolutions.items())[:5])
        rows.append(("resolution", f"{len(self.resolutions)} sizes: {top}"))
        rows += [(f"{side}: {why}", f"{count:,}") for side, why, count, _ in info.account.rows()]
        rows += list(self.derived.items())
        rows += self._score_rows()
        if self.unreadable:
            rows.append(("unreadable", f"{self.unreadable} of {self.read}: run `t2v data verify`"))
        return rows + [(f"note: {name}", text) for name, text in info.notes.items()]

    def _score_rows(self) -> list[tuple[str, str]]:
        rows = [(f"score: {name}", _spread(self.scores[name])) for name in NUMBERS if self.scores]
        for name, told in (("duplicate_of", "like an earlier clip"), ("fault", "not to be read")):
            if self.scores:
                rows.append((f"score: {name}", f"{len(self.scores[name]):,} clips are {told}"))
        return rows


def measure(path: str | Path, *, count: int = 10_000, seed: int = 0) -> Stats:
    """The numbers of a dataset, from its indexes and so many random samples."""
    data = open_dataset(path)
    info = data.info
    shards = range(len(info.shards))
    media_bytes = sum(int(data.index(shard)["media"]["size"].sum()) for shard in shards)
    captions = np.concatenate([np.unique(data.index(shard)["caption"]) for shard in shards])
    places = data.draw(count, seed=seed)
    seconds, fps, words, sizes, unreadable = [], [], [], Counter(), 0
    for shard, row in progress(places, "read samples", total=len(places)):
        try:
            caption, rate, length, size = _describe(data, shard, row)
        except (DataError, KeyError, TypeError, ValueError):  # the last three: a json not ours
            unreadable += 1
            continue
        words.append(len(caption.split()))
        sizes[size] += 1
        if info.kind == "video":
            fps.append(rate)
            seconds.append(length)
    return Stats(
        data=data,
        samples=info.samples,
        shards=len(info.shards),
        media_bytes=media_bytes,
        distinct_captions=len(np.unique(captions)),
        read=len(places),
        unreadable=unreadable,
        seconds=seconds,
        fps=fps,
        caption_words=words,
        resolutions=dict(sizes.most_common()),
        derived=dict(_derived(data)),
        scores=_scores(data),
    )


def write_page(stats: Stats, out: str | Path | None = None) -> str:
    """One self-contained page with tables, histograms and pictures; its path."""
    data, info = stats.data, stats.data.info
    path = str(out or storage.join(data.path, PAGE))
    table = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in stats.rows()
    )
    charts = [("words per caption", _histogram(stats.caption_words))]
    if info.kind == "video":
        charts += [("seconds", _histogram(stats.seconds)),
                   ("frames per second", _histogram(stats.fps))]  # fmt: skip
    charts.append(("width x height", list(stats.resolutions.items())[:BINS]))
    charts += [(name, _histogram(stats.scores[name])) for name in (*NUMBERS, *SIDES)
               if stats.scores.get(name)]  # fmt: skip
    body = "".join(f"<h2>{name}</h2>{_bars(values)}" for name, values in charts)
    for name in NUMBERS if stats.scores else ():
        found = open_scores(data)
        ends = data.places(found.ends(name, AT_AN_END)) if found else []
        if ends:
            body += f"<h2>from the lowest {name} to the highest</h2>{_pictures(data, ends)}"
    page = (
        f'<!doctype html><meta charset="utf-8">{html_page.GENERATOR}'
        f"<title>{html.escape(Path(data.path).name)}</title>"
        "<style>body{font:14px sans-serif;margin:2em;max-width:60em}th{text-align:left;"
        "padding-right:2em}text{font:11px sans-serif}</style>"
        f"<h1>{html.escape(data.path)}</h1><p>fingerprint {info.fingerprint}</p>"
        f"<table>{table}</table><h2>random samples</h2>"
        f"{_pictures(data, data.draw(SAMPLES, seed=0))}{body}"
    )
    html_page.write_page(path, page)
    return path


def _pictures(data: Dataset, places: Sequence[tuple[int, int]]) -> str:
    """Samples on a picture as a part of a page, or why there is none."""
    buffer = io.BytesIO()
    try:
        sheet_of(data, places).save(buffer, "JPEG", quality=85)
    except DataError as error:
        return html.escape(f"no pictures: a sample {error}; run t2v data verify.")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img style="max-width:100%" src="data:image/jpeg;base64,{encoded}">'


def _describe(data: Dataset, shard: int, row: int) -> tuple[str, float, float, str]:
    """(caption, frames per second, seconds, width x height) of one sample."""
    record = data.read(shard, row)
    metadata = record.metadata
    if data.info.clip is None:
        found = probe(record.media, data.info.kind)
        return record.caption, found.fps, found.seconds, f"{found.width}x{found.height}"
    fps = float(metadata["fps"])
    size = f"{metadata['original_width']}x{metadata['original_height']}"
    return record.caption, fps, data.info.clip[0] / fps if fps else 0.0, size


def _derived(data: Dataset) -> Iterator[tuple[str, str]]:
    """(kind and name, what it is) of each set that is cached beside a dataset."""
    for kind in KINDS:
        for name in kind.names(data):
            try:
                folder, info = open_info(kind, data, name)
                rows = [open_index(folder, shard.name)["media"]["size"] for shard in info.shards]
                size = sum(int(sizes.sum()) for sizes in rows)
                yield f"{kind.folder} {name}", f"{size / 1e9:,.3f} GB, {kind.tell(info.provenance)}"
            except UserError:
                yield f"{kind.folder} {name}", f"not whole, or of other data: {kind.verb} again"


def _scores(data: Dataset) -> dict[str, list]:
    try:
        found = open_scores(data)
        return {name: found.column(name) for name in COLUMNS} if found else {}
    except UserError:
        return {}


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "none"
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
    return f"median {middle:.4g}, 5 % below {low:.4g}, 5 % above {high:.4g}"


def _histogram(values: Sequence[float]) -> list[tuple[str, int]]:
    """(range, count) over bins of equal width; each value by itself where there are few."""
    if not values:
        return []
    distinct = sorted(set(values))
    if len(distinct) <= BINS:
        counts = Counter(values)
        return [(f"{value:.4g}", counts[value]) for value in distinct]
    counts, edges = np.histogram(values, BINS)
    labels = [f"{a:.4g} to {b:.4g}" for a, b in pairwise(edges)]
    return list(zip(labels, counts.tolist(), strict=True))


def _bars(values: Sequence[tuple[str, int]]) -> str:
    width, height = BAR
    longest = max((count for _, count in values), default=1) or 1
    lines = [
        f'<text x="0" y="{row * (height + 4) + 11}">{html.escape(label)}</text>'
        f'<rect x="130" y="{row * (height + 4)}" width="{max(1, width * count // longest)}" '
        f'height="{height}" fill="#4477aa"/>'
        f'<text x="{136 + width * count // longest}" y="{row * (height + 4) + 11}">{count}</text>'
        for row, (label, count) in enumerate(values)
    ]
    return (
        f'<svg width="{width + 200}" height="{len(values) * (height + 4)}">{"".join(lines)}</svg>'
    )
