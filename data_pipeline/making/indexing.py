"""Making shards written by others a dataset, as they are; and mending those that cannot be."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from data_pipeline.errors import ConfigError, DataError, InputMissing, UserError
from data_pipeline.making.build import CLAIM
from data_pipeline.making.listing import KINDS, Kind
from data_pipeline.parallel import map_in_order, refuse_bad_task
from data_pipeline.progress import progress
from data_pipeline.shards.account import Account, Tally
from data_pipeline.shards.captions import COLUMNS
from data_pipeline.shards.dataset import (
    MANIFEST,
    Dataset,
    commit_dataset,
    digest_json,
    open_dataset,
)
from data_pipeline.shards.scan import TarFault
from data_pipeline.shards.tar import Contents, examine_tar, open_index, save_index
from data_pipeline.store import storage
from data_pipeline.strict import Strict

PACKED = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2", ".tar.lz4", ".zip", ".gz")
OURS = (".idx", ".rejected.json", MANIFEST, "contact_sheet.png", "stats.html",
        "scores.parquet")  # fmt: skip
MOST_TOLD = 5
INDEXED, NOTED = "index.json", ".account.json"  # of a folder of links: what it is, each shard's


class Shard(Strict):
    """What a shard of others holds."""

    good: int
    lost: int
    is_cut: bool
    account: Account


def index(
    path: str | Path,
    *,
    out: str | Path | None = None,
    task: tuple[int, int] = (0, 1),
    kind: Kind | None = None,
    captions: Mapping[str, float] = COLUMNS,
    skip_bad: bool = False,
    max_drop_rate: float = 0.01,
    workers: int = 1,
    notes: dict[str, str] | None = None,
) -> Dataset | None:
    """Make shards written by others (KEY.mp4 or KEY.jpg with KEY.json or KEY.txt) a dataset: where
    they are, or in a folder `out` of links to them, whose tasks (number, count) may run side by
    side; the one that completes it returns the dataset.

    Their media keep their sizes; the loader brings each to the recipe's clip size. Samples that
    cannot be used, and shards that cannot be read to their end, are left out and counted; DataError
    where they are more than a share of all, unless `skip_bad`.
    """
    path, place = str(path), str(out or path)
    if storage.exists(storage.join(path, CLAIM)):
        raise ConfigError(f"{path}: is a build of ours, indexed already; finish it with build.")
    refuse_bad_task(task)
    if out is None and task[1] > 1:
        raise ConfigError(
            f"task: value {task[0]}/{task[1]} is wrong because tasks need a folder of their own; "
            "give --out."
        )
    source = folder = shard_folder(path)
    names, tally = find_shards(source)
    if out is None:
        refuse_strangers(path, source, names)
    kind = kind or kind_inside(source, names)
    if out is not None:
        folder = storage.join(place, "shards")
        _claim(path, place, names, {"kind": kind, "captions": dict(captions)})
        if storage.exists(storage.join(place, MANIFEST)):
            return open_dataset(place)
    mine = [n for n in names[task[0] :: task[1]] if out is None or not _is_noted(folder, n)]
    examine = partial(_examine, source, kind=kind, columns=captions)
    examined = map_in_order(examine, mine, workers)
    shards: dict[str, Shard] = {}
    for name, contents in zip(
        mine, progress(examined, f"index {kind} shards", total=len(mine)), strict=True
    ):
        if not contents.is_cut:
            save_index(folder, name, contents.rows)
        shards[name] = _shard(contents)
        if out is not None:
            _link(storage.join(source, f"{name}.tar"), folder)
            text = shards[name].model_dump_json(indent=1) + "\n"
            storage.write_atomic(storage.join(folder, f"{name}{NOTED}"), text.encode())
    if out is not None:
        if not all(_is_noted(folder, name) for name in names):
            return None
        noted = (storage.read_bytes(storage.join(folder, f"{name}{NOTED}")) for name in names)
        shards = dict(zip(names, map(Shard.model_validate_json, noted), strict=True))
        storage.remove_partial(folder)
    for shard in shards.values():
        tally.add_account(shard.account)
    whole = [name for name in names if not shards[name].is_cut]
    good, lost = (sum(getattr(s, side) for s in shards.values()) for side in ("good", "lost"))
    account = tally.account()
    if not skip_bad and lost > max_drop_rate * (good + lost):
        mend = "mend them by `t2v data verify --repair`, or " if out is None else ""
        raise DataError(
            f"{path}: {lost} of {good + lost} samples cannot be used: {_told(account)}; {mend}"
            "leave them out by --skip-bad."
        )
    return commit_dataset(
        place,
        whole,
        kind=kind,
        folder="." if folder == place else "shards",
        clip=None,
        fps=None,
        account=account,
        captions=captions,
        notes=notes or {},
    )


def _claim(path: str, out: str, names: Sequence[str], settings: dict) -> None:
    """Begin, or go on with, a dataset of links to these shards."""
    if storage.is_remote(path) or storage.is_remote(out):
        raise ConfigError(
            f"out: value '{out}' is wrong because it holds links, which stores have not; "
            "index a folder of this machine into another one."
        )
    storage.refuse_overlap(path, out)
    folder = os.path.realpath(shard_folder(path))
    sizes = [(name, os.stat(storage.join(folder, f"{name}.tar")).st_size) for name in names]
    settings = settings | {"source": folder, "shards": digest_json(sizes)}
    content = json.dumps(settings, indent=1).encode() + b"\n"
    if storage.claim(out, INDEXED, content, what="index") not in (None, content):
        raise ConfigError(
            f"{out}: holds an index of other shards or with other settings (see {INDEXED}); "
            "give a new folder."
        )


def _is_noted(folder: str, name: str) -> bool:
    return storage.exists(storage.join(folder, f"{name}{NOTED}"))


def _link(tar: str, folder: str) -> None:
    os.makedirs(folder, exist_ok=True)
    with suppress(FileExistsError):  # of a task that was killed
        os.symlink(os.path.realpath(tar), storage.join(folder, Path(tar).name))


def _shard(contents: Contents) -> Shard:
    rows, faults = len(contents.rows), len(contents.faults)
    return Shard(
        good=0 if contents.is_cut else rows,
        lost=faults + (rows if contents.is_cut else 0),
        is_cut=contents.is_cut,
        account=contents.tally.account(),
    )


def shard_folder(path: str) -> str:
    """Where the shards of a dataset, or of what is to be one, lie."""
    inside = storage.join(path, "shards")
    return inside if storage.exists(inside) else path


def find_shards(folder: str) -> tuple[list[str], Tally]:
    """The names of the shards in a folder, and an account of what else lies there."""
    tally, names = Tally(), []
    for file in storage.list_files(folder):
        if file.startswith("."):
            tally.add("passed_over", "hidden file", [file])
        elif file.endswith(".tar"):
            names.append(file.removesuffix(".tar"))
        elif file.lower().endswith(PACKED):
            tally.add("passed_over", "compressed shard, not read (unpack it)", [file])
        elif not file.endswith(OURS):
            tally.add("passed_over", f"file of type {Path(file).suffix or 'none'}", [file])
    for inside in storage.list_folders(folder):
        if inside not in ("embeddings", "latents", "scores"):
            tally.add("passed_over", "folder, not entered", [inside])
    if not names:
        packed = tally.account().examples.get("compressed shard, not read (unpack it)")
        why = f"only compressed ones such as {packed[0]}; unpack them" if packed else None
        raise InputMissing(
            f"{folder}: holds no .tar{f', {why}' if why else ''}; give the folder of the shards."
        )
    return names, tally


def _examine(folder: str, name: str, *, kind: str, columns: Mapping[str, float]) -> Contents:
    return examine_tar(storage.join(folder, f"{name}.tar"), kind, columns)


def _told(account: Account) -> str:
    parts = [
        f"{count} x {why} ({', '.join(account.examples.get(why, [])[:MOST_TOLD])})"
        for why, count in account.unusable.items()
    ]
    return "; ".join(parts)


def kind_inside(folder: str, names: Sequence[str]) -> Kind:
    """What shards hold, by the first that holds any."""
    faults: list[TarFault] = []
    for name in names:
        found = {k: _examine(folder, name, kind=k, columns=COLUMNS) for k in KINDS}
        if any(len(contents.rows) for contents in found.values()):
            # Images may have a GIF beside, videos a cover.
            return max(KINDS, key=lambda kind: len(found[kind].rows))
        faults += found[KINDS[0]].faults
    why = f" ({str(faults[0]).rstrip('.')})" if faults else ""
    raise DataError(f"{folder}: its shards hold no video and no image{why}; check the folder.")


def refuse_strangers(path: str, shard_folder: str, names: Sequence[str]) -> None:
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
