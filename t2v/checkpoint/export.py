"""From a training checkpoint to plain weights that anyone can load, proved by using them.

An export is a folder of safetensors files (cut as on the hub where they are large), the resolved
recipe, and export.json: where the weights come from and the digest of every file. Tensors are
streamed one at a time, so a login node without a GPU is enough.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import is_dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils._pytree import tree_iter

from data_pipeline.errors import ConfigError, StorageError
from data_pipeline.latents.latents import Provenance as Autoencoder
from data_pipeline.store import storage
from data_pipeline.strict import Strict
from data_pipeline.text.embeddings import Provenance as TextEncoder
from t2v.checkpoint.compatibility import WEIGHTS, refuse_differences, weights_in
from t2v.checkpoint.manifest import FileRecord, Manifest, read_manifest, record_file
from t2v.checkpoint.power_average import power_average
from t2v.checkpoint.tensor_files import TensorKind, bytes_of, read_whole, safetensors_header
from t2v.methods.method import Method
from t2v.network.network import Network

EXPORT = "export.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GIB = 2**30


class Export(Strict):
    """What an exported folder holds and where it comes from."""

    format: Literal[1] = 1
    name: str
    step: int
    weights: Literal["ema", "raw"]
    ema_length: float | None = Field(
        default=None, description="relative length of the average, if it was made afterwards"
    )
    ema_error: float | None = Field(default=None, description="relative, of its profile")
    dtype: Literal["fp32", "bf16", "fp16"]
    parameters: int
    config: dict[str, Any]
    data_fingerprint: str
    text_encoder: TextEncoder | None
    latents: Autoencoder | None = None
    checkpoint_proof: str = Field(description="digest of the manifest of the source")
    self_test: str
    files: dict[str, FileRecord]


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    method: Method,
    *,
    weights: Literal["ema", "raw"] = "ema",
    ema_length: float | None = None,
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    file_gib: float = 5.0,
    self_test: bool = True,
) -> Export:
    """Write the export of a proved step folder; it appears at `out` when it is complete and right.
    With `ema_length` the weights are a power-function average of that relative length.

    The self-test runs the model of the checkpoint, rounded as the export is, and the model of the
    export on the same noise; their outputs must be equal bit for bit.
    """
    if os.path.lexists(out):
        raise ConfigError(f"{out}: is there already; choose another folder, or remove it.")
    manifest, error = read_manifest(checkpoint), None
    told = "averaged" if weights == "ema" else "raw"
    kinds, read = weights_in(checkpoint, weights), partial(_read, checkpoint, WEIGHTS[weights])
    if ema_length is not None:
        average = power_average(checkpoint, manifest, ema_length)
        read, error = average.read, average.error
        told = f"averaged (relative length {ema_length:g})"
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    staging.mkdir()
    try:
        _write_weights(staging, kinds, read, DTYPES[dtype], int(file_gib * GIB))
        _write_words(staging, method, manifest, told, dtype)
        if self_test:
            _refuse_other_outputs(checkpoint, staging, method, kinds, read, DTYPES[dtype])
        files = {path.name: record_file(path) for path in sorted(staging.iterdir())}
        export = Export(
            name=manifest.config["name"],
            step=manifest.step,
            weights=weights,
            ema_length=ema_length,
            ema_error=error,
            dtype=dtype,
            parameters=sum(prod(kind.shape) for kind in kinds.values()),
            config=manifest.config,
            data_fingerprint=manifest.data_fingerprint,
            text_encoder=manifest.text_encoder,
            latents=manifest.latents,
            checkpoint_proof=manifest.proof,
            self_test="outputs equal" if self_test else "not run",
            files=files,
        )
        storage.write_atomic(staging / EXPORT, export.model_dump_json(indent=1).encode())
        staging.rename(out)
        storage.sync_folder(out.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return export


def read_export(folder: Path) -> Export:
    """What an exported folder holds, its every byte proved; else StorageError."""
    path = folder / EXPORT
    try:
        export = Export.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError):
        raise StorageError(
            f"{path}: is wrong because it is missing or damaged; export again."
        ) from None
    for name, record in export.files.items():
        file = folder / name
        if Path(name).name != name or not file.is_file() or record_file(file) != record:
            raise StorageError(
                f"{file}: is wrong because it is not what was exported; do it again."
            )
    return export


def load_exported(folder: Path, model: Network) -> None:
    """Give a model an export's weights, in the model's own precision."""
    parameters = dict(model.named_parameters())
    found: dict[str, TensorKind] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    tensor = file.get_tensor(name)
                    found[name] = TensorKind(tuple(tensor.shape), torch.float32)
                    target = parameters.get(name)
                    if target is not None and target.shape == tensor.shape:
                        target.data.copy_(tensor)
        except SafetensorError as failure:
            raise StorageError(f"{path}: cannot be read because {failure}; export again.") from None
    expected = {n: TensorKind(tuple(p.shape), torch.float32) for n, p in parameters.items()}
    refuse_differences(folder, found, expected)


def _read(checkpoint: Path, prefix: str, name: str) -> Tensor:
    return read_whole(checkpoint, prefix + name)


def _write_weights(
    out: Path,
    kinds: dict[str, TensorKind],
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    file_bytes: int,
) -> None:
    """The weights in as many files as their size asks for, with the hub's index beside many."""
    sizes = {name: prod(kind.shape) * dtype.itemsize for name, kind in kinds.items()}
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > file_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    count = len(groups)
    place = {}
    for number, names in enumerate(groups, start=1):
        file = (
            f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
        )
        header, _ = safetensors_header(
            {name: TensorKind(kinds[name].shape, dtype) for name in names},
            __metadata__={"format": "pt"},
        )
        with (out / file).open("wb") as written:
            written.write(header)
            for name in names:
                written.write(bytes_of(read(name).to(dtype)))
            written.flush()
            os.fsync(written.fileno())
        place |= dict.fromkeys(names, file)
    if count > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": place}
        storage.write_atomic(out / "model.safetensors.index.json", json.dumps(index).encode())


