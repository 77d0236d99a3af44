"""Optimizers on parts of parameters, in groups that learn at their own rate."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod, sqrt
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
    trust_floor: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="lamb: least norm in a trust ratio, as a share of Xavier's; 0: plain",
    )
    max_grad_norm: float = Field(default=1.0, gt=0, description="global gradient norm is cut here")
    max_skips_in_a_row: int = Field(
        default=5, ge=1, description="steps without a finite gradient before the run stops"
    )


BASE, NEW = "base", "new"


@dataclass(frozen=True)
class Groups:
    """Which parameters learn at the rate of those new to a base, by their names alone, so that a
    resumed run needs no record of it; and how many updates the others sit out at first."""

    new: re.Pattern[str]
    freeze_base_steps: int = 0

    def of(self, name: str) -> str:
        """The group of a parameter."""
        return NEW if self.new.fullmatch(name) else BASE

    def rest_updates(self, group: str) -> int:
        """The updates that a group sits out at the start of a run."""
        return self.freeze_base_steps if group == BASE else 0


def parameter_groups(
    config: OptimizerConfig,
    groups: Groups,
    parts: Mapping[str, Tensor],
    shapes: dict[str, tuple[int, ...]],
) -> list[dict[str, Any]]:
    """Parts by the rate they learn at and by whether they decay: vectors do not.

    A part may be flat, so `shapes` tells what the whole parameter is.
    """
    members: dict[tuple[str, bool], list[str]] = {}
    for name in parts:
        members.setdefault((groups.of(name), len(shapes[name]) > 1), []).append(name)
    return [
        {
            "params": [parts[name] for name in names],
            "rate": rate,
            "matrices": matrices,
            "weight_decay": config.weight_decay if matrices else 0.0,
            "least_norms": [config.trust_floor * xavier_norm(shapes[name]) for name in names],
        }
        for (rate, matrices), names in members.items()
    ]


def xavier_norm(shape: tuple[int, ...]) -> float:
    """The norm of a matrix of this shape that starts as Xavier's: `sqrt(2 m n / (m + n))`."""
    rows, columns = shape[0], prod(shape[1:])
    return sqrt(2 * rows * columns / (rows + columns))


def build_optimizer(
    config: OptimizerConfig,
    groups: list[dict[str, Any]],
    sum_over_parts: Callable[[Tensor], Tensor],
) -> Optimizer:
    """The recipe's optimizer over `parameter_groups`."""
    rate, betas, eps = config.learning_rate, config.betas, config.eps
    match config.name:
        case "lamb":
            return Lamb(groups, rate, betas=betas, eps=eps, sum_over_parts=sum_over_parts)
        case "adamw":
            return FreezableAdamW(groups, rate, betas=betas, eps=eps, fused=True)


def start_moments(optimizer: Optimizer, parts: Iterable[Tensor]) -> None:
    """Moments of 0 before the first step, so that a checkpoint always has the same tensors. The
    parts move together, so they share one count of steps."""
    parts = list(parts)
    on_device = parts[0].device if isinstance(optimizer, AdamW) else None
    step = torch.zeros((), device=on_device)
    for part in parts:
        optimizer.state[part] = {
            "step": step,
            "exp_avg": torch.zeros_like(part, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(part, requires_grad=False),
        }


def set_rates(optimizer: Optimizer, rates: dict[str, float]) -> None:
    """Give each group its rate for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rates[group["rate"]]


class FreezableAdamW(AdamW):
    """torch's AdamW, but a group whose rate is 0 stays as it is, its moments too; and the parts of
    one share their count of steps, where torch adds 1 for each tensor."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update by torch's fused kernel; there is no closure to evaluate again."""
        assert closure is None
        for group in self.param_groups:
            parts = [part for part in group["params"] if part.grad is not None]
            if not group["lr"] or not parts:
                continue
            states = [self.state[part] for part in parts]
            states[0]["step"] += 1
            torch._fused_adamw_(
                parts,
                [part.grad for part in parts],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )


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


def squared_norms(tensors: list[Tensor]) -> Tensor:
    """Sum of squares of each tensor; an empty part has none."""
    return torch.stack(torch._foreach_norm(tensors)).square()
