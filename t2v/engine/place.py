"""Where a rank's part of a parameter lies."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A part is elements `[offset, offset + its length)` of the flattened parameter."""

    shape: tuple[int, ...]
    offset: int
    # Whether this rank writes the part into checkpoints; further replicas of it do not.
    kept: bool = True