def _write_words(out: Path, method: Method, manifest: Manifest, told: str, dtype: str) -> None:
    """The recipe and a card for whoever finds the folder."""
    recipe = yaml.safe_dump(manifest.config, sort_keys=False)
    storage.write_atomic(out / "config.yaml", recipe.encode())
    digest = hashlib.sha256(recipe.encode()).hexdigest()
    encoder = manifest.text_encoder.encoder if manifest.text_encoder else "none"
    space = f"; latents of: {manifest.latents.autoencoder}" if manifest.latents else ""
    clip = "x".join(str(size) for size in method.config.view.clip_size)
    card = f"""# {manifest.config["name"]}

{told.capitalize()} weights ({dtype}) of a {method.title}
for clips of {clip} (frames x height x width), after step {manifest.step}.

- conditioning: {method.conditioning.kind}; text encoder: {encoder}{space}
- recipe: config.yaml (sha256 {digest})
- data: fingerprint {manifest.data_fingerprint}
- source: checkpoint with proof {manifest.proof}

`t2v sample FOLDER --prompt ... --out DIR` makes videos of it. No quality has been measured by this
export.
"""
    storage.write_atomic(out / "README.md", card.encode())


def _refuse_other_outputs(
    checkpoint: Path,
    out: Path,
    method: Method,
    kinds: dict[str, TensorKind],
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
) -> None:
    """StorageError where the exported model does not do exactly what the checkpoint's does."""
    model = method.network()
    own = {name: TensorKind(tuple(p.shape), p.dtype) for name, p in model.named_parameters()}
    refuse_differences(checkpoint, kinds, own)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(read(name).to(dtype))
    wanted = _outputs(model, method)
    for parameter in model.parameters():
        parameter.data.zero_()
    load_exported(out, model)
    found = _outputs(model, method)
    if not all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True)):
        raise StorageError(f"{out}: computes something else than {checkpoint}; check the disk.")


@torch.no_grad()
def _outputs(model: Network, method: Method) -> list[Tensor]:
    """The network's answer to fixed noise."""
    generator = torch.Generator().manual_seed(0)

    def noisy(value: Any) -> Any:
        if isinstance(value, Tensor):
            is_float = value.is_floating_point()
            return torch.rand(value.shape, generator=generator) if is_float else value
        if isinstance(value, list):
            return [noisy(part) for part in value]
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{name: noisy(part) for name, part in vars(value).items()})
        return value

    inputs = {name: noisy(value) for name, value in method.inputs().items()}
    return [part for part in tree_iter(model(**inputs)) if isinstance(part, Tensor)]
