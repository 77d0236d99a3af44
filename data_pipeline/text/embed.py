"""Making caption embeddings: a T5 encoder's output, cached beside a dataset, row for row."""

import io
import os
import shutil
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, cast

import sentencepiece
import torch
from jaxtyping import BFloat16
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5Config, T5EncoderModel
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from data_pipeline.errors import ConfigError
from data_pipeline.host_memory import available_memory
from data_pipeline.shards.dataset import open_dataset
from data_pipeline.shards.derived import Former, Row, begin, claim, fill
from data_pipeline.shards.tar import digest64, list_captions
from data_pipeline.store import storage
from data_pipeline.store.hub import digest_files, fetch_model, refuse_partial
from data_pipeline.text.embeddings import (
    EMBEDDINGS,
    NULL,
    ComputeDtype,
    EmbeddingSet,
    Provenance,
    open_embeddings,
    pack,
)

# transformers loads DeepSpeed where there is one, which warns of a machine without a GPU.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
TOKENIZER_FILES = ("spiece.model", "tokenizer.json", "tokenizer_config.json")
BUCKET_TOKENS = 16
CAPTIONS_PER_BATCH = 32
RECENT_BYTES = 256 << 20


class TextEncoder:
    """A T5 encoder and its tokenizer, from a local folder or a hub id.

    A caption's embedding does not depend on its neighbours: batches have one fixed number of rows,
    and a row's padded length follows from its own length. An encoder too large for the GPU, or for
    `memory_gib` of main memory, is spread by accelerate over GPUs, main memory and disk.
    """

    def __init__(
        self,
        encoder: str | Path,
        *,
        max_tokens: int,
        device: str | None = None,
        memory_gib: float | None = None,
    ):
        if max_tokens < 1:
            raise ConfigError(
                f"max_tokens: {max_tokens} is wrong because it leaves no token; use 128."
            )
        self.max_tokens = max_tokens
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        offloaded = mkdtemp(prefix="t2v-encoder-")
        weakref.finalize(self, shutil.rmtree, offloaded, ignore_errors=True)
        self._recent: dict[str, Tensor] = {}
        disable_progress_bar()
        set_verbosity_error()  # it reports on weights in many lines, with names of others
        folder = fetch_encoder(str(encoder))
        try:
            if not any((folder / name).is_file() for name in TOKENIZER_FILES[:2]):
                raise ValueError(f"it has neither {' nor '.join(TOKENIZER_FILES[:2])}")
            tokenizer = AutoTokenizer.from_pretrained(folder)
            loaded: Any = T5EncoderModel.from_pretrained(
                folder,
                dtype=self.dtype,
                offload_folder=offloaded,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **_placement(self.device, memory_gib),
            )
            model, loading = loaded
            # A decoder is none of ours. umT5 has the names of T5, and biases in every block.
            refuse_partial(loading, ours="encoder.")
            _refuse_tokenizer(tokenizer, model)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise ConfigError(
                f"{encoder}: is no T5 encoder because {reason}; give a folder or hub id of one."
            ) from None
        self.tokenizer = cast(PreTrainedTokenizerBase, tokenizer)
        self.model = cast(torch.nn.Module, model).eval()
        self.width = int(model.config.d_model)
        compute_dtype = "bfloat16" if self.dtype == torch.bfloat16 else "float32"
        self.provenance = provenance_of(encoder, folder, max_tokens, self.width, compute_dtype)

    def encode(self, captions: Sequence[str]) -> list[BFloat16[Tensor, "tokens width"]]:
        """Embeddings of the captions at their true lengths, equal for equal captions."""
        distinct = list(dict.fromkeys(normalise(caption) for caption in captions))
        embeddings = {text: self._recent[text] for text in distinct if text in self._recent}
        cut = partial(self.tokenizer, truncation=True, max_length=self.max_tokens)
        tokens = {text: cut(text)["input_ids"] for text in distinct if text not in embeddings}
        for group in _batches(tokens):
            rows = [tokens[caption] for caption in group]
            embeddings |= zip(group, self._encode_batch(rows), strict=True)
        self._remember(embeddings)
        return [embeddings[normalise(caption)] for caption in captions]

    def too_long(self, captions: Sequence[str]) -> list[str]:
        """Those captions of which only the first `max_tokens` are read."""
        return [
            caption
            for caption in captions
            if len(self.tokenizer(normalise(caption))["input_ids"]) > self.max_tokens
        ]

    def _remember(self, embeddings: dict[str, Tensor]) -> None:
        """Keep the latest, so that captions which many shards share are encoded once."""
        self._recent |= embeddings
        excess = sum(e.nbytes for e in self._recent.values()) - RECENT_BYTES
        for caption in list(self._recent):
            if excess <= 0:
                return
            excess -= self._recent.pop(caption).nbytes

    @torch.inference_mode()
    def _encode_batch(self, rows: list[list[int]]) -> list[Tensor]:
        length = _padded_length(len(rows[0]))
        ids = torch.full((CAPTIONS_PER_BATCH, length), self.tokenizer.pad_token_id)
        mask = torch.zeros(CAPTIONS_PER_BATCH, length, dtype=torch.long)
        for row in range(CAPTIONS_PER_BATCH):
            values = rows[min(row, len(rows) - 1)]
            ids[row, : len(values)] = torch.tensor(values)
            mask[row, : len(values)] = 1
        output = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device))
        hidden = output.last_hidden_state.to("cpu", torch.bfloat16)
        return [hidden[row, : len(values)].clone() for row, values in enumerate(rows)]


