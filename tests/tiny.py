"""The smallest recipe with every part in it, networks of it, and batches of noise to feed them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.pyramid import draw_offsets
from t2v.methods.hpdm.network import HPDM
from t2v.network.conditioning import Condition
from t2v.recipe.recipe import RunConfig, method_of, parse_config

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "run_dir": "runs/tiny",
    "seed": 3,
    "total_steps": 20,
    "global_batch_size": 4,
    "micro_batch_size": 1,
    "ema_half_life_steps": 3.0,
    "method": {
        "kind": "hpdm",
        "pyramid": {"levels": 2, "patch_size": [2, 6, 8], "clip_size": [4, 12, 16]},
        "model": {
            "token_size": [1, 3, 4],
            "token_dim": 16,
            "num_latents": 6,
            "latent_dim": 16,
            "latent_layers": 1,
            "token_head_dim": 8,
            "latent_head_dim": 8,
            "levels_per_block": [1, 2],
            "conditioning_dim": 16,
            "self_conditioning_rate": 0.9,
        },
        "diffusion": {"input_scale": 1.0, "input_scale_growth": 2.0},
        "sampling": {"steps": [4, 2]},
        "latent_budget": None,
    },
    "conditioning": {"kind": "class", "num_classes": 3},
    "data": {"sources": [{"path": "data/none"}], "num_workers": 0},
    "optimizer": {"name": "adamw", "learning_rate": 1.0e-2, "warmup_steps": 2},
    "engine": {"kind": "single", "precision": "fp32"},
    "checkpoint": {"every_steps": 5},
    "metrics": {},
}

THREE_LEVELS: dict[str, Any] = {
    "pyramid": {"levels": 3, "clip_size": [8, 24, 32]},
    "model": {"levels_per_block": [1, 2, 3]},
    "sampling": {"steps": [3, 2, 1]},
}


def tiny_content(**changes: Any) -> dict[str, Any]:
    """The recipe as plain data with sections changed, those of its method by their own names."""
    content = {**RECIPE, "method": dict(RECIPE["method"])}
    for section, change in changes.items():
        home = content["method"] if section in RECIPE["method"] else content
        old = home.get(section)
        merge = isinstance(old, dict) and isinstance(change, dict)
        home[section] = {**old, **change} if merge else change
    return content


def tiny_config(**changes: Any) -> RunConfig:
    """The recipe with sections changed: `engine={"kind": "fsdp"}` changes one field of one."""
    return parse_config(tiny_content(**changes), "tiny")


def stirred_model(config: RunConfig, seed: int = 0) -> HPDM:
    """A network with noise on every parameter: gates, gains and heads that start at zero would
    hide mistakes behind them."""
    model = method_of(config).network()
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def class_condition(labels: list[int], fps: float = 24.0) -> Condition:
    """Conditions of clips of the tiny recipe, which has classes 0, 1, 2 and the null class 3."""
    return Condition(
        fps=torch.full((len(labels),), fps),
        original_size=torch.full((len(labels), 2), 240.0),
        label=torch.tensor(labels),
    )


@dataclass
class NoiseBatch:
    """What `level_losses` reads of a loader's batch; sample n is a function of n."""

    numbers: Tensor
    patches: Tensor
    offsets: Tensor
    fps: Tensor
    original_size: Tensor
    label: Tensor
    text_tokens: None = None
    text_mask: None = None
    step: int = 0


def noise_batch(config: RunConfig, numbers: list[int]) -> NoiseBatch:
    """Samples `numbers` of an endless dataset of noise."""
    pyramid = config.method.pyramid
    patches, offsets, labels = [], [], []
    for number in numbers:
        rng = np.random.default_rng([config.seed, number])
        shape = (pyramid.levels, *pyramid.patch_size, 3)
        patches.append(rng.integers(0, 256, shape, dtype=np.uint8))
        offsets.append(draw_offsets(pyramid, rng))
        labels.append(int(rng.integers(0, 3)))
    return NoiseBatch(
        numbers=torch.tensor(numbers),
        patches=torch.from_numpy(np.stack(patches)),
        offsets=torch.from_numpy(np.stack(offsets)),
        fps=torch.full((len(numbers),), 24.0),
        original_size=torch.full((len(numbers), 2), 240.0),
        label=torch.tensor(labels),
    )
