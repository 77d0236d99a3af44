"""How a model computes, whatever splits it: precision, recomputation, compilation."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from data_pipeline.errors import ConfigError
from t2v.engine.config import EngineConfig

# glibc's names (malloc.h), and the largest value that it takes for the second.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES, LARGEST_KEPT_BYTES = 1 << 30, 1 << 25
# What cuBLAS sums in a fixed order with; it looks once, before its first product.
CUBLAS, FIXED_ORDER = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
# Of one piece of code; recipes have far fewer (docs/engines.md).
MOST_GRAPHS = 32
PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


@contextlib.contextmanager
def determinism(config: EngineConfig) -> Iterator[None]:
    """Equal inputs give equal bits, on a CPU and on a GPU, or an operation that cannot is an error;
    unless the recipe gives that up. Afterwards torch is set as it was before.

    ConfigError if the environment has cuBLAS sum in any order.
    """
    wanted, fill = config.deterministic, torch.utils.deterministic
    was = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    filled = fill.fill_uninitialized_memory  # pyrefly: ignore[missing-attribute]
    had = os.environ.get(CUBLAS)
    if wanted and (had or FIXED_ORDER[0]) not in FIXED_ORDER:
        raise ConfigError(
            f"{CUBLAS}: '{had}' is wrong because engine.deterministic needs sums of one order; "
            "unset it, or set engine.deterministic: false."
        )
    try:
        if wanted:
            os.environ[CUBLAS] = had or FIXED_ORDER[0]
            torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = wanted
        torch.use_deterministic_algorithms(wanted)
        # Filling fresh memory guards against reading it; in a training step it is a bare cost.
        fill.fill_uninitialized_memory = False  # pyrefly: ignore[missing-attribute]
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warned)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        fill.fill_uninitialized_memory = filled  # pyrefly: ignore[missing-attribute]
        if wanted and had is None:
            os.environ.pop(CUBLAS, None)


def keep_freed_memory() -> None:
    """Have a CPU's allocator keep what a step frees: the next one takes the same again, and fresh
    pages cost more than the arithmetic of a small model on them."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)


def set_matmul_precision(config: EngineConfig) -> None:
    """fp32 products as they are, or rounded to tf32 on GPUs that can."""
    torch.set_float32_matmul_precision("highest" if config.precision == "fp32" else "high")


def autocast(config: EngineConfig, device: torch.device) -> contextlib.AbstractContextManager:
    """bf16 matrix products where the recipe asks for them; sums, norms and softmax stay fp32."""
    # A cached copy would outlive the weights that ZeRO stage 3 gathers for a block.
    gathered = config.kind == "zero" and config.zero_stage == 3
    return torch.autocast(
        device.type,
        torch.bfloat16,
        enabled=config.precision == "bf16",
        cache_enabled=not gathered,
    )


def round_attention(blocks: nn.ModuleList, config: EngineConfig) -> None:
    """bf16 queries, keys and values where the recipe asks for them."""
    for module in blocks.modules() if config.bf16_attention else ():
        if hasattr(module, "attention_dtype"):
            setattr(module, "attention_dtype", torch.bfloat16)  # noqa: B010


def prepare_blocks(blocks: nn.ModuleList, config: EngineConfig) -> None:
    """Recompute and compile each block on its own, and set what its attention computes in.

    Only `forward` is replaced: names of parameters stay, and an engine's hooks stay outside. A
    block's graphs are static: one for each kind of block, with gradients and without. Programs of
    those that meet many lengths have one for all of them. Nothing ever falls back to uncompiled
    code without a word: what cannot be one graph, or is one too many, is an error.
    """
    round_attention(blocks, config)
    if config.compile:
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        torch._dynamo.config.recompile_limit = MOST_GRAPHS
    for block in blocks:
        programs = [name for name in getattr(block, "programs", ()) if config.compile]
        for name in programs:  # inside of what is recomputed, so that both times they run
            setattr(block, name, torch.compile(getattr(block, name), dynamic=True))
        forward = block.forward
        # Blocks draw no random numbers, so there is no generator state to keep.
        recomputed = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
        match config.activation_checkpointing:
            case "blocks":
                forward = recomputed
            case "selective":
                kept = partial(create_selective_checkpoint_contexts, keep_products)
                forward = partial(recomputed, context_fn=kept)
        if config.compile and not programs:
            forward = torch.compile(forward, dynamic=False, fullgraph=True)
        block.forward = forward


def keep_products(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """Keep what matrix products and attention computed; the rest is cheap to compute again."""
    kept = operation in PRODUCTS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def squared_norms(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Sum of squares of each tensor; an empty part has none."""
    return torch.stack(torch._foreach_norm(tensors)).square()
