"""What must agree before a checkpoint goes into a model; nothing is cast, nothing is left out."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.errors import ConfigError
from t2v.checkpoint.manifest import Manifest, digest
from t2v.checkpoint.tensor_files import Slice, TensorKind, tensor_kinds

# Names in a checkpoint begin with these.
WEIGHTS = {"ema": "ema.", "raw": "model."}
# A run that goes on with one of these changed would not be the same run. Moments and averages stay
# what they are under all others; samples go on at their number.
FIXED = (
    *("seed", "ema_half_life_steps", "ema_lengths"),
    *("method", "conditioning"),
)


def average_prefix(length: float) -> str:
    """With what the names of a power-function average of a relative length begin."""
    return f"average-{length:g}."


def refuse_other_run(
    folder: Path,
    manifest: Manifest,
    facts: dict[str, Any],
    *,
    told: bool,
    sources: Sequence[str] = (),
) -> list[str]:
    """The settings that have changed since a checkpoint, `dotted.path: old -> new`; ConfigError
    where it is of another run. `told` accepts other datasets; `sources` says what becomes of each.
    """
    old, new = _trained(manifest.config), _trained(json.loads(json.dumps(facts["config"])))
    changed = [line for name in FIXED for line in changes(name, old.get(name), new.get(name))]
    before = (old.get("optimizer") or {}).get("name")
    changed += changes("optimizer.name", before, new["optimizer"]["name"])
    if changed:
        raise ConfigError(
            f"{folder}: is of another recipe because these differ; set them back, or begin a new "
            "run folder with warm_start.\n  " + "\n  ".join(changed)
        )
    if manifest.data_fingerprint != facts["data_fingerprint"] and not told:
        lines = [f"\n  {line}" for line in sources or ("their embeddings or latents are others",)]
        raise ConfigError(
            f"{folder}: was trained on other datasets than data.sources; name the old ones, or set "
            f"checkpoint.accept_data_change=true, and it goes on so:{''.join(lines)}"
        )
    return [
        line
        for name in new
        if name not in ("name", "run_dir", "data", *FIXED)
        for line in changes(name, old.get(name), new[name])
    ]


def refuse_differences(
    folder: Path, found: dict[str, TensorKind], expected: dict[str, TensorKind]
) -> None:
    """ConfigError with a table where names, shapes or dtypes are not exactly those expected."""
    rows = [
        (name, str(found.get(name, "missing")), str(expected.get(name, "not in this model")))
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]
    if not rows:
        return
    head = ("tensor", "checkpoint", "model")
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(3)]
    table = [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [head, *rows[:40]]
    ]
    table += [f"  and {len(rows) - 40} more"] if len(rows) > 40 else []
    raise ConfigError(
        f"{folder}: does not fit the model because {len(rows)} tensors differ; use the recipe it "
        "was trained with.\n" + "\n".join(table)
    )


def _trained(config: dict[str, Any]) -> dict[str, Any]:
    """A recipe without what sampling is told, which training does not follow."""
    method = {name: value for name, value in config["method"].items() if name != "sampling"}
    return config | {"method": method}


def kinds_of(slices: dict[str, Slice]) -> dict[str, TensorKind]:
    """Name -> shape and dtype of the whole tensor."""
    return {name: piece.kind for name, piece in slices.items()}


def weights_in(folder: Path, weights: str) -> dict[str, TensorKind]:
    """Name -> kind of a checkpoint's averaged or raw weights, without their prefix."""
    prefix, kinds = WEIGHTS[weights], tensor_kinds(folder)
    return {n.removeprefix(prefix): k for n, k in kinds.items() if n.startswith(prefix)}


def model_signature(slices: dict[str, Slice]) -> str:
    """Digest of the names, shapes and dtypes of the weights."""
    kinds = kinds_of({n: s for n, s in slices.items() if n.startswith(WEIGHTS["raw"])})
    return digest(json.dumps({name: str(kind) for name, kind in sorted(kinds.items())}))


def changes(path: str, old: Any, new: Any) -> list[str]:
    """`dotted.path: old -> new` of every setting that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = list(old | new)
        return [c for n in names for c in changes(f"{path}.{n}", old.get(n), new.get(n))]
    return [] if old == new else [f"{path}: {json.dumps(old)} -> {json.dumps(new)}"]
