"""Making datasets: raw captioned media into shards, and foreign shards usable as they are."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

from data_pipeline.errors import ConfigError, DataError, InputMissing, UserError
from data_pipeline.making.listing import Collection, Item, Kind, list_media
from data_pipeline.making.samples import (
    Filters,
    Made,
    Members,
    Target,
    make_samples,
    refuse_bad_target,
)
from data_pipeline.making.ucf101 import is_ucf101, list_ucf101
from data_pipeline.media.clips import Cut
from data_pipeline.parallel import map_in_order
from data_pipeline.progress import progress
from data_pipeline.shards.contact_sheet import NAME as SHEET
from data_pipeline.shards.contact_sheet import write_contact_sheet
from data_pipeline.shards.dataset import (
    MANIFEST,
    Dataset,
    commit_dataset,
    digest_json,
    open_dataset,
)
from data_pipeline.shards.tar import index_tar, open_index, write_index, write_tar
from data_pipeline.store import storage

PLAN = "build.json"
BEFORE_INDEX = (".tar", ".rejected.json")  # what is written of a shard before it is one


@dataclass
class LeftOut:
    """The files of a collection that are left out, and why: not wanted, or not usable."""

    filtered: dict[str, str] = field(default_factory=dict)
    unusable: dict[str, str] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """How many for each kind of reason."""
        reasons = [*self.filtered.values(), *self.unusable.values()]
        return dict(sorted(Counter(why.split(":")[0] for why in reasons).items()))


@dataclass(frozen=True)
class Budget:
    """How many unusable files of a collection are accepted."""

    folder: str
    total: int
    max_drop_rate: float

    def refuse_excess(self, unusable: dict[str, str]) -> None:
        """DataError, told by the last file, if there are too many."""
        count = len(unusable)
        if count <= self.max_drop_rate * self.total:
            return
        file, why = list(unusable.items())[-1]
        more = f" ({count} of {self.total} files so far are unusable)" if count > 1 else ""
        raise DataError(
            f"{storage.join(self.folder, file)}: {why}{more}; repair or remove it and build "
            f"again, or accept more than {self.max_drop_rate:.2%} by --max-drop-rate."
        )


def build(
    source: str | Path,
    out: str | Path,
    *,
    frames: int,
    height: int,
    width: int,
    fps: float | None = None,
    kind: Kind | None = None,
    split: str | None = None,
    cut: Cut = "none",
    filters: Filters | None = None,
    shard_samples: int = 1000,
    task: tuple[int, int] = (0, 1),
    workers: int = 1,
    max_drop_rate: float = 0.01,
    deadline: float = 120.0,
    notes: dict[str, str] | None = None,
) -> Dataset | None:
    """Shard captioned media at one clip size, `shard_samples` source files to a shard.

    What `out` already holds is kept, so a killed build goes on where it stopped, and tasks (number,
    count) may run side by side; the one that completes the shards returns the dataset. A build that
    fails before its first shard takes back what it wrote, and no other file.
    """
    out = str(out)
    storage.refuse_overlap(str(source), out)
    _refuse_bad_counts(fps, shard_samples, task, workers, max_drop_rate)
    collection = list_source(source, kind, split)
    items, is_video = collection.items, collection.kind == "video"
    target = Target(
        collection.kind,
        (frames if is_video else 1, height, width),
        fps if is_video else 0.0,
        cut,
        filters or Filters(),
    )
    refuse_bad_target(target)
    listing = [(item.file, item.caption, item.metadata) for item in items]
    plan = {"kind": target.kind, "clip": target.size, "fps": target.fps, "cut": cut}
    plan |= {"filters": asdict(target.filters), "shard_samples": shard_samples}
    folder = storage.join(out, "shards")
    groups = [items[at : at + shard_samples] for at in range(0, len(items), shard_samples)]
    names = [f"{number:06d}" for number in range(len(groups))]
    made_folders, is_new = storage.absent_folders(folder), False
    try:
        is_new = _claim(out, plan | {"items": digest_json(listing)})
        if storage.exists(storage.join(out, MANIFEST)):
            return _with_contact_sheet(open_dataset(out))
        mine = [n for n in range(task[0], len(groups), task[1]) if not _finished(folder, names[n])]
        budget = Budget(collection.folder, len(items), max_drop_rate)
        make = partial(
            make_samples, folder=collection.folder, target=target, deadline_seconds=deadline
        )
        todo = [item for number in mine for item in groups[number]]
        made = map_in_order(make, todo, workers)
        made = progress(made, f"build {target.kind} shards", total=len(todo))
        unusable: dict[str, str] = {}
        for number in mine:
            group = zip(groups[number], islice(made, len(groups[number])), strict=True)
            _write_shard(folder, names[number], target.kind, group, budget, unusable)
    except BaseException:
        if task[1] == 1 and not _finished(folder, names[0]):
            first = [f"{folder}/{names[0]}{suffix}" for suffix in BEFORE_INDEX]
            storage.take_back([*first, f"{out}/{PLAN}"] if is_new else [], made_folders)
        raise
    if not all(_finished(folder, name) for name in names):
        return None
    storage.remove_partial(folder)
    left_out = _all_left_out(folder, names)
    budget.refuse_excess(left_out.unusable)
    dataset = commit_dataset(
        out,
        names,
        kind=target.kind,
        folder="shards",
        clip=target.size,
        fps=target.fps,
        rejected=left_out.counts(),
        notes=collection.notes | (notes or {}),
    )
    return _with_contact_sheet(dataset)


def index(
    path: str | Path, *, kind: Kind | None = None, notes: dict[str, str] | None = None
) -> Dataset:
    """Make shards written by others (KEY.mp4 or KEY.jpg with KEY.json or KEY.txt) a dataset.

    Their media keep their sizes; the loader brings each to the recipe's clip size.
    """
    path = str(path)
    if storage.exists(storage.join(path, PLAN)):
        raise ConfigError(f"{path}: is a build of ours, indexed already; finish it with build.")
    folder = "shards" if storage.exists(storage.join(path, "shards")) else "."
    shard_folder = storage.join(path, folder) if folder == "shards" else path
    names = [name.removesuffix(".tar") for name in storage.list_files(shard_folder, ".tar")]
    if not names:
        raise InputMissing(f"{shard_folder}: holds no .tar; give the folder of the shards.")
    _refuse_strangers(path, shard_folder, names)
    kind = kind or _kind_inside(shard_folder, names)
    for name in progress(names, f"index {kind} shards", total=len(names)):
        write_index(shard_folder, name, kind)
    return commit_dataset(
        path,
        names,
        kind=kind,
        folder=folder,
        clip=None,
        fps=None,
        rejected={},
        notes=notes or {},
    )


def list_source(source: str | Path, kind: Kind | None, split: str | None) -> Collection:
    """The captioned files of a source; `split` chooses some of UCF-101's."""
    if is_ucf101(str(source)):
        return list_ucf101(str(source), split)
    if split is not None:
        raise ConfigError(
            f"split: value '{split}' is wrong because {source} is not UCF-101 with its folders "
            "UCF-101 and ucfTrainTestlist; leave it out."
        )
    return list_media(source, kind)


