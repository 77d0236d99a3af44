"""Whether a checkpoint is, byte by byte, what was written."""

from pathlib import Path

from data_pipeline.errors import StorageError
from t2v.checkpoint.manifest import Manifest, read_manifest, wrong_digests, wrong_sizes
from t2v.engine.world import ALONE, World


def verify_checkpoint(folder: str | Path) -> Manifest:
    """The manifest of a checkpoint whose every byte is as it was written; else StorageError."""
    if problems := problems_of(Path(folder)):
        raise StorageError("\n".join(map(with_remedy, problems)))
    return read_manifest(Path(folder))


def with_remedy(problem: str) -> str:
    """A problem as a whole line, what to do at its end."""
    if problem.endswith("use another checkpoint."):
        return problem
    return f"{problem.removesuffix('.')}; use another checkpoint."


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
