"""Containers that jobs run in: their image, and which folders of the site they see."""

import re
from pathlib import PurePosixPath
from posixpath import normpath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from cluster.names import DNS_NAME, Folder, refuse_unprintable
from data_pipeline.strict import Strict

# Where pods have volumes of our own; cluster/pod.py mounts them.
OWN_MOUNTS = ("/etc/t2v", "/tmp", "/cache", "/dev/shm")
# Where the image has the program; the Dockerfile says so.
PROGRAM_FOLDERS = ("/opt/t2v", "/app")
IMAGE_FOLDERS = (
    *PROGRAM_FOLDERS,
    *("/bin", "/dev", "/etc", "/lib", "/lib64", "/proc", "/sbin", "/sys", "/usr"),
)


def _refuse_unprintable(given: list[str], info: ValidationInfo) -> list[str]:
    for text in given:
        refuse_unprintable(str(info.field_name), text)
    return given


Printable = Annotated[list[str], AfterValidator(_refuse_unprintable)]


class Apptainer(Strict):
    """Run inside an image file, or inside an image of a registry."""

    kind: Literal["apptainer"]
    image: str = Field(pattern=r"^(/[^\x00-\x1f\x7f]+\.sif|docker://[^\x00-\x20\x7f]+)$")
    binds: Printable = Field(default=[], description="what is mounted, as apptainer writes it")

    @field_validator("image")
    @classmethod
    def _refuse_moving_tags(cls, image: str) -> str:
        if image.startswith("docker://") and not re.search(r"@sha256:[0-9a-f]{64}$", image):
            raise ValueError(f"{image!r} may be another image tomorrow; end it with @sha256:...")
        return image


class Pyxis(Strict):
    """Run inside an image by SLURM's pyxis plugin (enroot)."""

    kind: Literal["pyxis"]
    image: str = Field(
        pattern=r"^(/[^\x00-\x1f\x7f]+\.sqsh|[^\x00-\x20\x7f]+@sha256:[0-9a-f]{64})$",
        description="a .sqsh file, which always works; or name@sha256:..., which needs an enroot "
        "that knows digests: older ones take the name before the @ for a user's",
    )
    mounts: Printable = Field(default=[], description="what is mounted, as pyxis writes it")


class Mount(Strict):
    """A PersistentVolumeClaim and where it is seen."""

    claim: str = Field(pattern=DNS_NAME)
    path: Folder
    read_only: bool = False


def refuse_unmounted(workdir: str, mounts: dict[str, bool]) -> None:
    """ValueError for a workdir that no mount holds or a read-only one."""
    here = _plain_path(workdir)
    holding = [path for path in mounts if here.is_relative_to(_plain_path(path))]
    if not holding:
        raise ValueError(
            f"workdir: {workdir!r} is wrong because it is on none of the mounts {list(mounts)} and "
            "ends with its container; choose a folder on one"
        )
    if mounts[max(holding, key=lambda path: len(_plain_path(path).parts))]:
        raise ValueError(
            f"workdir: {workdir!r} is wrong because its mount is read-only, and runs write there; "
            "choose another"
        )


def refuse_hiding(mounts: list[Mount]) -> None:
    """ValueError for mounts of pods over each other, our volumes, or what the image holds."""
    paths = [_plain_path(mount.path) for mount in mounts]
    if len(set(paths)) != len(paths):
        raise ValueError(f"mounts: {list(map(str, paths))} has a path twice; give each its own")
    for path in paths:
        if str(path) in OWN_MOUNTS:
            raise ValueError(
                f"mounts: '{path}' is wrong because pods have a volume of ours there; choose "
                "another"
            )
        inside = any(path.is_relative_to(folder) for folder in PROGRAM_FOLDERS)
        if inside or any(PurePosixPath(folder).is_relative_to(path) for folder in IMAGE_FOLDERS):
            raise ValueError(
                f"mounts: '{path}' is wrong because it hides what the image has there; choose "
                "another"
            )


def mounted(container: Apptainer | Pyxis) -> dict[str, bool]:
    """Folders inside that are the site's, of `SRC[:DST[:FLAGS]],...`, and whether they are
    read-only."""
    found, given = {}, container.binds if isinstance(container, Apptainer) else container.mounts
    for mount in ",".join(given).split(","):
        source, destination, flags, *_ = [*mount.split(":"), "", ""]
        if source.startswith("/"):  # else one more flag of the mount before
            found[destination or source] = "ro" in flags.split("+")
    return found


def _plain_path(path: str) -> PurePosixPath:
    """A path without what does not change where it leads: `//`, `.`, `..` and a last `/`."""
    return PurePosixPath("/", normpath(path).lstrip("/"))
