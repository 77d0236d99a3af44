"""The manifest: what a finished checkpoint holds, and the proof that it still does."""

import hashlib
import json
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError

from data_pipeline.errors import StorageError
from data_pipeline.feeding.mixture import Mixture
from data_pipeline.latents.latents import Provenance as Autoencoder
from data_pipeline.strict import Strict
from data_pipeline.text.embeddings import Provenance as TextEncoder

MANIFEST = "manifest.json"


class FileRecord(Strict):
    """Proof of a file."""

    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(Strict):
    """A folder is a checkpoint if it has a manifest whose files are all there and right."""

    format: Literal[3] = 3
    step: int = Field(ge=0)
    samples: int = Field(ge=0, description="read so far; the next step begins at this number")
    updates: int = Field(
        ge=0, description="optimizer steps; steps without finite gradients are none"
    )
    engine: str
    world_size: int = Field(ge=1)
    config: dict[str, Any] = Field(description="the resolved recipe")
    data_fingerprint: str
    mixture: Mixture = Field(description="what is read, and since when")
    text_encoder: TextEncoder | None = Field(description="what made the captions' embeddings")
    latents: Autoencoder | None = Field(default=None, description="what made the clips' latents")
    model_signature: str = Field(description="digest of the model's names, shapes and dtypes")
    versions: dict[str, str]
    saved_at: str = Field(description="ISO 8601, UTC")
    attempt: int = Field(default=0, ge=0, description="at this run; a later one fences it off")
    held_out_loss: float | None = Field(default=None, description="at this step, if it was taken")
    files: dict[str, FileRecord]
    proof: str = Field(default="", description="sha256 of all the other fields")

    @property
    def size_bytes(self) -> int:
        return sum(record.size_bytes for record in self.files.values())

    def proved(self) -> "Manifest":
        """This manifest with its own proof."""
        return self.model_copy(update={"proof": self._own_digest()})

    @property
    def is_proved(self) -> bool:
        """Whether every field is as it was written."""
        return self.proof == self._own_digest()

    def _own_digest(self) -> str:
        fields = self.model_dump(mode="json", exclude={"proof"})
        return digest(json.dumps(fields, sort_keys=True))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder; StorageError says why it is none."""
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        manifest = Manifest.model_validate_json(text)
    except OSError:
        raise StorageError(
            f"{folder}: is no checkpoint because {MANIFEST} is missing; it was never finished."
        ) from None
    except (ValidationError, UnicodeDecodeError):
        raise StorageError(f"{path}: is wrong because {_fault(path)}.") from None
    if not manifest.is_proved:
        raise StorageError(
            f"{path}: is wrong because its fields have changed since it was written; use another "
            "checkpoint."
        )
    for name in manifest.files:
        if Path(name).name != name:
            raise StorageError(f"{path}: names {name!r}, outside its folder; do not trust it.")
    return manifest


def wrong_sizes(folder: Path, manifest: Manifest) -> list[str]:
    """Files that are missing or of another size; quick."""
    problems = []
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif (size := path.stat().st_size) != record.size_bytes:
            problems.append(f"{path}: {size} bytes instead of {record.size_bytes}")
    return problems


def wrong_digests(folder: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Those of the named files whose bytes are not the ones written; reads them all."""
    problems = []
    for name in names:
        try:
            if file_digest(folder / name) != manifest.files[name].sha256:
                problems.append(f"{folder / name}: its bytes have changed since it was written")
        except OSError as failure:
            problems.append(f"{folder / name}: cannot be read ({failure.strerror})")
    return problems


def record_file(path: Path) -> FileRecord:
    """The proof of a file as it is now."""
    return FileRecord(size_bytes=path.stat().st_size, sha256=file_digest(path))


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(config: dict[str, Any]) -> str:
    """Digest of a resolved recipe."""
    return digest(json.dumps(config, sort_keys=True))


def digest(text: str) -> str:
    """sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def present_versions() -> dict[str, str]:
    """Versions that may matter when a checkpoint is read years later."""
    return {
        "t2v": version("t2v"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def _fault(path: Path) -> str:
    """Why a manifest cannot be read, and what to do."""
    try:
        if json.loads(path.read_bytes())["format"] in (1, 2):
            return "it was written by an earlier t2v; read it with the code of that time"
    except (ValueError, TypeError, KeyError, OSError):
        pass
    return "it is damaged or of another format; use another checkpoint"
