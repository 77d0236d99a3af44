"""Checkpoints that are complete and right, or not checkpoints at all.

A thread copies a step in memory while training computes the gradients of the next, which change
none of it; only the update waits for the copy. The thread writes it into a staging folder, proves
it by a manifest that is written last, and renames it into place. Nothing is ever written into a
finished one.
"""

import shutil
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from data_pipeline.errors import NumericError, StorageError, UserError
from data_pipeline.store import storage
from t2v.attempt.faults import fault
from t2v.checkpoint.config import CheckpointConfig
from t2v.checkpoint.contract import WEIGHTS, model_signature
from t2v.checkpoint.finding import newest_valid, step_folder
from t2v.checkpoint.host_copy import HostCopy, gpus_of
from t2v.checkpoint.keeping import Keeping, staging_of
from t2v.checkpoint.manifest import (
    MANIFEST,
    FileRecord,
    Manifest,
    present_versions,
    record_file,
    wrong_sizes,
)
from t2v.checkpoint.mirror import Mirror
from t2v.checkpoint.tensor_files import INDEX, Slice, WrittenFile, join_index, write_slices
from t2v.engine.world import World

REFUSED = "refused-"
SETTLE_SECONDS = 60.0
GIB = 2**30


@dataclass(frozen=True)
class Saved:
    """What became of a save; `problem` is None where it was committed."""

    step: int
    seconds: float
    stall_seconds: float  # of these, those that training stood still
    size_bytes: int
    problem: str | None = None


