"""Finding every fault of a dataset and of its derived sets before a run does, and mending it."""

import math
import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError, UserError
from data_pipeline.latents.latents import LATENTS
from data_pipeline.making.indexing import (
    find_shards,
    index,
    kind_inside,
    refuse_strangers,
    shard_folder,
)
from data_pipeline.making.listing import Kind as MediaKind
from data_pipeline.making.scoring import TABLE, fault_of_scores
from data_pipeline.media.clips import probe
from data_pipeline.media.codec import count_frames, decode_image
from data_pipeline.parallel import map_in_order
from data_pipeline.progress import progress
from data_pipeline.shards.account import Tally
from data_pipeline.shards.captions import COLUMNS
from data_pipeline.shards.dataset import (
    Dataset,
    ShardInfo,
    cached_index,
    commit_dataset,
    fingerprint,
    open_dataset,
)
from data_pipeline.shards.derived import (
    MANIFEST,
    PROVENANCE,
    DerivedInfo,
    Kind,
    members_of,
    open_info,
    sound_members,
    text_of,
)
from data_pipeline.shards.derived import fingerprint as set_fingerprint
from data_pipeline.shards.scan import parse_metadata
from data_pipeline.shards.tar import (
    Contents,
    examine_tar,
    index_digest,
    open_index,
    read_member,
    save_index,
    write_index,
    write_tar,
)
from data_pipeline.store import storage
from data_pipeline.text.embeddings import EMBEDDINGS

