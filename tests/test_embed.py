"""Caption embeddings: the encoder's own output, row for row, and proof of what they belong to."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from data_pipeline.errors import ConfigError, DataError, InputMissing
from data_pipeline.making.build import build
from data_pipeline.making.toy import all_toys
from data_pipeline.shards.dataset import open_dataset
from data_pipeline.text.embed import embed, make_tiny_encoder
from data_pipeline.text.embeddings import open_embeddings
from data_pipeline.text.encoder import TextEncoder
from t2v.cli import main

CAPTIONS = [toy.caption for toy in all_toys()]


@pytest.fixture(scope="module")
def encoder(datasets) -> TextEncoder:
    return TextEncoder(datasets / "encoder", max_tokens=16)


@pytest.fixture
def own(datasets, tmp_path) -> Path:
    """A copy of the videos to spoil."""
    return Path(shutil.copytree(datasets / "videos", tmp_path / "videos"))


def test_the_cache_holds_what_the_encoder_says_of_each_caption(datasets, encoder):
    dataset = open_dataset(datasets / "videos")
    embeddings = open_embeddings(dataset, "tiny")
    for shard, row in ((0, 0), (2, 5), (4, 1)):
        (expected,) = encoder.encode([dataset.read(shard, row).caption])
        assert torch.equal(embeddings.read(shard, row), expected)
    assert torch.equal(embeddings.null, encoder.encode([""])[0])
    assert embeddings.null.shape == (1, 8)  # the end mark alone


def test_embeddings_are_those_of_the_plain_encoder(datasets, encoder):
    """The oracle: sentencepiece and transformers called for one caption, without batches."""
    words = sentencepiece.SentencePieceProcessor(model_file=str(datasets / "encoder/spiece.model"))
    model = T5EncoderModel.from_pretrained(datasets / "encoder").eval()
    for caption in (CAPTIONS[0], CAPTIONS[37], "a red zebra", ""):
        ids = torch.tensor([[*words.encode(caption), words.eos_id()]])
        with torch.inference_mode():
            expected = model(input_ids=ids).last_hidden_state[0]
        (found,) = encoder.encode([caption])
        assert found.dtype == torch.bfloat16
        # bfloat16 keeps 8 bits of the mantissa
        torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=1e-3)


def test_a_captions_embedding_does_not_depend_on_its_neighbours(encoder):
    together = encoder.encode([*CAPTIONS, "a", *CAPTIONS])
    alone = [encoder.encode([caption])[0] for caption in CAPTIONS]
    assert all(torch.equal(*pair) for pair in zip(together, alone, strict=False))
    assert all(
        torch.equal(*pair) for pair in zip(together[len(CAPTIONS) + 1 :], alone, strict=True)
    )


def test_white_space_makes_no_difference_and_long_captions_are_cut(encoder):
    a, b, cut = encoder.encode([" a red\n circle ", "a red circle", "red " * 50])
    assert torch.equal(a, b)
    assert cut.shape == (16, 8)


def test_the_tiny_encoder_tells_captions_apart_and_is_reproducible(tmp_path, encoder):
    embeddings = encoder.encode(CAPTIONS)
    means = torch.stack([e.float().mean(0) for e in embeddings])
    distances = torch.cdist(means, means) + 9 * torch.eye(len(CAPTIONS))
    assert distances.min() > 0.01
    for name in ("a", "b"):
        make_tiny_encoder(tmp_path / name, CAPTIONS, width=8, seed=0)
    make_tiny_encoder(tmp_path / "c", CAPTIONS, width=8, seed=1)
    a, b, c = (TextEncoder(tmp_path / name, max_tokens=16).provenance for name in "abc")
    assert a.weights_sha256 == b.weights_sha256 != c.weights_sha256
    assert a.tokenizer_sha256 == b.tokenizer_sha256 == c.tokenizer_sha256


def test_equal_input_gives_equal_files_and_tasks_share_the_work(datasets, own):
    reference = own / "embeddings" / "tiny"
    encoder = datasets / "encoder"
    assert embed(own, encoder, name="again", max_tokens=16, task=(1, 2)) is None
    embed(own, encoder, name="again", max_tokens=16, task=(0, 2))
    for path in sorted(reference.iterdir()):
        assert path.read_bytes() == (own / "embeddings" / "again" / path.name).read_bytes()


def test_finished_shards_are_kept_and_missing_ones_made(datasets, own):
    folder = own / "embeddings" / "tiny"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    for name in ("manifest.json", "000002.idx"):
        (folder / name).unlink()
    with pytest.raises(InputMissing, match="has no embeddings 'tiny'"):
        open_embeddings(open_dataset(own), "tiny")
    embed(own, datasets / "encoder", name="tiny", max_tokens=16)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    changed = [n for n, at in times.items() if (folder / n).stat().st_mtime_ns != at]
    assert changed == ["000002.tar"]


def test_embeddings_of_another_dataset_are_refused(datasets, media, tmp_path):
    build(media / "videos", tmp_path / "other", frames=8, height=26, width=32, shard_samples=6)
    shutil.copytree(datasets / "videos/embeddings", tmp_path / "other/embeddings")
    with pytest.raises(ConfigError, match=r"dataset_fingerprint: .* embed this dataset again"):
        open_embeddings(open_dataset(tmp_path / "other"), "tiny")


def test_a_shard_of_other_rows_is_found_at_the_first_read(own):
    folder = own / "embeddings" / "tiny"
    for suffix in ("tar", "idx"):
        shutil.copy(folder / f"000001.{suffix}", folder / f"000000.{suffix}")
    with pytest.raises(DataError, match="row 3 is of another sample or caption"):
        open_embeddings(open_dataset(own), "tiny").read(0, 3)


def test_damaged_embeddings_are_told(own):
    folder = own / "embeddings" / "tiny"
    embeddings = open_embeddings(open_dataset(own), "tiny")
    content = bytearray((folder / "000000.tar").read_bytes())
    content[512 + 100] ^= 1
    (folder / "000000.tar").write_bytes(content)
    with pytest.raises(DataError, match="crc32"):
        embeddings.read(0, 0)
    (folder / "null.safetensors").write_bytes(b"garbage")
    with pytest.raises(DataError, match=r"null\.safetensors: an embedding is damaged"):
        open_embeddings(open_dataset(own), "tiny")


def test_another_encoder_may_not_fill_the_same_folder(own, tmp_path, datasets):
    make_tiny_encoder(tmp_path / "wide", CAPTIONS, width=16, seed=0)
    for encoder, tokens in ((tmp_path / "wide", 16), (datasets / "encoder", 12)):
        with pytest.raises(ConfigError, match="embeddings of another encoder or other settings"):
            embed(own, encoder, name="tiny", max_tokens=tokens)


def test_what_is_no_encoder_is_refused(own, tmp_path):
    with pytest.raises(InputMissing, match="no such folder"):
        embed(own, tmp_path / "nowhere", name="x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="is no text encoder because"):
        embed(own, tmp_path / "empty", name="x")
    with pytest.raises(ConfigError, match=r"name: value '../x' is wrong"):
        embed(own, tmp_path / "empty", name="../x")
    assert not (own / "embeddings" / "x").exists()


def spoilt(encoder: Path, folder: Path, **tensors: torch.Tensor) -> Path:
    """A copy of an encoder with other weights besides or instead of its own."""
    shutil.copytree(encoder, folder)
    weights = load_file(folder / "model.safetensors") | tensors
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("name", "shape", "reason"), [
    # as umT5 has them, whose other names are those of T5
    ("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight", (32, 4), "no place"),
    ("encoder.block.2.layer.0.SelfAttention.q.weight\x1b[31m", (8, 8), r"no place in it, .*\\x1b"),
    ("shared.weight", (3, 8), "of another shape, shared.weight first"),
])  # fmt: skip
def test_an_encoder_with_weights_of_another_is_refused_in_one_line(
    own, datasets, tmp_path, capfd, name, shape, reason
):
    other = spoilt(datasets / "encoder", tmp_path / "other", **{name: torch.zeros(shape)})
    assert main(["data", "embed", str(own), "--encoder", str(other), "--name", "x"]) == 78
    said = capfd.readouterr()
    assert re.search(reason, said.err)
    assert said.err.count("\n") == 1
    assert not (own / "embeddings" / "x").exists()


def test_weights_that_are_not_finite_make_no_embeddings(own, datasets, tmp_path):
    broken = {"encoder.final_layer_norm.weight": torch.full((8,), torch.nan)}
    encoder = spoilt(datasets / "encoder", tmp_path / "broken", **broken)
    with pytest.raises(DataError, match=r"000000.tar: .* not finite; look for damage in the files"):
        embed(own, encoder, name="x", max_tokens=16)
    assert not list((own / "embeddings" / "x").glob("*.tar"))


@pytest.mark.parametrize(("special", "words", "reason"), [
    ({"pad_token": "a"}, "ab", "marks neither beginning nor end"),
    ({"eos_token": "0"}, map(str, range(400)), "knows 400 tokens and its weights"),
])  # fmt: skip
def test_a_tokenizer_that_is_not_the_encoders_is_refused(
    datasets, tmp_path, special, words, reason
):
    folder = Path(shutil.copytree(datasets / "encoder", tmp_path / "other"))
    (folder / "spiece.model").unlink()
    known = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}))
    PreTrainedTokenizerFast(tokenizer_object=known, **special).save_pretrained(folder)
    with pytest.raises(ConfigError, match=f"is no text encoder because its tokenizer .*{reason}"):
        TextEncoder(folder, max_tokens=16)


def test_the_manifest_tells_the_provenance(datasets):
    manifest = json.loads((datasets / "videos/embeddings/tiny/manifest.json").read_text())
    provenance = manifest["provenance"]
    assert (provenance["encoder"], provenance["width"]) == ("encoder", 8)
    assert provenance["caption_normalisation"] == "single spaces"
    assert manifest["dataset_fingerprint"] == open_dataset(datasets / "videos").info.fingerprint
    assert str(datasets) not in json.dumps(manifest)
    assert np.sum([shard["samples"] for shard in manifest["shards"]]) == 26
