"""Checkpoints that are complete and right, or not checkpoints at all.

A thread copies a step in memory while training computes the gradients of the next, which change
none of it; only the update waits for the copy. The thread writes it into a staging folder, proves
it by a manifest that is written last, and renames it into place. Nothing is ever written into a
finished one.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline.errors import StorageError
from t2v.checkpoint.config import CheckpointConfig
from t2v.checkpoint.finding import newest_valid, step_folder
from t2v.checkpoint.host_copy import HostCopy, gpus_of
from t2v.checkpoint.keeping import Keeping
from t2v.checkpoint.manifest import Manifest
from t2v.checkpoint.mirror import Mirror
from t2v.checkpoint.tensor_files import Slice
from t2v.checkpoint.writing import commit
from t2v.engine.world import World

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
        self.failures_in_a_row, self._problem, self._news = 0, "", list[Saved]()
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
            raise StorageError(self._problem)

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
        found = newest_anywhere(self.folder, self.mirror, self.world)
        if found is None:
            return None
        newest, refused = found
        self.world.on_first(lambda: self._keeping.set_aside(*refused), self.world.storage)
        return newest

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
            copied = self._copy.on_all(slices, self.world, self._copied)
            size_bytes = commit(
                self.folder, copied, facts, self.world, self._keeping, self.may_commit
            )
            self.failures_in_a_row = 0
        except BaseException as failure:
            self._failure, problem = failure, str(failure) or repr(failure)
            self._problem = problem
            self.failures_in_a_row += isinstance(failure, StorageError)
        seconds = time.perf_counter() - started
        stall = self._stall if self.config.asynchronous else seconds
        self._news.append(Saved(facts["step"], seconds, stall, size_bytes, problem))
        if problem is None and self.mirror is not None:
            self.mirror.copy(step_folder(self.folder, facts["step"]))


def newest_anywhere(
    folder: Path, mirror: Mirror | None, world: World
) -> tuple[tuple[Path, Manifest], list[Path]] | None:
    """((step folder, manifest) of the newest valid step, the newer ones that are not), after a look
    into the mirror for what is not here, or damaged here."""
    if mirror is None:
        return newest_valid(folder, world)
    mirror.restore_newer(folder)
    try:
        found = newest_valid(folder, world)
    except StorageError:
        if not mirror.restore_newer(folder, than=-1):
            raise
        found = newest_valid(folder, world)
    if found is not None and found[1] and mirror.restore_newer(folder, than=found[0][1].step):
        return newest_anywhere(folder, mirror, world)
    return found


def finish_writes(slices: dict[str, Slice]) -> None:
    """Wait until what a GPU has been told to write into tensors is there."""
    for device in gpus_of(slices):
        torch.cuda.synchronize(device)
