"""At which rate each group of parameters learns: those a base has, and those new to a pyramid."""

import math
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from t2v.engine.optimizer import OptimizerConfig
    from t2v.recipe.recipe import RunConfig

# What a base without finer levels does not have.
PYRAMID_ONLY = re.compile(r"blocks\.\d+\.fusion\..+|conditioning\.level_embedding")

BASE, NEW = "base", "new"


def group_of(name: str) -> str:
    """The group of a parameter, by its name alone, so that a resumed run needs no record of it."""
    return NEW if PYRAMID_ONLY.fullmatch(name) else BASE


def learning_rate(config: "OptimizerConfig", step: int, total_steps: int) -> float:
    """The rate of update `step`, counted from 0: linear up to the peak, then a cosine down to 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / (total_steps - config.warmup_steps)
    return config.learning_rate * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def learning_rates(config: "RunConfig", step: int, updates: int) -> dict[str, float]:
    """The rate of each group for update `step`, after `updates` that were not skipped.

    A rate of 0 freezes: neither weights nor moments of that group move.
    """
    rate = learning_rate(config.optimizer, step, config.total_steps)
    warm = config.warm_start
    if warm is None:
        return {BASE: rate, NEW: rate}
    rising = min(1.0, (step + 1) / warm.new_warmup_steps) if warm.new_warmup_steps else 1.0
    return {
        BASE: 0.0 if updates < warm.freeze_base_steps else rate,
        NEW: rate * warm.new_learning_rate_scale * rising,
    }


def frozen_updates(config: "RunConfig") -> dict[str, int]:
    """The updates that each group sits out at the start of a run."""
    return {BASE: config.warm_start.freeze_base_steps if config.warm_start else 0, NEW: 0}