def _write_shard(
    folder: str,
    name: str,
    kind: Kind,
    group: Iterator[tuple[Item, Made]],
    budget: Budget,
    unusable: dict[str, str],
) -> None:
    """One shard of files and what was made of them; `unusable` counts over the whole task."""
    left_out = LeftOut()

    def samples() -> Iterator[tuple[str, Members]]:
        for row, (item, made) in enumerate(group):
            if made.filtered:
                left_out.filtered[item.file] = made.filtered
            if made.unusable:
                left_out.unusable[item.file] = unusable[item.file] = made.unusable
                budget.refuse_excess(unusable)
            for suffix, members in made.samples:
                yield f"{name}{row:06d}{suffix}", members

    write_tar(storage.join(folder, f"{name}.tar"), samples())
    text = json.dumps(asdict(left_out), indent=1, ensure_ascii=False) + "\n"
    storage.write_atomic(storage.join(folder, f"{name}.rejected.json"), text.encode())
    write_index(folder, name, kind)


def _with_contact_sheet(dataset: Dataset) -> Dataset:
    if not storage.exists(storage.join(dataset.path, SHEET)):
        write_contact_sheet(dataset)
    return dataset


def _refuse_bad_counts(
    fps: float | None,
    shard_samples: int,
    task: tuple[int, int],
    workers: int,
    max_drop_rate: float,
) -> None:
    for name, value in (("shard_samples", shard_samples), ("workers", workers)):
        if value < 1:
            raise ConfigError(f"{name}: value {value} is wrong because it is below 1; raise it.")
    if fps is not None and not 0 < fps < math.inf:
        raise ConfigError(f"fps: value {fps} is wrong because it is no rate; give one above 0.")
    if not 0 <= max_drop_rate <= 1:
        raise ConfigError(
            f"max_drop_rate: value {max_drop_rate} is wrong because it is no share; give 0 to 1."
        )
    if not 0 <= task[0] < task[1]:
        raise ConfigError(
            f"task: value {task[0]}/{task[1]} is wrong because tasks count from 0 to N-1; "
            "give I/N with I below N."
        )


def _claim(out: str, plan: dict) -> bool:
    """Write down what is built in a folder, or refuse if something else is; whether it is new."""
    text = json.dumps(plan, indent=1) + "\n"
    found = storage.claim(out, PLAN, text.encode(), what="build")
    if found not in (None, text.encode()):
        raise ConfigError(
            f"{out}: holds a dataset of another source or other settings (see {PLAN}); "
            "give a new folder, or delete it first."
        )
    return found is None


def _refuse_strangers(path: str, shard_folder: str, names: Sequence[str]) -> None:
    """ConfigError where indexing would replace a file that is no manifest or index of ours."""
    known: set[str] = set()
    if storage.exists(manifest := storage.join(path, MANIFEST)):
        try:
            known = {shard.name for shard in open_dataset(path).info.shards}
        except UserError:
            raise ConfigError(
                f"{manifest}: is there already and no whole one of ours; move it away, then index."
            ) from None
    for name in names:
        if name not in known and storage.exists(storage.join(shard_folder, f"{name}.idx")):
            try:
                open_index(shard_folder, name)
            except DataError:
                raise ConfigError(
                    f"{storage.join(shard_folder, name)}.idx: is there already and no index of "
                    "ours; move it away, then index."
                ) from None


def _finished(folder: str, name: str) -> bool:
    return storage.exists(storage.join(folder, f"{name}.idx"))


def _all_left_out(folder: str, names: Sequence[str]) -> LeftOut:
    total = LeftOut()
    for name in names:
        part = json.loads(storage.read_bytes(storage.join(folder, f"{name}.rejected.json")))
        total.filtered |= part["filtered"]
        total.unusable |= part["unusable"]
    return total


def _kind_inside(folder: str, names: Sequence[str]) -> Kind:
    kinds: tuple[Kind, ...] = ("video", "image")
    for name in names:
        for kind in kinds:
            if len(index_tar(storage.join(folder, f"{name}.tar"), kind)):
                return kind
    raise DataError(f"{folder}: its shards hold no video and no image; check the folder.")
