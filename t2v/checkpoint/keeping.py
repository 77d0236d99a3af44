"""Which steps are kept, and how others go; nothing about an old step can hurt a new one or a start.

What cannot be removed is named and passed over: a reader's `.nfs` file, another owner, a link.
"""

import os
import re
import shutil
import uuid
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.printable import say
from t2v.checkpoint.config import CheckpointConfig
from t2v.checkpoint.finding import CheckpointInfo, list_checkpoints, look_at
from t2v.checkpoint.manifest import MANIFEST, read_manifest
from t2v.checkpoint.mirror import Mirror
from t2v.engine.faults import fault

STAGING, REFUSED = ".staging-", "refused-"
# What is being written here or fetched from the mirror, and what is being retired.
STAGED = re.compile(rf"{re.escape(STAGING)}step-\d{{8,}}(-[0-9a-f]{{12}})?-[0-9a-f]{{32}}")
FEWEST = 2  # committed steps that are never given up for space


def staging_of(folder: Path) -> Path:
    """A new hidden name beside a step, for what is not yet one or no longer."""
    return folder.with_name(f"{STAGING}{folder.name}-{uuid.uuid4().hex}")


class Keeping:
    """The old steps of a run; rank 0 asks."""

    def __init__(self, folder: Path, config: CheckpointConfig, mirror: Mirror | None) -> None:
        self.folder, self.config, self.mirror = folder, config, mirror
        self._told: set[Path] = set()
        self._in_the_way: set[Path] = set()

    def clean(self) -> None:
        """Remove what earlier attempts left unfinished; only the owner of the run may call this."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for staging in self.folder.glob(f"{STAGING}*"):
            if STAGED.fullmatch(staging.name) and not staging.is_symlink():
                self._remove(staging)

    def retire(self) -> None:
        """Give up old steps after one was committed; the last ones, milestones and the one with
        the lowest held-out loss stay."""
        try:
            fault("checkpoint.retire")
            for info in self._spare()[: -self.config.keep_last]:
                self._give_up(info)
        except (OSError, UserError) as failure:
            self._tell(self.folder, f"old steps are not retired because {failure}")

    def make_room(self) -> None:
        """Give up old steps before one is written, as long as the disk lacks room for it and more
        than `FEWEST` are left."""
        spare = self._spare()
        for info in spare[:-FEWEST]:
            if shutil.disk_usage(self.folder).free >= spare[-1].size_bytes:
                return
            self._give_up(info)

    def holds(self, folder: Path, step: int) -> bool:
        """Whether a step is committed already; what stands in its place and is none goes aside."""
        if not os.path.lexists(folder):
            return False
        if folder not in self._in_the_way and look_at(folder, step).problem is None:
            return True
        self.set_aside(folder)
        return False

    def set_aside(self, *folders: Path) -> None:
        """Keep what was refused for whoever wants to look, under a name nothing reads; where it
        cannot be renamed it is refused again another time, and hurts no start."""
        for folder in folders:
            try:
                folder.rename(folder.with_name(f"{REFUSED}{folder.name}-{uuid.uuid4().hex[:8]}"))
            except OSError as failure:
                self._in_the_way.add(folder)
                self._tell(folder, f"cannot be set aside because {failure}; move it away by hand")

    def _spare(self) -> list[CheckpointInfo]:
        """Finished steps, oldest first, without those that are kept for what they are."""
        finished = [info for info in list_checkpoints(self.folder) if info.problem is None]
        losses = [info.held_out_loss for info in finished if info.held_out_loss is not None]
        every = self.config.milestone_every_steps
        newest = {info.step for info in finished[-self.config.keep_last :]}
        return [
            info
            for info in finished
            if info.step in newest
            or (
                not (every and info.step % every == 0)
                and not (info.held_out_loss is not None and info.held_out_loss == min(losses))
            )
        ]

    def _give_up(self, info: CheckpointInfo) -> None:
        """Remove a step that is all ours; what goes wrong is told, and touches no other step."""
        dying = staging_of(info.folder)
        try:
            if self._holds_strangers(info.folder):
                return
            # Renamed first: a deletion that is cut short leaves no half checkpoint.
            info.folder.rename(dying)
            if self.mirror is not None:
                self.mirror.retire(read_manifest(dying))
        except (OSError, UserError) as failure:
            self._tell(info.folder, f"not retired because {failure}")
        self._remove(dying)

    def _holds_strangers(self, folder: Path) -> bool:
        """Whether a step holds more than was saved, or is kept elsewhere by a link."""
        own = {MANIFEST, *read_manifest(folder).files}
        if folder.is_symlink():
            self._tell(folder, "not retired because it is a link")
        elif not own.issuperset(os.listdir(folder)):
            self._tell(folder, "not retired because it holds more than was saved")
        else:
            return False
        return True

    def _remove(self, folder: Path) -> None:
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            return
        except OSError as failure:
            self._tell(folder, f"cannot be removed because {failure}; remove it by hand")

    def _tell(self, path: Path, problem: str) -> None:
        """Once for each path."""
        if path not in self._told:
            self._told.add(path)
            say(f"{path}: {problem}")
