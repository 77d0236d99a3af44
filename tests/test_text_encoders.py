"""Every kind of text encoder gives what transformers says of one caption, or is refused.

The networks are tiny and have random weights.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from data_pipeline.errors import ConfigError
from data_pipeline.making.toy import all_toys
from data_pipeline.shards.dataset import open_dataset
from data_pipeline.text.audit import check
from data_pipeline.text.embed import embed
from data_pipeline.text.embeddings import open_embeddings
from data_pipeline.text.encoder import TextEncoder
from t2v.cli import main

CAPTIONS = ["a red circle moves left", "blue", "", "a " * 40, "über 🦊 never seen"]
MARKS = ["<s>", "</s>", "<pad>", "<unk>"]
T5 = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
BERT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
LLAMA = {**BERT, "num_key_value_heads": 1, "max_position_embeddings": 64}
ROBERTA = {**BERT, "max_position_embeddings": 35, "pad_token_id": 2}
CLIP = {"text_config": {**BERT, "max_position_embeddings": 20}, "vision_config": BERT,
        "projection_dim": 8}  # fmt: skip
# What is saved: often more than the encoder. Then what reads one caption, and at which layer.
KINDS: dict[str, tuple[str, dict, str, int | None]] = {
    "t5 whole": ("T5ForConditionalGeneration", T5, "T5EncoderModel", None),
    "mt5": ("MT5EncoderModel", T5, "MT5EncoderModel", None),
    "umt5": ("UMT5EncoderModel", T5, "UMT5EncoderModel", None),
    "byt5": ("T5EncoderModel", {**T5, "vocab_size": 384}, "T5EncoderModel", None),
    "bert": ("BertForMaskedLM", BERT, "BertModel", None),
    "roberta": ("RobertaForMaskedLM", ROBERTA, "RobertaModel", None),
    "clip whole": ("CLIPModel", CLIP, "CLIPTextModel", None),
    "clip's last but one": ("CLIPModel", CLIP, "CLIPTextModel", -2),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 8, "n_layer": 2, "n_head": 2}, "GPT2Model", 1),
    "llama": ("LlamaForCausalLM", LLAMA, "LlamaModel", -2),
    "qwen": ("Qwen2ForCausalLM", {**LLAMA, "vocab_size": 64}, "Qwen2Model", 2),
}


def save(folder: Path, kind: str) -> Path:
    """A kind of network and a tokenizer of words, or of bytes."""
    words = sorted({word for toy in all_toys() for word in toy.caption.split()})
    vocabulary = {word: number for number, word in enumerate([*MARKS, *words])}
    saved, settings, *_ = KINDS[kind]
    cls: Any = getattr(transformers, saved)
    torch.manual_seed(0)
    if kind.startswith("clip"):
        settings = {**settings, "text_config": {**settings["text_config"],
                    "vocab_size": len(vocabulary), "eos_token_id": 1}}  # fmt: skip
    config = cls.config_class(**{"vocab_size": len(vocabulary), **settings})
    cls(config).save_pretrained(folder)
    if kind == "byt5":
        ByT5Tokenizer().save_pretrained(folder)
        return folder
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    # Decoders mark nothing and have no padding.
    is_decoder = kind in ("gpt2", "llama", "qwen")
    if not is_decoder:
        ends = [(mark, vocabulary[mark]) for mark in ("<s>", "</s>")]
        tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    marks = {"eos_token": "</s>", "unk_token": "<unk>"}
    marks |= {} if is_decoder else {"pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_says_of_a_caption_what_transformers_says(tmp_path, kind):
    folder = save(tmp_path / "encoder", kind)
    *_, name, layer = KINDS[kind]
    encoder = TextEncoder(folder, max_tokens=20, layer=layer)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    model = getattr(transformers, name).from_pretrained(folder).eval()
    for caption, found in zip(CAPTIONS, encoder.encode(CAPTIONS), strict=True):
        text = " ".join(caption.split())
        ids = tokenizer(text, truncation=True, max_length=20)["input_ids"] or [MARKS.index("</s>")]
        with torch.inference_mode():
            output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        expected = output.last_hidden_state if layer is None else output.hidden_states[layer]
        assert found.shape == (len(ids), 8)
        torch.testing.assert_close(found.float(), expected[0], rtol=2**-7, atol=2e-3)
    alone = [encoder.encode([caption])[0] for caption in CAPTIONS]
    assert all(map(torch.equal, alone, encoder.encode(CAPTIONS[::-1])[::-1]))


def test_a_decoders_layer_is_asked_for_written_down_and_checked(datasets, tmp_path, capsys):
    own = Path(shutil.copytree(datasets / "videos", tmp_path / "videos"))
    folder = save(tmp_path / "encoder", "llama")
    command = ["data", "embed", str(own), f"--encoder={folder}", "--name=x", "--max-tokens=16"]
    assert main(command) == 78
    assert "layer: missing because llama is a decoder" in capsys.readouterr().err
    assert main([*command, "--layer=3"]) == 78
    assert "layer: 3 is wrong because the encoder has 2; give 0 to 2" in capsys.readouterr().err
    assert not (own / "embeddings/x").exists()
    assert main([*command, "--layer=-2"]) == 0
    assert open_embeddings(open_dataset(own), "x").info.provenance.layer == 1
    assert main([*command, "--layer=1", "--check=5"]) == 0
    with pytest.raises(ConfigError, match="was made with encoder"):
        check(own, TextEncoder(folder, max_tokens=16, layer=2), name="x", count=5)
    with pytest.raises(ConfigError, match="another encoder or other settings"):
        embed(own, folder, name="x", max_tokens=16, layer=2)


@pytest.mark.parametrize(("kind", "tokens"), [("clip whole", 20), ("roberta", 32)])
def test_more_tokens_than_there_are_positions_are_refused(tmp_path, kind, tokens):
    folder = save(tmp_path / "encoder", kind)
    (longest,) = TextEncoder(folder, max_tokens=tokens).encode(["a " * 99])
    assert len(longest) == tokens
    with pytest.raises(ConfigError, match=f"max_tokens: .* reads at most {tokens}; lower it"):
        TextEncoder(folder, max_tokens=tokens + 1)


@pytest.mark.parametrize(("kind", "buffer"), [
    ("gpt2", "transformer.h.1.attn.masked_bias"),
    ("bert", "bert.embeddings.position_ids"),
    ("clip whole", "text_model.embeddings.position_ids"),
    ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
])  # fmt: skip
def test_files_of_older_versions_may_keep_buffers(tmp_path, kind, buffer):
    folder = save(tmp_path / "encoder", kind)
    file, layer = folder / "model.safetensors", KINDS[kind][3]
    (plain,) = TextEncoder(folder, max_tokens=16, layer=layer).encode(CAPTIONS[:1])
    save_file(load_file(file) | {buffer: torch.zeros(4)}, file, metadata={"format": "pt"})
    (found,) = TextEncoder(folder, max_tokens=16, layer=layer).encode(CAPTIONS[:1])
    assert torch.equal(found, plain)


@pytest.mark.parametrize("kind", [name for name in KINDS if name != "byt5"])
def test_weights_of_a_deeper_network_are_refused(tmp_path, kind):
    folder = save(tmp_path / "encoder", kind)
    config = folder / "config.json"
    fewer = re.sub(r'("num_(hidden_)?layers"|"n_layer"): 2', r"\1: 1", config.read_text())
    assert fewer != config.read_text()
    config.write_text(fewer)
    reason = "layer_types" if kind == "qwen" else "have no place in it"
    with pytest.raises(ConfigError, match=rf"is no text encoder because .*{reason}"):
        TextEncoder(folder, max_tokens=16, layer=KINDS[kind][3] and -1)


@pytest.mark.parametrize(("change", "reason"), [
    ({"model_type": "vit"}, "its kind 'vit' is none that reads text alone"),
    ({"model_type": "bart"}, "its kind 'bart' is none that reads text alone"),
    ({"model_type": "no\x1b[31msuch"}, "does not recognize this architecture"),
    ({"hidden_size": "8"}, "Field 'hidden_size' expected int"),
    ({"text_config": None, "model_type": "clip"}, "of its weights are missing|NoneType"),
    ({"auto_map": {"AutoConfig": "x.X", "AutoModel": "x.X"}, "model_type": "x"}, "custom code"),
    ([], "Unrecognized model"),
])  # fmt: skip
def test_what_is_no_text_encoder_is_refused_and_runs_no_code(tmp_path, change, reason):
    """Nor is anybody asked whether it may."""
    folder = save(tmp_path / "encoder", "bert")
    config = folder / "config.json"
    spoilt = json.loads(config.read_text()) | change if isinstance(change, dict) else change
    config.write_text(json.dumps(spoilt))
    with pytest.raises(ConfigError, match=f"is no text encoder because .*({reason})"):
        TextEncoder(folder, max_tokens=16)
