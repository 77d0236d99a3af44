"""Optimizers on parts of parameters, in groups that learn at their own rate."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import AdamW, Optimizer

from data_pipeline.strict import Strict
from t2v.engine.adamw import FreezableAdamW
from t2v.engine.lamb import Lamb
from t2v.engine.muon import Muon
from t2v.engine.place import Place

MOMENTS = ("exp_avg", "exp_avg_sq")


class OptimizerConfig(Strict):
    """LAMB is the paper's; AdamW is torch's; Muon moves the matrices of blocks, AdamW the rest."""

    name: Literal["lamb", "adamw", "muon"]
    learning_rate: float = Field(gt=0, description="peak learning rate")
    warmup_steps: int = Field(ge=0, description="linear warm-up; then cosine down to 0")
    weight_decay: float = Field(default=0.01, ge=0)
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
        Field(strict=False),
    ] = Field(default=(0.9, 0.99), description="the first is Muon's momentum, too")
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
    places: Mapping[str, Place],
) -> list[dict[str, Any]]:
    """Parts by the rate they learn at and by how they move: vectors do not decay, and Muon is for
    the matrices of blocks. A part may be flat, so `places` tells what the whole parameter is."""
    members: dict[tuple[str, bool, bool], list[str]] = {}
    for name in parts:
        is_matrix = len(places[name].shape) > 1
        orthogonal = config.name == "muon" and is_matrix and name.startswith("blocks.")
        members.setdefault((groups.of(name), is_matrix, orthogonal), []).append(name)
    return [
        {
            "params": [parts[name] for name in names],
            "places": [places[name] for name in names],
            "rate": rate,
            "matrices": matrices,
            "orthogonal": orthogonal,
            "weight_decay": config.weight_decay if matrices else 0.0,
            "least_norms": [config.trust_floor * xavier_norm(places[n].shape) for n in names],
        }
        for (rate, matrices, orthogonal), names in members.items()
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
    rate, settings = config.learning_rate, {"betas": config.betas, "eps": config.eps}
    match config.name:
        case "lamb":
            return Lamb(groups, rate, **settings, sum_over_parts=sum_over_parts)
        case "adamw":
            return FreezableAdamW(groups, rate, **settings, fused=True)
        case "muon":
            return Muon(groups, rate, **settings, fused=True, sum_over_parts=sum_over_parts)


def start_moments(
    optimizer: Optimizer, parts: Iterable[Tensor], moments: Sequence[str] = MOMENTS
) -> None:
    """Moments of 0 before the first step, so that a checkpoint always has the same tensors. The
    parts move together, so they share one count of steps."""
    parts = list(parts)
    on_device = parts[0].device if isinstance(optimizer, AdamW) else None
    step = torch.zeros((), device=on_device)
    for part in parts:
        kept = {name: torch.zeros_like(part, requires_grad=False) for name in moments}
        optimizer.state[part] = {"step": step} | kept


def moments_of(group: Mapping[str, Any]) -> tuple[str, ...]:
    """The moments that a group's parts have: Muon keeps no square."""
    return MOMENTS[:1] if group["orthogonal"] else MOMENTS


def set_rates(optimizer: Optimizer, rates: dict[str, float]) -> None:
    """Give each group its rate for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rates[group["rate"]]