DEADLINE_SECONDS = 120.0
NOT_LISTED = "is not in dataset.json, so no run reads it"
KINDS: tuple[Kind, ...] = (EMBEDDINGS, LATENTS)


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong, in a file of a dataset; `row`: in one sample of a shard."""

    path: str
    reason: str
    row: int | None = None
    key: str = ""

    def __str__(self) -> str:
        where = f"{self.path}: '{self.key}'" if self.row is not None else self.path
        return f"{where}: {self.reason.removeprefix(f'{self.path}: ')}"


def verify(path: str | Path, *, decode: bool = True, workers: int = 1) -> list[Fault]:
    """Every fault of a dataset and of its embeddings, latents and scores; `decode`: decode every
    sample too."""
    dataset = open_dataset(path)
    info = dataset.info
    cached_index.cache_clear()
    faults = []
    if info.fingerprint != fingerprint(info.kind, info.clip, info.fps, info.shards):
        faults.append(Fault(storage.join(dataset.path, "dataset.json"), "was changed by hand"))
    if info.samples != sum(shard.samples for shard in info.shards):
        faults.append(Fault(storage.join(dataset.path, "dataset.json"), "miscounts its samples"))
    known = {f"{shard.name}.tar" for shard in info.shards}
    for name in storage.list_files(dataset.shard_folder, ".tar"):
        if name not in known:
            tar = storage.join(dataset.shard_folder, name)
            faults.append(Fault(tar, NOT_LISTED))
    check = partial(check_shard, dataset, decode=decode)
    found = map_in_order(
        check,
        range(len(info.shards)),
        workers,
        named=lambda number: f"{info.shards[number].name}.tar",
    )
    for part in progress(found, "verify shards", total=len(info.shards)):
        faults += part
    for kind in KINDS:
        for name in kind.names(dataset):
            faults += check_set(dataset, kind, name)
    if why := fault_of_scores(dataset):
        faults.append(Fault(storage.join(dataset.path, TABLE), why))
    return faults


def check_shard(dataset: Dataset, shard: int, *, decode: bool) -> list[Fault]:
    """The faults of one shard of a dataset."""
    info = dataset.info.shards[shard]
    path = storage.join(dataset.shard_folder, f"{info.name}.tar")
    contents, faults = _check_tar(
        dataset.shard_folder,
        info,
        dataset.info.kind,
        dataset.info.captions,
        dataset.info.account.unusable,
    )
    if contents is None or not decode:
        return faults
    for row, (key, members) in enumerate(zip(contents.keys, contents.rows, strict=True)):
        try:
            _check_sample(dataset, path, key, members)
        except DataError as error:
            faults.append(Fault(path, str(error), row, key))
    return faults


def check_set(dataset: Dataset, kind: Kind, name: str) -> list[Fault]:
    """The faults of one set derived from a dataset."""
    try:
        folder, info = open_info(kind, dataset, name)
    except UserError as error:
        return [Fault(kind.place(dataset, name), str(error))]
    faults = []
    if info.fingerprint != set_fingerprint(info):
        reason = f"was changed by hand; {kind.verb} again under another --name"
        faults.append(Fault(storage.join(folder, MANIFEST), reason))
    path = storage.join(folder, PROVENANCE)
    if not storage.exists(path) or storage.read_bytes(path).decode() != text_of(info.provenance):
        reason = f"differs from the manifest; {kind.verb} again under another --name"
        faults.append(Fault(path, reason))
    for shard in progress(range(len(info.shards)), f"verify {name}", total=len(info.shards)):
        faults += _check_set_shard(dataset, kind, folder, info, shard)
    return faults


def repair(path: str | Path, faults: Sequence[Fault]) -> Dataset:
    """Make a dataset sound with the samples that are left.

    Indexes are made again; a damaged tar is written again with its whole samples and kept as
    `NAME.tar.damaged`, or `.damaged1` ... where that is there. Indexes of derived shards lose the
    rows in doubt, so that `t2v data embed` and `encode` make these again; they must be run if any
    sample was lost.
    """
    dataset = open_dataset(path)
    info, folder = dataset.info, dataset.shard_folder
    names, lost = [], 0
    for shard in info.shards:
        tar = storage.join(folder, f"{shard.name}.tar")
        index = storage.join(folder, f"{shard.name}.idx")
        own = [fault for fault in faults if fault.path in (tar, index)]
        if not storage.exists(tar):
            lost += shard.samples
            continue
        if any(fault.path == tar for fault in own):
            _rewrite(
                tar, info.kind, info.captions, {fault.row for fault in own if fault.row is not None}
            )
        if own:
            lost += max(
                0, shard.samples - write_index(folder, shard.name, info.kind, info.captions)
            )
        names.append(shard.name)
    names += _take_in(dataset, faults)
    for kind in KINDS:
        for name in kind.names(dataset):
            for shard in info.shards:
                _leave_sound_rows(kind.place(dataset, name), shard.name, faults)
    tally = Tally()
    tally.add_account(info.account)
    tally.add("unusable", "lost to repair", [], lost)
    return commit_dataset(
        dataset.path,
        sorted(names),
        kind=info.kind,
        folder=info.folder,
        clip=info.clip,
        fps=info.fps,
        account=tally.account(),
        captions=info.captions,
        notes=info.notes,
    )


def mend_shards(
    path: str | Path, *, kind: MediaKind | None, captions: Mapping[str, float]
) -> Dataset:
    """Make a dataset of shards that `index` cannot read to their end: of what they hold whole."""
    source = shard_folder(str(path))
    names, _ = find_shards(source)
    kind = kind or kind_inside(source, names)
    tars = [storage.join(source, f"{name}.tar") for name in names]
    if all(examine_tar(tar, kind, captions).is_cut for tar in tars):
        # No index would take the whole samples of others in.
        refuse_strangers(str(path), source, names)
        for tar in tars:
            if len(examine_tar(tar, kind, captions).rows):
                _rewrite(tar, kind, captions, set())
    index(path, kind=kind, captions=captions, skip_bad=True)
    return repair(path, verify(path, decode=False))


def left_after(repaired: Dataset, faults: Sequence[Fault]) -> list[Fault]:
    """The faults that repair does not mend: tars that are no part of a dataset, and stay none."""
    names = {f"{shard.name}.tar" for shard in repaired.info.shards}
    return [f for f in faults if f.reason == NOT_LISTED and Path(f.path).name not in names]


def _take_in(dataset: Dataset, faults: Sequence[Fault]) -> list[str]:
    """Write again and index those shards of others that were left out and hold whole samples."""
    names = []
    if dataset.info.clip:
        return []  # a build of ours has its shards
    for fault in faults:
        if fault.reason == NOT_LISTED:
            folder, _, file = fault.path.rpartition("/")
            contents = examine_tar(fault.path, dataset.info.kind, dataset.info.captions)
            if len(contents.rows):
                if contents.is_cut:
                    _rewrite(fault.path, dataset.info.kind, dataset.info.captions, set())
                names.append(file.removesuffix(".tar"))
                write_index(folder, names[-1], dataset.info.kind, dataset.info.captions)
    return names


def _check_tar(
    folder: str,
    info: ShardInfo,
    kind: str,
    columns: Mapping[str, float] = COLUMNS,
    known: Container[str] = (),
) -> tuple[Contents | None, list[Fault]]:
    """What a shard's tar holds, and the faults of tar and index but for those that were known when
    it was indexed; None: there is no tar."""
    tar, path = (storage.join(folder, f"{info.name}{suffix}") for suffix in (".tar", ".idx"))
    if not storage.exists(tar):
        return None, [Fault(tar, f"is missing, and {info.samples} samples with it")]
    contents = examine_tar(tar, kind, columns)
    faults = [Fault(tar, str(f)) for f in contents.faults if f.reason not in known]
    try:
        index = open_index(folder, info.name)
    except UserError as error:
        return contents, [*faults, Fault(path, str(error))]
    if index_digest(folder, info.name) != info.index_sha256:
        faults.append(Fault(path, "is not the one its manifest names (sha256)"))
        index = contents.rows
    if len(contents.rows) != info.samples:
        reason = f"holds {len(contents.rows)} whole samples, but should hold {info.samples}"
        faults.append(Fault(tar, reason))
    elif len(index) == len(contents.rows):
        for row in np.flatnonzero(index != contents.rows).tolist():
            faults.append(Fault(tar, _difference(index[row], contents.rows[row]), row,
                                contents.keys[row]))  # fmt: skip
    return contents, faults


def _difference(index: np.void, found: np.void) -> str:
    if index["key"] != found["key"]:
        return "is not the sample of its index"
    for slot in ("media", "json", "txt"):
        if index[slot] != found[slot]:
            return f"bytes of its {slot} differ from the index (crc32)"
    return "has another caption than its index says"


def _check_sample(dataset: Dataset, path: str, key: str, members: np.void) -> None:
    """DataError if a sample cannot be decoded or is not what its dataset says."""
    info = dataset.info
    media = read_member(path, members["media"])
    metadata = {}
    if members["json"]["size"]:
        metadata = parse_metadata(path, key, read_member(path, members["json"]))
    if info.kind == "image":
        shape = decode_image(media).shape[:2]
        if info.clip and shape != info.clip[1:]:
            raise DataError(f"is {shape} pixels, not {info.clip[1:]} as its dataset")
        return
    found = probe(media, "video")
    frames = count_frames(media, DEADLINE_SECONDS)
    if frames < 2:
        raise DataError("is one still frame, no video")
    shape = (frames, found.height, found.width)
    if info.clip and shape != info.clip:
        raise DataError(f"is {shape} (frames, height, width), not {info.clip} as its dataset")
    if info.clip and not math.isclose(found.fps, metadata.get("fps", 0.0), rel_tol=0.01):
        raise DataError(f"has {found.fps:g} frames per second, its json {metadata.get('fps')}")


def _check_set_shard(
    dataset: Dataset, kind: Kind, folder: str, info: DerivedInfo, shard: int
) -> Iterator[Fault]:
    contents, faults = _check_tar(folder, info.shards[shard], "tensor")
    yield from faults
    if contents is None:
        return
    path = storage.join(folder, f"{info.shards[shard].name}.tar")
    try:
        samples = dataset.index(shard)
    except UserError:
        return  # told of the dataset
    if len(samples) != len(contents.rows):
        yield Fault(path, f"has {len(contents.rows)} {kind.folder} of {len(samples)} samples")
        return
    origins = kind.origins(samples)
    for row, (key, members) in enumerate(zip(contents.keys, contents.rows, strict=True)):
        try:
            if members["key"] != samples[row]["key"]:
                raise DataError("is of another sample than this row of the dataset")
            if members["caption"] != origins[row]:
                raise DataError(f"is of another {kind.origin} than the sample has")
            kind.check(members_of(path, members), path, info.provenance)
        except DataError as error:
            yield Fault(path, str(error), row, key)


def _leave_sound_rows(folder: str, name: str, faults: Sequence[Fault]) -> None:
    """Take rows with faults out of the index of a derived shard; all of them where it is not known
    which are wrong."""
    tar, path = (storage.join(folder, f"{name}{suffix}") for suffix in (".tar", ".idx"))
    own = [fault for fault in faults if fault.path in (tar, path)]
    if not own or not storage.exists(path):
        return
    if any(fault.path == path for fault in own):
        storage.remove(path)
        return
    rows, bad = open_index(folder, name), {fault.row for fault in own}
    sound = [
        number not in bad and sound_members(tar, row) is not None for number, row in enumerate(rows)
    ]
    if all(sound):
        storage.remove(path)
    else:
        save_index(folder, name, rows[sound])


def _rewrite(tar: str, kind: str, captions: Mapping[str, float], bad_rows: set[int]) -> None:
    """Keep a tar as `.damaged`, and write its whole samples but for some rows in its place."""
    names = (f"{tar}.damaged{number or ''}" for number in count())
    aside = next(name for name in names if not storage.exists(name))  # older ones stay, too
    with storage.local_file(tar).open("rb") as old, storage.open_atomic(aside) as kept:
        shutil.copyfileobj(old, kept)
    contents = examine_tar(tar, kind, captions)

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        parts = zip(contents.keys, contents.rows, contents.suffixes, strict=True)
        for row, (key, members, suffixes) in enumerate(parts):
            if row not in bad_rows:
                yield (
                    key,
                    {suffix: read_member(tar, members[slot]) for slot, suffix in suffixes.items()},
                )

    write_tar(tar, samples())
