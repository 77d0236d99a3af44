"""How a model computes, whatever splits it: precision, recomputation, compilation."""

import contextlib
import os
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from t2v.engine.config import EngineConfig


def make_deterministic() -> None:
    """Equal inputs give equal bits, on a CPU and on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory guards against reading it; in a training step it is a bare cost.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyrefly: ignore[missing-attribute]


def set_matmul_precision(config: EngineConfig) -> None:
    """fp32 products as they are, or rounded to tf32 on GPUs that can."""
    torch.set_float32_matmul_precision("highest" if config.precision == "fp32" else "high")


def autocast(config: EngineConfig, device: torch.device) -> contextlib.AbstractContextManager:
    """bf16 matrix products where the recipe asks for them; sums, norms and softmax stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


def prepare_blocks(blocks: nn.ModuleList, config: EngineConfig) -> None:
    """Recompute and compile each block on its own.

    Only `forward` is replaced: names of parameters stay, and an engine's hooks stay outside.
    """
    for block in blocks:
        forward = block.forward
        if config.activation_checkpointing:
            # Blocks draw no random numbers, so there is no generator state to keep.
            forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
        block.forward = torch.compile(forward) if config.compile else forward
