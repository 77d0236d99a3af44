"""Caption embeddings that others computed, out of the members of their shards, row for row."""

import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.shards.dataset import Dataset, open_dataset
from data_pipeline.shards.derived import Former, Row, begin, claim, fill
from data_pipeline.shards.scan import list_members, raise_fault
from data_pipeline.shards.tar import list_captions
from data_pipeline.store import storage
from data_pipeline.text.embeddings import (
    EMBEDDINGS,
    NULL,
    Embedding,
    EmbeddingSet,
    Provenance,
    open_embeddings,
    pack,
)
from data_pipeline.text.encoder import (
    WEIGHT_FILES,
    TextEncoder,
    fetch_encoder,
    layer_of,
    provenance_of,
    settings_of,
)

TYPES = (".npy", ".npz", ".safetensors")
MASKS = ("mask", "attention_mask")
UNREADABLE = (
    SafetensorError,
    ValueError,
    OSError,
    EOFError,
    KeyError,
    TypeError,
    BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class Origin:
    """Where embeddings of others are, and what they are said to be."""

    member: str  # the end of a member's name behind the key: "t5.npy"
    encoder: str | Path
    max_tokens: int
    folder: str | None = None  # of tars called as the dataset's; none: those themselves
    layer: int | None = None
    null: str | None = None  # a file with the embedding of the empty caption; none: encode it


def import_embeddings(
    dataset: str | Path, origin: Origin, *, name: str, task: tuple[int, int] = (0, 1)
) -> EmbeddingSet | None:
    """Write `embeddings/<name>` of a dataset from what others computed; the set is returned once
    every shard is there. What they say of the encoder is written down; `check` proves it."""
    data = open_dataset(dataset)
    if not origin.member.endswith(TYPES):
        raise ConfigError(
            f"import: value '{origin.member}' is wrong because it ends in none of "
            f"{', '.join(TYPES)}; name the end of a member behind its key, such as t5.npy."
        )
    folder = begin(EMBEDDINGS, data, name, task)
    if origin.null:
        null = parse_array(storage.read_bytes(origin.null), origin.null, origin.null)
        _refuse_long(null, origin.null, origin.max_tokens)
    else:
        reader = TextEncoder(origin.encoder, max_tokens=origin.max_tokens, layer=origin.layer)
        null = reader.encode([""])[0]
    files, width = fetch_encoder(str(origin.encoder)), null.shape[1]
    if not any(file for pattern in WEIGHT_FILES for file in files.glob(pattern)):
        raise ConfigError(
            f"{origin.encoder}: is no encoder because it holds no weights; give the folder or hub "
            "id of the one that made these embeddings."
        )
    layer = layer_of(settings_of(origin.encoder, files)[1], origin.layer)
    provenance = provenance_of(origin.encoder, files, origin.max_tokens, width, "declared", layer)
    claim(EMBEDDINGS, folder, provenance)
    storage.write_atomic(storage.join(folder, NULL), pack([null], [1.0]))
    rows = partial(_rows, data, origin, provenance)
    done = fill(EMBEDDINGS, data, folder, provenance, task=task, rows=rows)
    return open_embeddings(data, name) if done else None


def _rows(
    data: Dataset, origin: Origin, provenance: Provenance, shard: int, _: Former
) -> Iterator[Row]:
    file = f"{data.info.shards[shard].name}.tar"
    tar = storage.join(data.shard_folder, file)
    theirs = storage.join(origin.folder, file) if origin.folder else tar
    places = {
        member[: -len(origin.member) - 1]: (offset, size)
        for member, offset, size in list_members(theirs, raise_fault)
        if member.endswith(f".{origin.member}")
    }
    for key, captions in list_captions(tar, data.info.kind, data.info.captions):
        if key not in places or len(captions.texts) != 1:
            why = "has several captions" if key in places else f"has no member {origin.member}"
            raise DataError(f"{theirs}: '{key}' {why}, so that it has no embedding; embed it.")
        content = storage.read_range(theirs, *places[key])
        tokens = parse_array(content, f"{theirs}: '{key}'", origin.member)
        _refuse_long(tokens, f"{theirs}: '{key}'", origin.max_tokens)
        if tokens.shape[1] != provenance.width:
            raise DataError(
                f"{theirs}: '{key}' has an embedding of width {tokens.shape[1]}, and that of the "
                f"empty caption is of {provenance.width}; correct --null or --encoder."
            )
        content = pack([tokens], [1.0])
        yield key, {"safetensors": content, "txt": captions.origin.encode()}


def _refuse_long(tokens: Embedding, where: str, max_tokens: int) -> None:
    if len(tokens) > max_tokens:
        raise DataError(
            f"{where} has an embedding of {len(tokens)} tokens, not at most {max_tokens}; correct "
            "--max-tokens."
        )


def parse_array(content: bytes, where: str, name: str) -> Embedding:
    """The embedding in a file of numpy or safetensors: its only matrix, of the rows of a mask if
    there is one, without rows of zeros behind the last token."""
    try:
        if name.endswith(".safetensors"):
            arrays = load(content)
        else:
            loaded = np.load(io.BytesIO(content), allow_pickle=False)
            parts = {"tokens": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
            arrays = {key: torch.from_numpy(np.ascontiguousarray(a)) for key, a in parts.items()}
    except UNREADABLE as error:
        raise DataError(f"{where} is no {name} ({error}); correct it.") from None
    masks = [array.reshape(-1) != 0 for key, array in arrays.items() if key in MASKS]
    tensors = [array.squeeze(0) if array.ndim == 3 else array for key, array in arrays.items()
               if key not in MASKS]  # fmt: skip
    if len(tensors) != 1 or tensors[0].ndim != 2 or not tensors[0].is_floating_point():
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise DataError(f"{where} holds {shapes}, not one matrix of tokens by width; correct it.")
    tokens = tensors[0]
    if masks and len(masks[0]) == len(tokens):
        tokens = tokens[masks[0]]
    elif masks and int(masks[0].sum()) != len(tokens):  # else they are cut to the mask already
        raise DataError(
            f"{where} holds {len(tokens)} tokens, and a mask of {int(masks[0].sum())} of "
            f"{len(masks[0])}; correct it."
        )
    used = tokens.ne(0).any(1).nonzero()
    if not len(used) or not tokens.isfinite().all():
        raise DataError(f"{where} holds zeros only, or values that are not finite; correct it.")
    return tokens[: int(used[-1]) + 1].to(torch.bfloat16).contiguous()
