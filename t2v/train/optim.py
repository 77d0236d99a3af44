"""Optimizers and the learning rate as a pure function of the step."""

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import AdamW, Optimizer

from data_pipeline.strict import Strict


class OptimizerConfig(Strict):
    """LAMB is the paper's; AdamW is torch's."""

    name: Literal["lamb", "adamw"]
    learning_rate: float = Field(gt=0, description="peak learning rate")
    warmup_steps: int = Field(ge=0, description="linear warm-up; then cosine down to 0")
    weight_decay: float = Field(default=0.01, ge=0)
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
        Field(strict=False),
    ] = (0.9, 0.99)
    eps: float = Field(default=1.0e-6, gt=0)
    max_grad_norm: float = Field(default=1.0, gt=0, description="global gradient norm is cut here")
    max_skips_in_a_row: int = Field(
        default=5, ge=1, description="steps without a finite gradient before the run stops"
    )


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The rate of update `step`, counted from 0: linear up to the peak, then a cosine down to 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / (total_steps - config.warmup_steps)
    return config.learning_rate * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def build_optimizer(
    config: OptimizerConfig,
    parts: list[Tensor],
    sum_over_parts: Callable[[Tensor], Tensor],
) -> Optimizer:
    """The recipe's optimizer; biases, norms and other vectors are not decayed.

    Its state exists from the start, so that a checkpoint always has the same tensors.
    """
    matrices = [part for part in parts if part.ndim > 1]
    vectors = [part for part in parts if part.ndim <= 1]
    groups = [
        {"params": members, "weight_decay": decay}
        for members, decay in ((matrices, config.weight_decay), (vectors, 0.0))
        if members
    ]
    rate, betas, eps = config.learning_rate, config.betas, config.eps
    match config.name:
        case "lamb":
            return Lamb(groups, rate, betas=betas, eps=eps, sum_over_parts=sum_over_parts)
        case "adamw":
            optimizer = AdamW(groups, rate, betas=betas, eps=eps, fused=True)
            for part in parts:
                optimizer.state[part] = {
                    "step": torch.zeros((), device=part.device),
                    "exp_avg": torch.zeros_like(part),
                    "exp_avg_sq": torch.zeros_like(part),
                }
            return optimizer


class Lamb(Optimizer):
    """LAMB (arXiv 1904.00962, Algorithm 2), on whole tensors or on parts of them.

    The trust ratio |w| / |update| is that of the whole tensor: squared norms of all parts are added
    by `sum_over_parts` in one call. Vectors are moved by plain Adam, as in the authors' code.
    """

    def __init__(
        self,
        groups: list[dict],
        lr: float,
        *,
        betas: tuple[float, float],
        eps: float,
        sum_over_parts: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        self.sum_over_parts = sum_over_parts
        for group in self.param_groups:
            for part in group["params"]:
                self.state[part] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(part),
                    "exp_avg_sq": torch.zeros_like(part),
                }

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update; there is no closure to evaluate again."""
        assert closure is None
        for group in self.param_groups:
            parts, updates = group["params"], self._adam_update(group)
            if parts[0].ndim > 1:
                norms = torch.stack([squared_norms(parts), squared_norms(updates)])
                weight, update = self.sum_over_parts(norms).sqrt()
                trust = torch.where((weight > 0) & (update > 0), weight / update, 1.0)
                torch._foreach_mul_(updates, list(trust.unbind()))
            torch._foreach_add_(parts, updates, alpha=-group["lr"])

    def _adam_update(self, group: dict) -> list[Tensor]:
        """`m / (sqrt(v) + eps) + weight_decay * w`, with m and v freed of their start at 0."""
        parts: list[Tensor] = group["params"]
        states = [self.state[part] for part in parts]
        gradients = [part.grad for part in parts if part.grad is not None]
        beta1, beta2 = group["betas"]
        torch._foreach_add_([state["step"] for state in states], 1)
        count = int(states[0]["step"])
        first = [state["exp_avg"] for state in states]
        second = [state["exp_avg_sq"] for state in states]
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        root = torch._foreach_sqrt(torch._foreach_div(second, 1 - beta2**count))
        torch._foreach_add_(root, group["eps"])
        updates = torch._foreach_div(torch._foreach_div(first, 1 - beta1**count), root)
        if group["weight_decay"]:
            torch._foreach_add_(updates, parts, alpha=group["weight_decay"])
        return list(updates)


def squared_norms(tensors: list[Tensor]) -> Tensor:
    """Sum of squares of each tensor; an empty part has none."""
    return torch.stack(torch._foreach_norm(tensors)).square()
