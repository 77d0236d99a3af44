"""Making shards written by others a dataset, as they are; and mending those that cannot be."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from data_pipeline.errors import ConfigError, DataError, InputMissing, UserError
from data_pipeline.making.build import CLAIM
from data_pipeline.making.listing import KINDS, Kind
from data_pipeline.parallel import map_in_order
from data_pipeline.progress import progress
from data_pipeline.shards.account import Account, Tally
from data_pipeline.shards.captions import COLUMNS
from data_pipeline.shards.dataset import MANIFEST, Dataset, commit_dataset, open_dataset
from data_pipeline.shards.tar import Contents, examine_tar, open_index, save_index
from data_pipeline.store import storage

PACKED = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2", ".tar.lz4", ".zip", ".gz")
OURS = (".idx", ".rejected.json", MANIFEST, "contact_sheet.png", "stats.html",
        "scores.parquet")  # fmt: skip
MOST_TOLD = 5


def index(
    path: str | Path,
    *,
    kind: Kind | None = None,
    captions: Mapping[str, float] = COLUMNS,
    skip_bad: bool = False,
    max_drop_rate: float = 0.01,
    workers: int = 1,
    notes: dict[str, str] | None = None,
) -> Dataset:
    """Make shards written by others (KEY.mp4 or KEY.jpg with KEY.json or KEY.txt) a dataset.

    Their media keep their sizes; the loader brings each to the recipe's clip size. Samples that
    cannot be used, and shards that cannot be read to their end, are left out and counted; DataError
    where they are more than a share of all, unless `skip_bad`.
    """
    path = str(path)
    if storage.exists(storage.join(path, CLAIM)):
        raise ConfigError(f"{path}: is a build of ours, indexed already; finish it with build.")
    folder = shard_folder(path)
    names, tally = find_shards(folder)
    _refuse_strangers(path, folder, names)
    kind = kind or _kind_inside(folder, names)
    examine = partial(_examine, folder, kind=kind, columns=captions)
    examined = map_in_order(examine, names, workers)
    whole: list[str] = []
    good = lost = 0
    for name, contents in zip(
        names, progress(examined, f"index {kind} shards", total=len(names)), strict=True
    ):
        tally.add_account(contents.tally.account())
        lost += len(contents.faults)
        if contents.is_cut:
            lost += len(contents.rows)
            continue
        good += len(contents.rows)
        save_index(folder, name, contents.rows)
        whole.append(name)
    account = tally.account()
    if not skip_bad and lost > max_drop_rate * (good + lost):
        raise DataError(
            f"{path}: {lost} of {good + lost} samples cannot be used: {_told(account)}; mend them "
            "by `t2v data verify --repair`, or leave them out by --skip-bad."
        )
    return commit_dataset(
        path,
        whole,
        kind=kind,
        folder="." if folder == path else "shards",
        clip=None,
        fps=None,
        account=account,
        captions=captions,
        notes=notes or {},
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


def _kind_inside(folder: str, names: Sequence[str]) -> Kind:
    for name in names:
        for kind in KINDS:
            if len(_examine(folder, name, kind=kind, columns=COLUMNS).rows):
                return kind
    raise DataError(f"{folder}: its shards hold no video and no image; check the folder.")


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
