"""The smallest recipes of Pyramid Flow, networks of them, and batches of noise to feed them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.feeding.loader import Batch
from t2v.methods.pyramid_flow.config import PyramidFlowConfig
from t2v.methods.pyramid_flow.network import Group, PyramidFlow
from t2v.methods.pyramid_flow.objective import Lesson, prepare
from t2v.network.conditioning import Condition
from t2v.recipe.recipe import RunConfig, method_of, parse_config
from tests.tiny import RECIPE

FLOW: dict[str, Any] = {
    "kind": "pyramid-flow",
    "space": "pixels",
    "temporal": "pyramid",
    "clip_size": [7, 16, 24],
    "unit_frames": 2,
    "flow": {"joints": [0.333, 0.666]},
    "model": {
        "token_size": [2, 2],
        "dim": 32,
        "head_dim": 16,
        "double_blocks": 1,
        "single_blocks": 2,
    },
    "stage_turns": [0, 1, 1, 2],
    "sampling": {"steps": [2, 1, 2]},
}
TEXT = {"kind": "text", "encoder": "tiny", "width": 8, "max_tokens": 6}
FULL = {"temporal": "full", "unit_frames": None}


def flow_content(**changes: Any) -> dict[str, Any]:
    """The recipe as plain data with sections changed, those of its method by their own names."""
    content: dict[str, Any] = {**RECIPE, "method": dict(FLOW)}
    for section, change in changes.items():
        home = content["method"] if section in PyramidFlowConfig.model_fields else content
        old = home.get(section)
        merge = isinstance(old, dict) and isinstance(change, dict) and section != "conditioning"
        home[section] = {**old, **change} if merge else change
    return content


def flow_config(**changes: Any) -> RunConfig:
    """The recipe with sections changed: `model={"dim": 48}` changes one field of one."""
    return parse_config(flow_content(**changes), "tiny")


def stirred_network(config: RunConfig, seed: int = 0) -> PyramidFlow:
    """A network with noise on every parameter: gates and heads that start at zero would hide
    mistakes behind them."""
    network = method_of(config).network()
    network.init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return network


def noise_batch(config: RunConfig, numbers: list[int]) -> Batch:
    """Samples `numbers` of an endless dataset of noise; sample n is a function of n."""
    rngs = [np.random.default_rng([config.seed, number]) for number in numbers]
    size = (1, *config.method.clip_size, 3)
    patches = np.stack([rng.integers(0, 256, size, dtype=np.uint8) for rng in rngs])
    label = text = mask = None
    if config.conditioning.kind == "class":
        label = torch.tensor([int(rng.integers(0, 3)) for rng in rngs])
    if config.conditioning.kind == "text":
        shape = (config.conditioning.max_tokens, config.conditioning.width)
        text = torch.from_numpy(np.stack([rng.standard_normal(shape) for rng in rngs]))
        lengths = torch.tensor([int(rng.integers(1, shape[0] + 1)) for rng in rngs])
        mask = torch.arange(shape[0]) < lengths[:, None]
        text = (text * mask[:, :, None]).bfloat16()
    return Batch(
        numbers=torch.tensor(numbers),
        ids=[str(number) for number in numbers],
        patches=torch.from_numpy(patches),
        latents=None,
        latent_frames=None,
        offsets=torch.zeros(len(numbers), 1, 3, dtype=torch.long),
        fps=torch.full((len(numbers),), 24.0),
        original_size=torch.full((len(numbers), 2), 240.0),
        text_tokens=text,
        text_mask=mask,
        label=label,
        quarantined=[],
    )


def noise_group(
    config: RunConfig, *, unit: int, stage: int, numbers: tuple[int, ...] = (0, 1)
) -> tuple[Group, Tensor]:
    """What the network is shown of samples at a stage of a unit, and what it is to answer."""
    batch = noise_batch(config, list(numbers))
    clean = batch.patches[:, 0].permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    lengths = None if batch.text_mask is None else batch.text_mask.sum(1).tolist()
    lessons = [Lesson(row, stage, unit, seed) for row, seed in enumerate(numbers)]
    condition = Condition.of(batch, torch.device("cpu"))
    return prepare(config.method, clean, condition, lengths, lessons)
