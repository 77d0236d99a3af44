"""Which checkpoints there are, and which of them are right."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.table import Table
from torch import nn

from data_pipeline.errors import InputMissing, StorageError
from data_pipeline.printable import say
from data_pipeline.terminal import Terminal
from t2v.checkpoint.compatibility import WEIGHTS, kinds_of, refuse_differences
from t2v.checkpoint.manifest import MANIFEST, Manifest, read_manifest, wrong_sizes
from t2v.checkpoint.proving import problems_of, with_remedy
from t2v.checkpoint.tensor_files import read_slices, tensor_kinds, whole
from t2v.engine.world import ALONE, World

STEP_FOLDER = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class CheckpointInfo:
    """One line of a list of checkpoints; `problem` is None where its manifest and sizes agree."""

    folder: Path
    step: int
    size_bytes: int
    saved_at: str
    held_out_loss: float | None
    problem: str | None


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
        if match is not None:
            infos.append(look_at(path, int(match[1])))
    return sorted(infos, key=lambda info: info.step)


def look_at(folder: Path, step: int) -> CheckpointInfo:
    """What a folder says of the step that it is named after; reads no data."""
    try:
        manifest = read_manifest(folder)
    except StorageError as failure:
        return CheckpointInfo(folder, step, 0, "", None, str(failure))
    problem = "; ".join(wrong_sizes(folder, manifest)) or None
    if manifest.step != step:
        problem = f"{folder}: its manifest is of step {manifest.step}"
    return CheckpointInfo(
        folder, step, manifest.size_bytes, manifest.saved_at, manifest.held_out_loss, problem
    )


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
            say(f"checkpoint refused: {'; '.join(problems)}")
    if refused:
        reason = next(iter(refused.values()))
        raise StorageError(
            f"{folder}: none of its {len(refused)} checkpoints is valid, the newest because: "
            f"{reason.removesuffix('.')}; restore one, or begin a new run folder."
        )
    return None


def resolve_checkpoint(path: str | Path, world: World = ALONE) -> Path:
    """The checkpoint that a step folder is, or the newest valid one of a run folder."""
    folder = Path(path)
    if not folder.is_dir():
        raise InputMissing(f"{path}: no such checkpoint; give a step folder or a run folder.")
    if STEP_FOLDER.fullmatch(folder.name) or (folder / MANIFEST).exists():
        if problems := problems_of(folder, world):
            raise StorageError(with_remedy(problems[0]))
        return folder
    found = newest_valid(folder, world)
    if found is None:
        raise InputMissing(f"{path}: holds no checkpoint; give a step folder or a run folder.")
    return found[0][0]


def step_of(path: str | Path) -> Path:
    """The step folder that a path is, or the newest of a run folder, right or not."""
    folder = Path(path)
    if not folder.is_dir():
        raise InputMissing(f"{path}: no such checkpoint; give a step folder or a run folder.")
    if STEP_FOLDER.fullmatch(folder.name) or (folder / MANIFEST).exists():
        return folder
    infos = list_checkpoints(folder)
    if not infos:
        raise InputMissing(f"{path}: holds no checkpoint; give a step folder or a run folder.")
    return infos[-1].folder


def print_checkpoints(infos: list[CheckpointInfo]) -> None:
    """A table of steps, sizes and states."""
    table = Table("step", "size", "saved", "held-out loss", "state")
    for info in infos:
        size = f"{info.size_bytes / 2**30:.3f} GiB"
        loss = "" if info.held_out_loss is None else f"{info.held_out_loss:.5f}"
        state = "refused" if info.problem else "committed"
        table.add_row(str(info.step), size, info.saved_at, loss, state)
    Terminal().print(table)
    for info in infos:
        if info.problem:
            say(info.problem)


def load_weights(
    checkpoint: Path, model: nn.Module, *, weights: Literal["ema", "raw"] = "ema"
) -> None:
    """Give an unsharded model a checkpoint's averaged or raw weights; needs no process group."""
    prefix = WEIGHTS[weights]
    slices = {prefix + name: whole(value.detach()) for name, value in model.named_parameters()}
    kinds = {n: k for n, k in tensor_kinds(checkpoint).items() if n.startswith(prefix)}
    refuse_differences(checkpoint, kinds, kinds_of(slices))
    read_slices(checkpoint, slices)
