"""Networks of evaluation's tests: they are called as I3D, C3D and CLIP are, and know nothing."""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn


class StandInI3D(nn.Module):
    """Two random convolutions; features are means and deviations of their channels."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.first = nn.Conv3d(3, 8, 3, padding=1)
        self.second = nn.Conv3d(8, dims // 2, 3, padding=1)

    def forward(
        self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False
    ) -> Tensor:
        assert x.dtype == torch.float32
        assert not rescale
        assert not resize
        assert return_features
        found = self.second(torch.relu(self.first(x))).flatten(2)
        return torch.cat([found.mean(2), found.std(2)], 1)


class StandInC3D(nn.Module):
    """Probabilities of five classes from a clip's mean colours."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.uint8
        return self.head(x.float().mean((2, 3, 4)) / 16).softmax(1)


class NoProbabilities(nn.Module):
    """What answers with numbers that are no probabilities."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float().mean((2, 3, 4))


def write_script(module: type[nn.Module], path: Path, *arguments: int) -> Path:
    """A TorchScript file of a network with seeded weights."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.manual_seed(0)
        torch.jit.save(torch.jit.script(module(*arguments).eval()), str(path))
    return path


def write_clip_model(folder: Path, words: list[str]) -> Path:
    """A CLIPModel of two layers with random weights, and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<s>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 8, "eos_token_id": 1}
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2}  # fmt: skip
    config = CLIPConfig(
        text_config=text | shape,
        vision_config={"image_size": 16, "patch_size": 8} | shape,
        projection_dim=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    return folder