class Checkpoints:
    """The checkpoints of one run; every method is called by all ranks alike.

    `may_commit` raises where this attempt no longer owns the run; it is asked before each rename.
    """

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        world: World,
        may_commit: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = run_dir / "checkpoints"
        self.config = config
        self.world = world
        self.may_commit = may_commit
        self.mirror = Mirror(config.mirror, world) if config.mirror else None
        self.failures_in_a_row = 0
        self._news: list[Saved] = []
        self._keeping = Keeping(self.folder, config, self.mirror)
        self._copy = HostCopy()
        self._copied = threading.Event()
        self._stall = 0.0
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None

    def clean(self) -> None:
        """Remove what earlier attempts left unfinished; only the owner of the run may call this."""

        self.world.on_first(self._keeping.clean, self.world.storage)

    def due(self, step: int) -> bool:
        """Whether a step is one to save."""
        return step % self.config.every_steps == 0

    def reserve(self, slices: dict[str, Slice]) -> None:
        """Claim the memory of the copy before training, so that no save waits for it."""
        self._copy.reserve(slices)

    def save(self, slices: dict[str, Slice], facts: dict[str, Any]) -> None:
        """Have the tensors of a step copied and written; they may not change before
        `wait_for_copy`. `facts` are the manifest's fields that only the run knows. What went wrong
        with the save before it is raised here, on all ranks."""
        started = time.perf_counter()
        self._join()
        finish_writes(slices)
        self._copied.clear()
        writer = threading.Thread(
            target=self._write, args=(slices, facts, started), name="checkpoint", daemon=True
        )
        self._stall = time.perf_counter() - started
        writer.start()
        self._writer = writer
        if not self.config.asynchronous:
            self._join()

    def wait_for_copy(self) -> None:
        """Until the tensors of the last save may change."""
        if self._writer is not None:
            started = time.perf_counter()
            self._copied.wait()
            self._stall += time.perf_counter() - started

    def finish(self) -> None:
        """Wait for the save under way; StorageError where the last one was not committed."""
        self._join()
        if self.failures_in_a_row:
            raise StorageError(self._news_of_failure())

    def settle(self) -> None:
        """Let a save under way come to its end where a run ends on an error of its own."""
        if self._writer is not None:
            self._writer.join(SETTLE_SECONDS)

    def news(self) -> list[Saved]:
        """What became of saves since the last call."""
        news, self._news = self._news, []
        return news

    def newest(self) -> tuple[Path, Manifest] | None:
        """The newest valid checkpoint, here or in the mirror; why newer ones are refused is
        printed, and they are moved aside. None where there is none at all; StorageError where there
        are only refused ones."""
        if self.mirror is not None:
            self.mirror.restore_newer(self.folder)
        try:
            found = newest_valid(self.folder, self.world)
        except StorageError:
            if self.mirror is None or not self.mirror.restore_newer(self.folder, than=-1):
                raise
            found = newest_valid(self.folder, self.world)
        if found is None:
            return None
        (folder, manifest), refused = found
        # What is damaged here may be sound there.
        if refused and self.mirror and self.mirror.restore_newer(self.folder, than=manifest.step):
            return self.newest()
        self.world.on_first(lambda: [_set_aside(path) for path in refused], self.world.storage)
        return folder, manifest

    def _join(self) -> None:
        """Wait for the writer; its failure is everyone's, for all ranks agreed on it."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        failure, self._failure = self._failure, None
        if failure is None:
            return
        if not isinstance(failure, StorageError):
            raise failure
        if self.failures_in_a_row >= self.config.max_failures_in_a_row:
            raise StorageError(f"{failure} ({self.failures_in_a_row} saves in a row failed)")

    def _write(self, slices: dict[str, Slice], facts: dict[str, Any], started: float) -> None:
        """Copy a step and commit it; runs beside training, on a group of its own."""
        size_bytes, problem = 0, None
        try:
            size_bytes = self._commit(self._copy_of(slices), facts)
            self.failures_in_a_row = 0
        except BaseException as failure:
            self._failure, problem = failure, str(failure) or repr(failure)
            self.failures_in_a_row += isinstance(failure, StorageError)
        seconds = time.perf_counter() - started
        stall = self._stall if self.config.asynchronous else seconds
        self._news.append(Saved(facts["step"], seconds, stall, size_bytes, problem))
        if problem is None and self.mirror is not None:
            self.mirror.copy(step_folder(self.folder, facts["step"]))

    def _copy_of(self, slices: dict[str, Slice]) -> dict[str, Slice]:
        """What this rank writes, in memory of its own; the tensors are free to change."""
        copied: dict[str, Slice] = {}

        def copy() -> None:
            try:
                fault("checkpoint.copy")
                copied.update(self._copy.take(slices))
            finally:
                self._copied.set()

        self.world.on_all(copy, self.world.storage)
        return copied

    def _commit(self, slices: dict[str, Slice], facts: dict[str, Any]) -> int:
        """Write, prove and rename; the checkpoint's size."""
        folder, group = step_folder(self.folder, facts["step"]), self.world.storage
        if self.world.on_first(folder.exists, group):
            return 0
        staging = self.world.on_first(lambda: self._stage(folder), group)
        try:

            def write() -> WrittenFile:
                refuse_non_finite(slices, facts["step"])
                return write_slices(staging, slices, self.world.rank)

            written = self.world.on_all(write, group)
            manifest = self.world.on_first(
                lambda: self._seal(staging, folder, written, slices, facts), group
            )
        except UserError:
            if self.world.is_first:
                shutil.rmtree(staging, ignore_errors=True)
            raise
        self.world.on_first(self._keeping.retire, group)
        return manifest.size_bytes

    def _stage(self, folder: Path) -> Path:
        self._keeping.make_room()
        staging = staging_of(folder)
        staging.mkdir(parents=True)
        return staging

    def _seal(
        self,
        staging: Path,
        folder: Path,
        written: list[WrittenFile],
        slices: dict[str, Slice],
        facts: dict[str, Any],
    ) -> Manifest:
        """Write index and manifest, and make the folder a checkpoint."""
        index = join_index([file.entries for file in written])
        storage.write_atomic(staging / INDEX, index.model_dump_json().encode())
        files = {
            file.name: FileRecord(size_bytes=file.size_bytes, sha256=file.sha256)
            for file in written
        }
        manifest = Manifest(
            **facts,
            world_size=self.world.world_size,
            model_signature=model_signature(slices),
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
        fault("checkpoint.rename")
        self.may_commit()
        staging.rename(folder)
        storage.sync_folder(folder.parent)
        return manifest

    def _news_of_failure(self) -> str:
        problems = [saved.problem for saved in self._news if saved.problem]
        return problems[-1] if problems else f"{self.folder}: the last save failed; see the log."


def finish_writes(slices: dict[str, Slice]) -> None:
    """Wait until what a GPU has been told to write into tensors is there."""
    for device in gpus_of(slices):
        torch.cuda.synchronize(device)


def refuse_non_finite(slices: dict[str, Slice], step: int) -> None:
    """NumericError where a weight is not finite; such a state must never be kept."""
    for name, piece in slices.items():
        if name.startswith(WEIGHTS["raw"]) and not bool(piece.part.isfinite().all()):
            raise NumericError(
                f"{name.removeprefix(WEIGHTS['raw'])}: not finite after step {step}, so it is not "
                "saved; resume from the last checkpoint with a lower optimizer.learning_rate."
            )


def _set_aside(folder: Path) -> None:
    """Keep a refused checkpoint for whoever wants to look, under a name nothing reads."""
    folder.rename(folder.with_name(f"{REFUSED}{folder.name}-{uuid.uuid4().hex[:8]}"))
