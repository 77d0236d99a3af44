"""Seeds of what is drawn for a sample: functions of (seed, sample number), never of a rank."""

import torch

HELD_OUT = 0x48454C444F5554  # keeps the held-out draws apart from those of training


def mix(seed: int, number: int) -> int:
    """A 63-bit seed from two integers (SplitMix64's finalizer), unalike for neighbours."""
    value = (seed * 0x9E3779B97F4A7C15 + number + 1) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return (value ^ value >> 31) >> 1


def noise_bins(
    numbers: list[int], turns: list[int], *, bins: int, parts: int, seed: int
) -> list[list[int]]:
    """The bin of noise of each part of each sample at its turn in the held-out loss: over all turns
    a part visits every bin once, and which bins meet differs from sample to sample, as independent
    noise would have it."""
    places = []
    for number, turn in zip(numbers, turns, strict=True):
        generator = torch.Generator().manual_seed(mix(seed ^ HELD_OUT, number))
        shift = torch.randint(bins, (parts,), generator=generator).tolist()
        places.append([(first + turn) % bins for first in shift])
    return places
