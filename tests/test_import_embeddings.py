"""Embeddings of others: taken row for row, proved by the encoder they are said to be of."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numbered import numbered_video
from safetensors.torch import save
from test_foreign_shards import pack

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.making.indexing import index
from data_pipeline.making.verify import verify
from data_pipeline.text.audit import check
from data_pipeline.text.embeddings import open_embeddings
from data_pipeline.text.encoder import TextEncoder
from data_pipeline.text.imported import Origin, import_embeddings, parse_array
from t2v.cli import main

CAPTIONS = ["a red circle", "a blue square moving left", "a green star"]
VIDEO = numbered_video(2)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz(save=np.savez, **arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    save(buffer, **arrays)
    return buffer.getvalue()


def damaged(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


@pytest.fixture
def reader(datasets) -> TextEncoder:
    return TextEncoder(datasets / "encoder", max_tokens=16)


@pytest.fixture
def own(reader, tmp_path) -> Path:
    """Shards as their maker keeps them: padded embeddings beside each video."""
    members = {}
    for number, tokens in enumerate(reader.encode(CAPTIONS)):
        padded = np.zeros((1, 16, tokens.shape[1]), np.float16)
        padded[0, : len(tokens)] = tokens.float().numpy()
        members |= {f"v.{number}.mp4": VIDEO, f"v.{number}.txt": CAPTIONS[number].encode(),
                    f"v.{number}.t5.npy": npy(padded)}  # fmt: skip
    pack(tmp_path / "own" / "0.tar", members)
    index(tmp_path / "own")
    return tmp_path / "own"


def test_a_webdataset_with_own_embeddings_comes_in_and_is_proved(own, datasets, reader, capsys):
    command = ["data", "embed", str(own), "--encoder", str(datasets / "encoder"), "--name", "t5",
               "--max-tokens", "16"]  # fmt: skip
    assert main([*command, "--import", "t5.npy"]) == 0
    assert main([*command, "--check", "10"]) == 0
    assert "3 encoded again, all equal" in capsys.readouterr().out
    found = open_embeddings(index(own), "t5")
    for row, expected in enumerate(reader.encode(CAPTIONS)):
        assert found.read(0, row).shape == expected.shape
        assert torch.allclose(found.read(0, row).float(), expected.float(), atol=0.01)
    assert found.null.equal(reader.encode([""])[0])
    assert found.info.provenance.compute_dtype == "declared"
    assert not verify(own)


def test_embeddings_that_are_not_what_they_are_said_to_be_are_found(
    own, datasets, tmp_path, reader
):
    wrong = {f"v.{n}.t5.npy": npy(np.ones((4, reader.width), np.float32)) for n in range(3)}
    pack(tmp_path / "theirs" / "0.tar", wrong)
    (tmp_path / "null.npy").write_bytes(npy(np.ones((1, reader.width), np.float32)))
    origin = Origin("t5.npy", datasets / "encoder", 16, folder=str(tmp_path / "theirs"),
                    null=str(tmp_path / "null.npy"))  # fmt: skip
    assert import_embeddings(own, origin, name="t5") is not None
    with pytest.raises(DataError, match=r"differs by .* from what the encoder says"):
        check(own, reader, name="t5", count=3)
    middle = import_embeddings(own, replace(origin, layer=-2), name="middle")
    assert middle is not None
    assert middle.info.provenance.layer == 1
    with pytest.raises(ConfigError, match="layer: 3 is wrong because the encoder has 2"):
        import_embeddings(own, replace(origin, layer=3), name="none")


@pytest.mark.parametrize(
    ("member", "tokens", "message"),
    [
        ("clip.npy", 16, "'v.0' has no member clip.npy"),
        ("t5.npy", 2, r"'v.0' has an embedding of .* tokens, not at most 2"),
    ],
)
def test_what_cannot_be_imported_is_told(own, datasets, member, tokens, message):
    with pytest.raises(DataError, match=message):
        import_embeddings(own, Origin(member, datasets / "encoder", tokens), name="t5")
    (own / "null.npy").write_bytes(npy(np.ones((3, 9))))
    for encoder, most, why in (
        (own, 16, "is no encoder because it holds no weights"),
        (datasets / "encoder", 16, "of width 8, and that of the empty caption is of 9"),
        (datasets / "encoder", 2, "null.npy has an embedding of 3 tokens, not at most 2"),
    ):
        origin = Origin("t5.npy", encoder, most, null=str(own / "null.npy"))
        with pytest.raises((ConfigError, DataError), match=why):
            import_embeddings(own, origin, name=f"of {most}")
    with pytest.raises(ConfigError, match=r"ends in none of .npy"):
        import_embeddings(own, Origin("t5.pt", datasets / "encoder", 16), name="t5")


def test_arrays_are_read_as_numpy_and_safetensors_keep_them():
    tokens = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    expected = torch.from_numpy(tokens).to(torch.bfloat16)
    padded, mask = np.vstack([tokens, tokens]), np.array([1, 1, 1, 0, 0, 0])
    for content, name in (
        (npy(tokens), "a.npy"), (npy(np.vstack([tokens, np.zeros((2, 4))])), "a.npy"),
        (npz(emb=padded, attention_mask=mask), "a.npz"), (npz(emb=tokens, mask=mask), "a.npz"),
        (save({"x": torch.from_numpy(tokens)}), "a.safetensors"),
    ):  # fmt: skip
        assert parse_array(content, "here", name).equal(expected)


@pytest.mark.parametrize("content", [
    b"", b"no array", npz(a=np.ones((2, 2)))[:-9], npz(a=np.ones((2, 2)), mask=np.ones(3)),
    damaged(npz(a=np.ones((2, 99))), 200), damaged(npz(np.savez_compressed, a=np.eye(99)), 200),
    npy(np.array([{}], dtype=object)), npy(np.ones(4)), npy(np.ones((2, 2), int)),
    npy(np.zeros((2, 2))), npy(np.full((2, 2), np.nan)),
])  # fmt: skip
def test_what_is_no_embedding_is_refused_in_one_line(content):
    with pytest.raises(DataError, match=r"^here") as error:
        parse_array(content, "here", "a.npy")
    assert "\n" not in str(error.value)
