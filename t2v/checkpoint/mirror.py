"""A second home of every committed checkpoint in an object store, for a node whose disk is bare.

A step lies there as `step-00001000-<first digits of its manifest's proof>`: no name is ever used
for two contents, and nothing that was finished is written again.
"""

import re
import uuid
from pathlib import Path

from data_pipeline.errors import StorageError, UserError
from data_pipeline.printable import say
from data_pipeline.store import storage
from t2v.checkpoint.finding import list_checkpoints, step_folder
from t2v.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from t2v.checkpoint.proving import problems_of
from t2v.engine.world import World

HOME = re.compile(r"step-(\d{8,})-[0-9a-f]{12}")


class Mirror:
    """Copies of finished checkpoints below a prefix; there, too, the manifest is written last."""

    def __init__(self, prefix: str, world: World) -> None:
        self.prefix = prefix.rstrip("/")
        self.world = world
        self.problem: str | None = None

    def copy(self, folder: Path) -> None:
        """Copy a committed step, files shared out over ranks; a failure is noted, not raised: the
        step is safe where it is."""
        try:
            self.world.on_all(lambda: self._put_files(folder), self.world.storage)
            self.world.on_first(lambda: self._put_manifest(folder), self.world.storage)
            self.problem = None
        except UserError as failure:
            self.problem = str(failure)
            if self.world.is_first:
                say(f"mirror: {folder.name} is not copied because {failure}")

    def restore_newer(self, folder: Path, than: int | None = None) -> bool:
        """Fetch the newest sound step of the mirror into `folder`, if it is newer `than` a step,
        or than all that look sound there; whether there was one."""

        def newer() -> list[tuple[int, str]]:
            here = [info.step for info in list_checkpoints(folder) if info.problem is None]
            newest = max(here, default=-1) if than is None else than
            return [home for home in self._homes() if home[0] > newest]

        group = self.world.storage
        for step, home in reversed(self.world.on_first(newer, group)):
            staging = self.world.on_first(lambda home=home: self._stage(folder, home), group)
            self.world.on_all(lambda home=home, to=staging: self._get_files(home, to), group)
            if problems := problems_of(staging, self.world):
                if self.world.is_first:
                    say(f"mirror: {home} is refused because {problems[0]}")
                continue
            target = step_folder(folder, step)
            self.world.on_first(lambda a=staging, b=target: _settle(a, b), group)
            if self.world.is_first:
                say(f"restored {target} from {self.prefix}/{home}")
            return True
        return False

    def retire(self, manifest: Manifest) -> None:
        """Delete a step, its manifest first; what fails is left for a lifecycle rule."""
        home = self._home(manifest)
        try:
            for name in (MANIFEST, *manifest.files):
                storage.remove(storage.join(home, name))
        except UserError as failure:
            say(f"mirror: {home} is not deleted because {failure}")

    def _home(self, manifest: Manifest) -> str:
        return storage.join(self.prefix, f"step-{manifest.step:08d}-{manifest.proof[:12]}")

    def _homes(self) -> list[tuple[int, str]]:
        """(step, name) of every finished copy, in order of steps."""
        matches = [HOME.fullmatch(name) for name in storage.list_folders(self.prefix)]
        return sorted(
            (int(match[1]), match[0])
            for match in matches
            if match and storage.exists(storage.join(self.prefix, match[0], MANIFEST))
        )

    def _mine(self, manifest: Manifest) -> list[str]:
        """The files that this rank moves."""
        return sorted(manifest.files)[self.world.rank :: self.world.world_size]

    def _put_files(self, folder: Path) -> None:
        manifest = read_manifest(folder)
        for name in self._mine(manifest):
            storage.copy_to(folder / name, storage.join(self._home(manifest), name))

    def _put_manifest(self, folder: Path) -> None:
        target = storage.join(self._home(read_manifest(folder)), MANIFEST)
        storage.create(target, (folder / MANIFEST).read_bytes())

    def _stage(self, folder: Path, home: str) -> Path:
        staging = folder / f".staging-{home}-{uuid.uuid4().hex}"
        staging.mkdir(parents=True)
        content = storage.read_bytes(storage.join(self.prefix, home, MANIFEST))
        (staging / MANIFEST).write_bytes(content)
        return staging

    def _get_files(self, home: str, staging: Path) -> None:
        try:
            manifest = read_manifest(staging)
        except StorageError:
            return  # told by whoever looks for problems next
        for name in self._mine(manifest):
            storage.copy_from(storage.join(self.prefix, home, name), staging / name)


def _settle(staging: Path, target: Path) -> None:
    if target.exists():
        # Of the same step, but not valid, or it would have been found.
        target.rename(target.with_name(f"refused-{target.name}-{uuid.uuid4().hex[:8]}"))
    staging.rename(target)
    storage.sync_folder(target.parent)
