"""A second home of every committed checkpoint in an object store, for a node whose disk is bare."""

import uuid
from pathlib import Path

from data_pipeline import storage
from data_pipeline.errors import UserError
from t2v.engine.world import World
from t2v.train.finding import STEP_FOLDER, list_checkpoints
from t2v.train.manifest import MANIFEST, Manifest, read_manifest


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
                print(f"mirror: step not copied because {failure}", flush=True)

    def restore_newer(self, folder: Path) -> None:
        """Fetch the newest mirrored step into `folder` if there is no step as new there."""

        def newest() -> str | None:
            steps = self._steps()
            here = [info.step for info in list_checkpoints(folder) if info.problem is None]
            newer = [step for step in steps if step > max(here, default=-1)]
            return steps[max(newer)] if newer else None

        group = self.world.storage
        name = self.world.on_first(newest, group)
        if name is None:
            return
        staging = self.world.on_first(lambda: self._stage(folder, name), group)
        self.world.on_all(lambda: self._get_files(name, staging), group)
        self.world.on_first(lambda: self._settle(staging, folder / name), group)
        if self.world.is_first:
            print(f"restored {folder / name} from {self.prefix}/{name}", flush=True)

    def retire(self, name: str) -> None:
        """Delete a step, its manifest first; what fails is left for a lifecycle rule."""
        try:
            for file in sorted(self._names(name), key=lambda file: file != MANIFEST):
                storage.remove(storage.join(self.prefix, name, file))
        except UserError as failure:
            print(f"mirror: {name} not deleted because {failure}", flush=True)

    def _steps(self) -> dict[int, str]:
        """Step -> name of every mirrored folder that has a manifest."""
        steps = {}
        for name in storage.list_folders(self.prefix):
            match = STEP_FOLDER.fullmatch(name)
            if match and storage.exists(storage.join(self.prefix, name, MANIFEST)):
                steps[int(match[1])] = name
        return steps

    def _names(self, name: str) -> list[str]:
        return storage.list_files(storage.join(self.prefix, name))

    def _mine(self, manifest: Manifest) -> list[str]:
        """The files that this rank moves."""
        return sorted(manifest.files)[self.world.rank :: self.world.world_size]

    def _put_files(self, folder: Path) -> None:
        for name in self._mine(read_manifest(folder)):
            storage.copy_to(folder / name, storage.join(self.prefix, folder.name, name))

    def _put_manifest(self, folder: Path) -> None:
        target = storage.join(self.prefix, folder.name, MANIFEST)
        storage.create(target, (folder / MANIFEST).read_bytes())

    def _stage(self, folder: Path, name: str) -> Path:
        staging = folder / f".staging-{name}-{uuid.uuid4().hex}"
        staging.mkdir(parents=True)
        content = storage.read_bytes(storage.join(self.prefix, name, MANIFEST))
        (staging / MANIFEST).write_bytes(content)
        return staging

    def _get_files(self, name: str, staging: Path) -> None:
        for file in self._mine(read_manifest(staging)):
            storage.copy_from(storage.join(self.prefix, name, file), staging / file)

    def _settle(self, staging: Path, folder: Path) -> None:
        if folder.exists():
            # Of the same step, but not valid: list_checkpoints would have counted it.
            folder.rename(folder.with_name(f"refused-{folder.name}-{uuid.uuid4().hex[:8]}"))
        staging.rename(folder)
        storage.sync_folder(folder.parent)