def embed(
    dataset: str | Path,
    encoder: str | Path,
    *,
    name: str,
    max_tokens: int = 128,
    task: tuple[int, int] = (0, 1),
    device: str | None = None,
    memory_gib: float | None = None,
) -> EmbeddingSet | None:
    """Write `embeddings/<name>` of a dataset; the set is returned once every shard is there.

    Shards already embedded by the same encoder are kept, so it can be killed and started again,
    and tasks (number, count) may run side by side. Of shards that changed, only captions that are
    new are encoded.
    """
    data = open_dataset(dataset)
    folder = begin(EMBEDDINGS, data, name, task)
    reader = TextEncoder(encoder, max_tokens=max_tokens, device=device, memory_gib=memory_gib)
    claim(EMBEDDINGS, folder, reader.provenance)
    null = pack(reader.encode([""]), [1.0])
    storage.write_atomic(storage.join(folder, NULL), null)

    def rows(shard: int, former: Former) -> Iterator[Row]:
        tar = storage.join(data.shard_folder, f"{data.info.shards[shard].name}.tar")
        listed = list_captions(tar, data.info.kind, data.info.captions)
        known = {c.origin: former.read(digest64(c.origin)) for _, c in listed}
        new = [text for _, c in listed if known[c.origin] is None for text in c.texts]
        encoded = dict(zip(new, reader.encode(new), strict=True))
        for key, captions in listed:
            if members := known[captions.origin]:
                content = members["media"]
            else:
                content = pack([encoded[text] for text in captions.texts], captions.weights)
            yield key, {"safetensors": content, "txt": captions.origin.encode()}

    done = fill(EMBEDDINGS, data, folder, reader.provenance, task=task, rows=rows)
    return open_embeddings(data, name) if done else None


def make_tiny_encoder(
    folder: str | Path, captions: Sequence[str], *, width: int, seed: int
) -> None:
    """A stand-in for rehearsals: a sentencepiece model of the captions' words, and a T5 encoder of
    two layers with random weights. It tells captions apart and knows nothing."""
    folder = Path(folder)
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_writer=buffer,
        model_type="word",
        vocab_size=32000,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    storage.write_atomic(folder / "spiece.model", buffer.getvalue())
    words = sentencepiece.SentencePieceProcessor(model_proto=buffer.getvalue())
    config = T5Config(
        vocab_size=words.get_piece_size() + 100,  # and the tokenizer's 100 sentinels
        d_model=width,
        d_kv=max(width // 4, 1),
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = T5EncoderModel(config)
    disable_progress_bar()
    model.save_pretrained(folder)


def normalise(caption: str) -> str:
    """What the encoder is given of a caption: white space as single spaces."""
    return " ".join(caption.split())


def fetch_encoder(encoder: str) -> Path:
    """The local folder of an encoder, downloaded if it is a hub id."""
    return fetch_model(encoder, ["*.json", "spiece.model", *WEIGHT_FILES], what="encoder")


def provenance_of(
    encoder: str | Path, folder: Path, max_tokens: int, width: int, compute_dtype: ComputeDtype
) -> Provenance:
    """What embeddings of an encoder, whose files are in a folder, are a function of."""
    is_local = Path(encoder).is_dir()
    return Provenance(
        encoder=Path(encoder).resolve().name if is_local else str(encoder),
        weights_sha256=digest_files(folder, WEIGHT_FILES),
        tokenizer_sha256=digest_files(folder, TOKENIZER_FILES),
        max_tokens=max_tokens,
        width=width,
        dtype="bfloat16",
        compute_dtype=compute_dtype,
        caption_normalisation="single spaces",
    )


def _placement(device: torch.device, memory_gib: float | None) -> dict[str, Any]:
    """Where `from_pretrained` puts the weights."""
    budget = {} if memory_gib is None else {"cpu": int(memory_gib * 2**30)}
    if device.type == "cuda":
        if device.index is None:
            return {"device_map": "auto", **({"max_memory": budget} if budget else {})}
        free, _ = torch.cuda.mem_get_info(device)
        budget.setdefault("cpu", available_memory())
        return {"device_map": "auto", "max_memory": {device.index: int(0.9 * free), **budget}}
    return {"device_map": "auto", "max_memory": budget} if budget else {"device_map": str(device)}


def _refuse_tokenizer(tokenizer: Any, model: Any) -> None:
    """ValueError unless a tokenizer is one of the model's."""
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(f"its tokenizer knows {len(tokenizer)} tokens and its weights {rows}")
    if tokenizer.pad_token_id is None or not tokenizer("")["input_ids"]:
        raise ValueError("its tokenizer has no padding, or no end mark")


def _batches(tokens: dict[str, list[int]]) -> Iterator[list[str]]:
    """Captions of one padded length together, at most a batch of them."""
    buckets: dict[int, list[str]] = {}
    for caption, ids in tokens.items():
        buckets.setdefault(_padded_length(len(ids)), []).append(caption)
    for _, captions in sorted(buckets.items()):
        for at in range(0, len(captions), CAPTIONS_PER_BATCH):
            yield captions[at : at + CAPTIONS_PER_BATCH]


def _padded_length(length: int) -> int:
    return -(-length // BUCKET_TOKENS) * BUCKET_TOKENS
