"""Checkpoints that are complete and right, or not checkpoints at all.

A step is written into a staging folder, proved by a manifest that is written last, and renamed into
place. Nothing is ever written into a finished one.
"""

import re
import shutil
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from data_pipeline import storage
from data_pipeline.errors import InputMissing, StorageError
from data_pipeline.strict import Strict
from t2v.engine.world import ALONE, World
from t2v.train.contract import WEIGHTS, kinds_of, model_signature, refuse_differences
from t2v.train.manifest import (
    MANIFEST,
    Manifest,
    present_versions,
    read_manifest,
    record_file,
    wrong_digests,
    wrong_sizes,
)
from t2v.train.tensor_files import INDEX, read_tensors, tensor_kinds, write_tensors

STEP_FOLDER = re.compile(r"step-(\d{8,})")
STAGING = ".staging-"
REFUSED = "refused-"


class CheckpointConfig(Strict):
    """How often a run is saved and how much of it is kept."""

    every_steps: int = Field(ge=1)
    keep_last: int = Field(default=3, ge=2, description="newest checkpoints kept")
    milestone_every_steps: int = Field(default=0, ge=0, description="kept for ever; 0: none")
    accept_data_change: bool = Field(
        default=False, description="resume although the datasets are not those of the checkpoint"
    )


@dataclass(frozen=True)
class CheckpointInfo:
    """One line of a list of checkpoints; `problem` is None where its manifest and sizes agree."""

    folder: Path
    step: int
    size_bytes: int
    saved_at: str
    problem: str | None


