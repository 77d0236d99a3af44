"""Making caption embeddings: a text encoder's output, cached beside a dataset, row for row."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece
import torch
from transformers import T5Config, T5EncoderModel
from transformers.utils.logging import disable_progress_bar

from data_pipeline.shards.dataset import open_dataset
from data_pipeline.shards.derived import Former, Row, begin, claim, fill
from data_pipeline.shards.tar import digest64, list_captions
from data_pipeline.store import storage
from data_pipeline.text.embeddings import EMBEDDINGS, NULL, EmbeddingSet, open_embeddings, pack
from data_pipeline.text.encoder import TextEncoder


def embed(
    dataset: str | Path,
    encoder: str | Path,
    *,
    name: str,
    max_tokens: int = 128,
    layer: int | None = None,
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
    reader = TextEncoder(
        encoder, max_tokens=max_tokens, layer=layer, device=device, memory_gib=memory_gib
    )
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
