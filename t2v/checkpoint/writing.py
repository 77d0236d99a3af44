"""A step becomes a checkpoint: written beside, proved by a manifest, renamed into place."""

import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_pipeline.errors import NumericError, StorageError, UserError
from data_pipeline.store import storage
from t2v.checkpoint.compatibility import WEIGHTS, model_signature
from t2v.checkpoint.finding import step_folder
from t2v.checkpoint.keeping import Keeping, staging_of
from t2v.checkpoint.manifest import (
    MANIFEST,
    FileRecord,
    Manifest,
    present_versions,
    record_file,
    wrong_sizes,
)
from t2v.checkpoint.tensor_files import INDEX, Slice, WrittenFile, join_index, write_slices
from t2v.engine.faults import fault
from t2v.engine.world import World


def commit(
    checkpoints: Path,
    slices: dict[str, Slice],
    facts: dict[str, Any],
    world: World,
    keeping: Keeping,
    may_commit: Callable[[], None],
) -> int:
    """Write, prove and rename; the checkpoint's size, 0 where it was there already. All ranks call
    this alike; `may_commit` is asked right before the rename."""
    folder, group = step_folder(checkpoints, facts["step"]), world.storage
    if world.on_first(lambda: keeping.holds(folder, facts["step"]), group):
        return 0

    def stage() -> Path:
        keeping.make_room()
        staging = staging_of(folder)
        staging.mkdir(parents=True)
        return staging

    def write() -> WrittenFile:
        refuse_non_finite(slices, facts["step"])
        return write_slices(staging, slices, world.rank)

    def seal() -> Manifest:
        manifest = prove(staging, written, facts, model_signature(slices), world.world_size)
        fault("checkpoint.rename")
        may_commit()
        staging.rename(folder)
        storage.sync_folder(folder.parent)
        return manifest

    staging = world.on_first(stage, group)
    try:
        written = world.on_all(write, group)
        manifest = world.on_first(seal, group)
    except UserError:
        if world.is_first:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    world.on_first(keeping.retire, group)
    return manifest.size_bytes


def prove(
    staging: Path,
    written: list[WrittenFile],
    facts: dict[str, Any],
    signature: str,
    world_size: int,
) -> Manifest:
    """Write the index and, last, the manifest of what all ranks have written."""
    index = join_index([file.entries for file in written])
    storage.write_atomic(staging / INDEX, index.model_dump_json().encode())
    files = {
        file.name: FileRecord(size_bytes=file.size_bytes, sha256=file.sha256) for file in written
    }
    manifest = Manifest(
        **facts,
        world_size=world_size,
        model_signature=signature,
        versions=present_versions(),
        saved_at=datetime.now(UTC).isoformat(timespec="seconds"),
        files=files | {INDEX: record_file(staging / INDEX)},
    ).proved()
    if problems := wrong_sizes(staging, manifest):
        raise StorageError(
            f"{problems[0]} as rank 0 sees it; use a run folder that all nodes share."
        )
    fault("checkpoint.manifest")
    storage.write_atomic(staging / MANIFEST, manifest.model_dump_json(indent=1).encode())
    return manifest


def refuse_non_finite(slices: dict[str, Slice], step: int) -> None:
    """NumericError where a weight is not finite; such a state must never be kept."""
    for name, piece in slices.items():
        if name.startswith(WEIGHTS["raw"]) and not bool(piece.part.isfinite().all()):
            raise NumericError(
                f"{name.removeprefix(WEIGHTS['raw'])}: not finite after step {step}, so it is not "
                "saved; resume from the last checkpoint with a lower optimizer.learning_rate."
            )