class Checkpoints:
    """The checkpoints of one run; every method is called by all ranks alike."""

    def __init__(self, run_dir: Path, config: CheckpointConfig, world: World) -> None:
        self.folder = run_dir / "checkpoints"
        self.config = config
        self.world = world

    def clean(self) -> None:
        """Remove what earlier attempts left unfinished; only the owner of the run may call this."""

        def remove() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            for staging in self.folder.glob(f"{STAGING}*"):
                shutil.rmtree(staging)

        self.world.on_first(remove, self.world.storage)

    def due(self, step: int) -> bool:
        """Whether a step is one to save."""
        return step % self.config.every_steps == 0

    def save(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Path:
        """Commit the tensors and facts of a step; on return it is durable on every rank's word.

        `facts` are the manifest's fields that only the run knows.
        """
        folder = step_folder(self.folder, facts["step"])
        group = self.world.storage
        if self.world.on_first(folder.exists, group):
            return folder
        staging = self.world.on_first(lambda: self._stage(folder), group)
        try:
            write_tensors(staging, tensors, self.world)
            records = self.world.on_all(lambda: self._prove(staging), group)
            files = {name: record for part in records for name, record in part.items()}
            manifest = Manifest(
                **facts,
                world_size=self.world.world_size,
                model_signature=model_signature(tensors),
                versions=present_versions(),
                saved_at=datetime.now(UTC).isoformat(timespec="seconds"),
                files=files,
            )
            self.world.on_first(lambda: self._commit(staging, folder, manifest), group)
        except StorageError:
            if self.world.is_first:
                shutil.rmtree(staging, ignore_errors=True)
            raise
        self.world.on_first(self._retire, group)
        return folder

    def newest(self) -> tuple[Path, Manifest] | None:
        """The newest valid checkpoint; why newer ones are refused is printed, and they are moved
        aside. None where there is none at all; StorageError where there are only refused ones."""
        found = newest_valid(self.folder, self.world)
        if found is None:
            return None
        (folder, manifest), refused = found
        self.world.on_first(lambda: [_set_aside(path) for path in refused], self.world.storage)
        return folder, manifest

    def _stage(self, folder: Path) -> Path:
        staging = folder.with_name(f"{STAGING}{folder.name}-{uuid.uuid4().hex}")
        staging.mkdir(parents=True)
        return staging

    def _prove(self, staging: Path) -> dict[str, Any]:
        """Records of the files this rank wrote."""
        mine = list(staging.glob(f"__{self.world.rank}_*"))
        if self.world.is_first:
            mine.append(staging / INDEX)
        return {path.name: record_file(path) for path in mine}

    def _commit(self, staging: Path, folder: Path, manifest: Manifest) -> None:
        if problems := wrong_sizes(staging, manifest):
            raise StorageError(
                f"{problems[0]} as rank 0 sees it; use a run folder that all nodes share."
            )
        text = manifest.model_dump_json(indent=1)
        storage.write_atomic(staging / MANIFEST, text.encode())
        staging.rename(folder)
        storage.sync_folder(folder.parent)

    def _retire(self) -> None:
        """Delete old checkpoints; only finished ones count, and milestones stay."""
        every = self.config.milestone_every_steps
        finished = [info for info in list_checkpoints(self.folder) if info.problem is None]
        for info in finished[: -self.config.keep_last]:
            if not every or info.step % every:
                # Renamed first: a deletion that is cut short leaves no half checkpoint.
                dying = info.folder.with_name(f"{STAGING}{info.folder.name}-retired")
                info.folder.rename(dying)
                shutil.rmtree(dying)


def step_folder(folder: Path, step: int) -> Path:
    """Where a step is kept."""
    return folder / f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[CheckpointInfo]:
    """All step folders of a checkpoints folder, or of a run folder, oldest first; reads no data."""
    if (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    infos = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = STEP_FOLDER.fullmatch(path.name)
        if match is None:
            continue
        step, size_bytes, saved_at = int(match[1]), 0, ""
        try:
            manifest = read_manifest(path)
            size_bytes, saved_at = manifest.size_bytes, manifest.saved_at
            problem = "; ".join(wrong_sizes(path, manifest)) or None
            if manifest.step != step:
                problem = f"{path}: its manifest is of step {manifest.step}"
        except StorageError as failure:
            problem = str(failure)
        infos.append(CheckpointInfo(path, step, size_bytes, saved_at, problem))
    return sorted(infos, key=lambda info: info.step)


def verify_checkpoint(folder: str | Path) -> Manifest:
    """The manifest of a checkpoint whose every byte is as it was written; else StorageError."""
    if problems := problems_of(Path(folder)):
        raise StorageError("\n".join(problems) + "; use another checkpoint.")
    return read_manifest(Path(folder))


def problems_of(folder: Path, world: World = ALONE) -> list[str]:
    """All that is wrong with a checkpoint, its every byte read; ranks share the reading."""

    def problems() -> list[str]:
        try:
            manifest = read_manifest(folder)
        except StorageError as failure:
            return [str(failure)]
        if wrong := wrong_sizes(folder, manifest):
            return wrong
        names = sorted(manifest.files)[world.rank :: world.world_size]
        return wrong_digests(folder, manifest, names)

    found = world.on_all(problems, world.storage)
    return list(dict.fromkeys(problem for part in found for problem in part))


def newest_valid(
    folder: Path, world: World = ALONE
) -> tuple[tuple[Path, Manifest], list[Path]] | None:
    """((folder, manifest) of the newest valid checkpoint, newer refused ones); None without any."""
    infos = world.on_first(lambda: list_checkpoints(folder), world.storage)
    refused: dict[Path, str] = {}
    for info in reversed(infos):
        problems = [info.problem] if info.problem else problems_of(info.folder, world)
        if not problems:
            return (info.folder, read_manifest(info.folder)), list(refused)
        refused[info.folder] = problems[0]
        if world.is_first:
            print(f"checkpoint refused: {'; '.join(problems)}", flush=True)
    if refused:
        reason = next(iter(refused.values()))
        raise StorageError(
            f"{folder}: none of its {len(refused)} checkpoints is valid, the newest because: "
            f"{reason}; restore one, or begin a new run folder."
        )
    return None


def resolve_checkpoint(path: str | Path, world: World = ALONE) -> Path:
    """The checkpoint that a step folder is, or the newest valid one of a run folder."""
    folder = Path(path)
    if not folder.is_dir():
        raise InputMissing(f"{path}: no such checkpoint; give a step folder or a run folder.")
    if STEP_FOLDER.fullmatch(folder.name) or (folder / MANIFEST).exists():
        if problems := problems_of(folder, world):
            raise StorageError(f"{problems[0]}; use another checkpoint.")
        return folder
    found = newest_valid(folder, world)
    if found is None:
        raise InputMissing(f"{path}: holds no checkpoint; give a step folder or a run folder.")
    return found[0][0]


def print_checkpoints(infos: list[CheckpointInfo]) -> None:
    """A table of steps, sizes and states."""
    table = Table("step", "size", "saved", "state")
    for info in infos:
        size = f"{info.size_bytes / 2**30:.3f} GiB"
        table.add_row(str(info.step), size, info.saved_at, info.problem or "committed")
    Console().print(table)


def load_weights(
    checkpoint: Path, model: nn.Module, *, weights: Literal["ema", "raw"] = "ema"
) -> None:
    """Give an unsharded model a checkpoint's averaged or raw weights; needs no process group."""
    prefix = WEIGHTS[weights]
    tensors = {prefix + name: value.detach() for name, value in model.named_parameters()}
    kinds = {n: k for n, k in tensor_kinds(checkpoint).items() if n.startswith(prefix)}
    refuse_differences(checkpoint, kinds, kinds_of(tensors))
    read_tensors(checkpoint, tensors)


def _set_aside(folder: Path) -> None:
    """Keep a refused checkpoint for whoever wants to look, under a name nothing reads."""
    folder.rename(folder.with_name(f"{REFUSED}{folder.name}-{uuid.uuid4().hex[:8]}"))
