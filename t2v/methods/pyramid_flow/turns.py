"""Which stage and unit a sample trains: a function of its number, so that every step has the same
mixture and about as many tokens, on however many ranks."""

import torch

from t2v.methods.seeds import mix

KEY = 0x5455524E  # keeps this draw apart from those of noise


def turn_of(
    number: int, *, stage_turns: tuple[int, ...], turn_samples: int, units: int, seed: int
) -> tuple[int, int]:
    """(stage, unit) of a sample.

    Turns of `turn_samples` samples go through `stage_turns` round after round. A round trains one
    unit at the finest stage and the one as far from the clip's other end at the coarser stages:
    long histories meet short ones. Every `units` rounds train each unit once at the finest stage,
    in a drawn order.
    """
    round_, place = divmod(number // turn_samples, len(stage_turns))
    cycle, index = divmod(round_, units)
    generator = torch.Generator().manual_seed(mix(seed ^ KEY, cycle))
    unit = int(torch.randperm(units, generator=generator)[index])
    stage = stage_turns[place]
    return stage, unit if stage == max(stage_turns) else units - 1 - unit
