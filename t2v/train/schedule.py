"""At which rate each group of parameters learns: those a base has, and those new to a run."""

import math

from t2v.engine.optimizer import BASE, NEW, OptimizerConfig
from t2v.train.warm_start import WarmStartConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The rate of update `step`, counted from 0: linear up to the peak, then a cosine down to 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / (total_steps - config.warmup_steps)
    return config.learning_rate * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def learning_rates(
    config: OptimizerConfig,
    warm: WarmStartConfig | None,
    *,
    step: int,
    total_steps: int,
    updates: int,
) -> dict[str, float]:
    """The rate of each group for update `step`, after `updates` that were not skipped.

    A rate of 0 freezes: neither weights nor moments of that group move.
    """
    rate = learning_rate(config, step, total_steps)
    if warm is None:
        return {BASE: rate, NEW: rate}
    rising = min(1.0, (step + 1) / warm.new_warmup_steps) if warm.new_warmup_steps else 1.0
    return {
        BASE: 0.0 if updates < warm.freeze_base_steps else rate,
        NEW: rate * warm.new_learning_rate_scale * rising,
    }
