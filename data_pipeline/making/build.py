"""Making datasets: raw captioned media into shards of one clip size."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

from data_pipeline.errors import ConfigError, DataError, InputMissing
from data_pipeline.making.listing import Kind
from data_pipeline.making.plan import Plan, find_material, open_plan
from data_pipeline.making.presets import Columns
from data_pipeline.making.samples import (
    Filters,
    Made,
    Members,
    Source,
    Target,
    make_samples,
    refuse_bad_target,
)
from data_pipeline.making.scoring import dataset_in
from data_pipeline.media.clips import Cut
from data_pipeline.parallel import map_in_order, refuse_bad_task
from data_pipeline.progress import progress
from data_pipeline.shards.account import Side, Tally
from data_pipeline.shards.captions import COLUMNS, parse_object
from data_pipeline.shards.contact_sheet import NAME as SHEET
from data_pipeline.shards.contact_sheet import write_contact_sheet
from data_pipeline.shards.dataset import MANIFEST, Dataset, commit_dataset, open_dataset
from data_pipeline.shards.tar import write_index, write_tar
from data_pipeline.store import storage

CLAIM, PLAN = "build.json", "plan.parquet"
BEFORE_INDEX = (".tar", ".rejected.json")  # what is written of a shard before it is one
LeftOut = dict[Side, dict[str, str]]  # why files and clips are no samples, by name
REMEDIES = {"has no caption": "write a .txt or .json beside it, or name the column of captions"}


@dataclass
class Budget:
    """How many unusable files, or rows of a list, are accepted, and which were found so far."""

    source: str
    folder: str
    plan: Plan
    max_drop_rate: float
    found: dict[str, str] = field(default_factory=dict)

    def add(self, found: Mapping[str, str]) -> None:
        """Count those of one more file."""
        self.found |= found
        self.refuse_excess(self.found)

    def refuse_excess(self, found: Mapping[str, str]) -> None:
        """DataError, or InputMissing for missing files, if there are too many: told by the last."""
        planned, total = self.plan.account, self.plan.rows
        count = sum(planned.unusable.values()) + len(found)
        if count <= self.max_drop_rate * total:
            return
        more = f" ({count} of {total} so far are unusable)" if count > 1 else ""
        if found:
            name, why = list(found.items())[-1]
            where = storage.join(self.folder, name)
        else:
            why = next(iter(planned.unusable))
            where = ": ".join([self.source, *planned.examples.get(why, [])[:1]])
        remedy = REMEDIES.get(why.split(":")[0], "repair or remove it and build again")
        kind = InputMissing if why == "no such file" else DataError
        raise kind(
            f"{where}: {why}{more}; {remedy}, or accept more than {self.max_drop_rate:.2%} by "
            "--max-drop-rate."
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
    columns: Columns | None = None,
    root: str | None = None,
    cut: Cut = "none",
    crop_bars: bool = False,
    tone_map: bool = False,
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
    count) may run side by side by one plan; the one that completes the shards returns the dataset.
    A build that fails before its first shard takes back what it wrote, and no other file. `columns`
    say what a list's mean, `root` where its files lie, if not beside it.
    """
    out, columns, filters = str(out), columns or Columns(), filters or Filters()
    if columns.captions == COLUMNS and (indexed := dataset_in(str(source))):
        columns = replace(columns, captions=indexed.info.captions)
    _refuse_bad_counts(fps, shard_samples, task, workers, max_drop_rate)
    refuse_bad_target(Target(kind or "video", (frames, height, width), fps, cut, filters))
    find = partial(find_material, str(source), columns, root=root, kind=kind, split=split)
    material = find()
    storage.refuse_overlap(str(source), out)
    settings = {"kind": kind, "clip": (frames, height, width), "fps": fps, "cut": cut} | {
        "filters": asdict(filters),
        "shard_samples": shard_samples,
        "crop_bars": crop_bars,
        "tone_map": tone_map,
        "columns": asdict(columns),
        "source": material.version,
    }
    folder, plan_file = storage.join(out, "shards"), storage.join(out, PLAN)
    made_folders, is_new = storage.absent_folders(folder), False
    names: list[str] = []
    try:
        is_new = _claim(out, str(source), settings)
        if storage.exists(storage.join(out, MANIFEST)):
            if task[1] == 1:  # else another task may be drawing the contact sheet at this moment
                storage.remove_partial(out)
            return _with_contact_sheet(open_dataset(out))
        if not storage.exists(plan_file):
            with storage.open_atomic(plan_file) as file:
                material.write(file)
                if find().version != material.version:  # no plan stands but of what there is
                    raise ConfigError(
                        f"{source}: is wrong because it changed while it was listed; build again "
                        "once its writer is done."
                    )
        plan = open_plan(plan_file)
        is_video = plan.kind == "video"
        size, rate = (frames if is_video else 1, height, width), fps if is_video else 0.0
        target = Target(plan.kind, size, rate, cut, filters, crop_bars, tone_map)
        refuse_bad_target(target)
        budget = Budget(material.source, material.folder, plan, max_drop_rate)
        budget.refuse_excess({})
        names = [f"{number:06d}" for number in range(-(-plan.files // shard_samples))]
        finished = _finished(folder)
        mine = [n for n in range(task[0], len(names), task[1]) if names[n] not in finished]
        begins = [n * shard_samples for n in mine]
        make = partial(
            make_samples,
            source=Source(material.folder, columns, plan.times),
            target=target,
            deadline_seconds=deadline,
        )
        todo = (item for at in begins for item in plan.items(at, at + shard_samples))
        made = progress(
            map_in_order(make, todo, workers),
            f"build {target.kind} shards",
            total=sum(min(shard_samples, plan.files - at) for at in begins),
        )
        for n in mine:  # the last one is of fewer files where no more come
            _write_shard(folder, names[n], target.kind, islice(made, shard_samples), budget)
    except BaseException:
        if is_new and not storage.exists(plan_file):
            names = []  # another task could not go on by settings that cannot be planned
        if (task[1] == 1 or not names) and not (names and names[0] in _finished(folder)):
            first = [f"{folder}/000000{suffix}" for suffix in BEFORE_INDEX]
            ours = [*first, plan_file, storage.join(out, CLAIM)] if is_new else []
            storage.take_back(ours, made_folders)
        raise
    if not _finished(folder).issuperset(names):
        return None
    # Beside the shards, another task may be writing the manifest at this moment.
    for place in (folder, out)[: 2 if task[1] == 1 else 1]:
        storage.remove_partial(place)
    left_out = _all_left_out(folder, names)
    budget.refuse_excess(left_out["unusable"])
    tally = Tally()
    tally.add_account(plan.account)
    for side, reasons in left_out.items():
        for name, why in reasons.items():
            tally.add(side, why, [name])
    told = {"times": str(plan.times)} if plan.times else {}
    dataset = commit_dataset(
        out,
        names,
        kind=target.kind,
        folder="shards",
        clip=target.size,
        fps=target.fps,
        account=tally.account(),
        notes=material.notes | told | (notes or {}),
    )
    return _with_contact_sheet(dataset)


def _write_shard(folder: str, name: str, kind: Kind, group: Iterator[Made], budget: Budget) -> None:
    """One shard of what was made of files."""
    left_out: LeftOut = {"not_wanted": {}, "unusable": {}}

    def samples() -> Iterator[tuple[str, Members]]:
        for row, made in enumerate(group):
            left_out["not_wanted"] |= made.not_wanted
            left_out["unusable"] |= made.unusable
            if made.unusable:
                budget.add(made.unusable)
            for suffix, members in made.samples:
                yield f"{name}{row:06d}{suffix}", members

    write_tar(storage.join(folder, f"{name}.tar"), samples())
    text = json.dumps(left_out, indent=1, ensure_ascii=False) + "\n"
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
    refuse_bad_task(task)


def _claim(out: str, source: str, settings: dict) -> bool:
    """Write down what is built in a folder, or refuse if something else is; whether it is new."""
    text = json.dumps(settings, indent=1) + "\n"
    found = storage.claim(out, CLAIM, text.encode(), what="build")
    if found is None or found == text.encode():
        return found is None
    try:
        before = parse_object(found)
    except DataError:
        before = {}
    if before | {"source": settings["source"]} == json.loads(text):
        raise ConfigError(
            f"{out}: was begun of another source, or of {source} before it changed; put back what "
            "there was, or give a new folder."
        )
    raise ConfigError(
        f"{out}: holds a dataset of other settings (see {CLAIM}); give a new folder, or delete it "
        "first."
    )


def _finished(folder: str) -> set[str]:
    """The shards that are done, by one listing."""
    return {name.removesuffix(".idx") for name in storage.list_files(folder, ".idx")}


def _all_left_out(folder: str, names: Sequence[str]) -> LeftOut:
    total: LeftOut = {"not_wanted": {}, "unusable": {}}
    for name in names:
        part = json.loads(storage.read_bytes(storage.join(folder, f"{name}.rejected.json")))
        for side, reasons in total.items():
            reasons |= part[side]
    return total
