"""AdamW in groups that may rest."""

from typing import Any

import torch
from torch.optim import AdamW


class FreezableAdamW(AdamW):
    """torch's AdamW, but a group whose rate is 0 stays as it is, its moments too; and the parts of
    one share their count of steps, where torch adds 1 for each tensor."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update by torch's fused kernel; there is no closure to evaluate again."""
        assert closure is None
        for group in self.param_groups:
            if group["lr"]:
                self.move(group)

    def move(self, group: dict[str, Any]) -> None:
        """One update of a group's parts that have a gradient."""
        parts = [part for part in group["params"] if part.grad is not None]
        if not parts:
            return
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
