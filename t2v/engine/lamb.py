"""LAMB (arXiv 1904.00962), whose trust ratios are those of whole tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from t2v.engine.compute import squared_norms


class Lamb(Optimizer):
    """LAMB (arXiv 1904.00962, Algorithm 2), on whole tensors or on parts of them.

    The trust ratio |w| / |update| is that of the whole tensor: squared norms of all parts are added
    by `sum_over_parts` in one call a step. Vectors are moved by plain Adam, as in the authors'
    code. A group whose rate is 0 stays as it is, its moments too.

    A matrix moves by its own norm times the rate, so one that starts at zero stays there for
    thousands of steps, unless its norm counts as at least that of the group's `least_norms`.
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

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update; there is no closure to evaluate again."""
        assert closure is None
        moving = [group for group in self.param_groups if group["lr"]]
        updates = [self._adam_update(group) for group in moving]
        self._apply_trust(moving, updates)
        for group, moves in zip(moving, updates, strict=True):
            torch._foreach_add_(group["params"], moves, alpha=-group["lr"])

    def _apply_trust(self, groups: list[dict], updates: list[list[Tensor]]) -> None:
        """Scale each matrix's update by its trust ratio, where both of its norms exist."""
        parts, moves, floors = [], [], []
        for group, update in zip(groups, updates, strict=True):
            if group["matrices"]:
                parts += group["params"]
                moves += update
                floors += group["least_norms"]
        if parts:
            norms = torch.stack([squared_norms(parts), squared_norms(moves)])
            weight, update = self.sum_over_parts(norms).sqrt()
            if any(floors):
                weight = weight.maximum(weight.new_tensor(floors))
            trust = torch.where((weight > 0) & (update > 0), weight / update, 1.0)
            torch._foreach_mul_(moves, list(trust.unbind()))

    def _adam_update(self, group: dict) -> list[Tensor]:
        """`m / (sqrt(v) + eps) + weight_decay * w`, with m and v freed of their start at 0."""
        parts: list[Tensor] = group["params"]
        states = [self.state[part] for part in parts]
        gradients = [part.grad for part in parts if part.grad is not None]
        beta1, beta2 = group["betas"]
        states[0]["step"] += 1
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
