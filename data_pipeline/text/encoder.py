"""Text encoders of transformers, read token by token: T5 and its kin, BERT and its kin, CLIP's text
half, and decoders at a hidden layer."""

import os
import shutil
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, cast

import torch
from jaxtyping import BFloat16
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    CLIPTextModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as DECODERS,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES as ENCODERS,
)
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from data_pipeline.errors import ConfigError
from data_pipeline.host_memory import available_memory
from data_pipeline.store.hub import digest_files, fetch_model, reason_of, refuse_partial
from data_pipeline.text.embeddings import ComputeDtype, Provenance

# transformers loads DeepSpeed where there is one, which warns of a machine without a GPU.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
VOCABULARIES = ("spiece.model", "tokenizer.json", "tokenizer.model", "*.bpe.model", "vocab.*")
TOKENIZER_FILES = (*VOCABULARIES, "merges.txt", "tokenizer_config.json")
BUCKET_TOKENS = 16
CAPTIONS_PER_BATCH = 32
RECENT_BYTES = 256 << 20


class TextEncoder:
    """A text encoder and its tokenizer, from a local folder or a hub id.

    What is read is the last output, normalised as the network does; of hidden layer `layer`, if one
    is named, its plain output (transformers' `hidden_states[layer]`: 0 is the words alone).
    A caption's embedding does not depend on its neighbours: batches have one fixed number of rows,
    and a row's padded length follows from its own length. An encoder too large for the GPU, or for
    `memory_gib` of main memory, is spread by accelerate over GPUs, main memory and disk.
    """

    def __init__(
        self,
        encoder: str | Path,
        *,
        max_tokens: int,
        layer: int | None = None,
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
        self._recent: dict[str, Tensor] = {}
        folder = fetch_encoder(str(encoder))
        kind, config = settings_of(encoder, folder)
        self.layer = layer_of(config, layer)
        with _refusing(encoder):
            placement = _placement(self.device, memory_gib)
            tokenizer, model = _load(kind, folder, dtype=self.dtype, **placement)
        self.tokenizer = cast(PreTrainedTokenizerBase, tokenizer)
        self.model = cast(torch.nn.Module, model).eval()
        if (longest := _longest(model, config)) is not None and max_tokens > longest:
            raise ConfigError(
                f"max_tokens: {max_tokens} is wrong because {encoder} reads at most {longest}; "
                "lower it."
            )
        marks = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        self._nothing = [next(mark for mark in marks if mark is not None)]
        with _refusing(encoder):  # the empty caption is asked for anyway, and is kept
            self.width = self.encode([""])[0].shape[1]
        compute_dtype = "bfloat16" if self.dtype == torch.bfloat16 else "float32"
        self.provenance = provenance_of(
            encoder, folder, max_tokens, self.width, compute_dtype, self.layer
        )

    def encode(self, captions: Sequence[str]) -> list[BFloat16[Tensor, "tokens width"]]:
        """Embeddings of the captions at their true lengths, equal for equal captions."""
        distinct = list(dict.fromkeys(normalise(caption) for caption in captions))
        embeddings = {text: self._recent[text] for text in distinct if text in self._recent}
        cut = partial(self.tokenizer, truncation=True, max_length=self.max_tokens)
        tokens = {
            text: cut(text)["input_ids"] or self._nothing
            for text in distinct
            if text not in embeddings
        }
        for group in self._batches(tokens):
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

    def _batches(self, tokens: dict[str, list[int]]) -> Iterator[list[str]]:
        """Captions of one padded length together, at most a batch of them."""
        buckets: dict[int, list[str]] = {}
        for caption, ids in tokens.items():
            buckets.setdefault(self._padded(len(ids)), []).append(caption)
        for _, captions in sorted(buckets.items()):
            for at in range(0, len(captions), CAPTIONS_PER_BATCH):
                yield captions[at : at + CAPTIONS_PER_BATCH]

    def _padded(self, length: int) -> int:
        return min(-(-length // BUCKET_TOKENS) * BUCKET_TOKENS, self.max_tokens)

    @torch.inference_mode()
    def _encode_batch(self, rows: list[list[int]]) -> list[Tensor]:
        length = self._padded(len(rows[0]))
        # Masked, so that any token pads; but some kinds count positions by it.
        padding = self.tokenizer.pad_token_id
        ids = torch.full(
            (CAPTIONS_PER_BATCH, length), self._nothing[0] if padding is None else padding
        )
        mask = torch.zeros(CAPTIONS_PER_BATCH, length, dtype=torch.long)
        for row in range(CAPTIONS_PER_BATCH):
            values = rows[min(row, len(rows) - 1)]
            ids[row, : len(values)] = torch.tensor(values)
            mask[row, : len(values)] = 1
        output = self.model(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            output_hidden_states=self.layer is not None,
        )
        hidden = (
            output.last_hidden_state if self.layer is None else output.hidden_states[self.layer]
        )
        hidden = hidden.to("cpu", torch.bfloat16)
        return [hidden[row, : len(values)].clone() for row, values in enumerate(rows)]


def normalise(caption: str) -> str:
    """What the encoder is given of a caption: white space as single spaces."""
    return " ".join(caption.split())


def fetch_encoder(encoder: str) -> Path:
    """The local folder of an encoder, downloaded if it is a hub id."""
    return fetch_model(encoder, ["*.json", *TOKENIZER_FILES, *WEIGHT_FILES], what="encoder")


def provenance_of(
    encoder: str | Path,
    folder: Path,
    max_tokens: int,
    width: int,
    compute_dtype: ComputeDtype,
    layer: int | None,
) -> Provenance:
    """What embeddings of an encoder, whose files are in a folder, are a function of."""
    is_local = Path(encoder).is_dir()
    return Provenance(
        encoder=Path(encoder).resolve().name if is_local else str(encoder),
        weights_sha256=digest_files(folder, WEIGHT_FILES),
        tokenizer_sha256=digest_files(folder, TOKENIZER_FILES),
        layer=layer,
        max_tokens=max_tokens,
        width=width,
        dtype="bfloat16",
        compute_dtype=compute_dtype,
        caption_normalisation="single spaces",
    )


def settings_of(encoder: str | Path, folder: Path) -> tuple[Any, Any]:
    """(what loads the network of an encoder, its settings)."""
    with _refusing(encoder):
        whole = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return _kind_of(whole), whole.get_text_config()


def layer_of(config: Any, layer: int | None) -> int | None:
    """A hidden layer of an encoder, counted from the words on."""
    count = int(config.num_hidden_layers)
    if layer is None and config.model_type in DECODERS and config.model_type not in ENCODERS:
        raise ConfigError(
            f"layer: missing because {config.model_type} is a decoder, whose last output is made "
            f"for the next word; name a hidden layer, 0 to {count}, such as {max(count - 2, 1)}."
        )
    if layer is not None and not -count - 1 <= layer <= count:
        raise ConfigError(
            f"layer: {layer} is wrong because the encoder has {count}; give 0 to {count}, or "
            f"{-count - 1} to -1 from the end."
        )
    return layer if layer is None else layer % (count + 1)


@contextmanager
def _refusing(encoder: str | Path) -> Iterator[None]:
    """ConfigError for whatever a stranger's files make transformers raise."""
    try:
        yield
    except Exception as error:
        raise ConfigError(
            f"{encoder}: is no text encoder because {reason_of(error)}; give a folder or hub id of "
            "one."
        ) from None


def _load(kind: Any, folder: Path, **how: Any) -> tuple[Any, Any]:
    """(tokenizer, network) with all of its weights; ValueError for what is none."""
    disable_progress_bar()
    set_verbosity_error()  # it reports on weights in many lines, with names of others
    tokenizer = _tokenizer_of(folder)
    offloaded = mkdtemp(prefix="t2v-encoder-")
    try:
        model, loading = kind.from_pretrained(
            folder,
            offload_folder=offloaded,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **how,
        )
        weakref.finalize(model, shutil.rmtree, offloaded, ignore_errors=True)
    except BaseException:
        shutil.rmtree(offloaded, ignore_errors=True)
        raise
    refuse_partial(loading, model)
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(f"its tokenizer knows {len(tokenizer)} tokens and its weights {rows}")
    return tokenizer, model


def _tokenizer_of(folder: Path) -> Any:
    """The tokenizer; without a vocabulary transformers would make up an empty one."""
    settings = folder / "tokenizer_config.json"
    of_bytes = settings.is_file() and "ByT5" in settings.read_text("utf-8", errors="replace")
    if not of_bytes and not any(file for name in VOCABULARIES for file in folder.glob(name)):
        raise ValueError(f"it has no vocabulary ({', '.join(VOCABULARIES[:3])}, ...)")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError("its tokenizer marks neither beginning nor end, so nothing can be encoded")
    return tokenizer


def _kind_of(config: Any) -> Any:
    kind = config.model_type
    if kind == "clip":
        return CLIPTextModel
    if kind in ENCODERS:
        return AutoModelForTextEncoding
    if kind in DECODERS and not config.is_encoder_decoder:
        return AutoModel
    raise ValueError(f"its kind '{kind}' is none that reads text alone, or is unknown")


def _longest(model: Any, config: Any) -> int | None:
    """How many tokens a network has positions for; some kinds keep the first ones for padding."""
    limit = getattr(config, "max_position_embeddings", None)
    kept = [
        table.padding_idx + 1
        for name, table in model.named_modules()
        if name.endswith("position_embeddings") and getattr(table, "padding_idx", None) is not None
    ]
    return limit - max(kept, default=0) if isinstance(limit, int) and limit > 0 else None


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
