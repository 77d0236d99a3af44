"""Seeds of what is drawn for a sample: functions of (seed, sample number), never of a rank."""


def mix(seed: int, number: int) -> int:
    """A 63-bit seed from two integers (SplitMix64's finalizer), unalike for neighbours."""
    value = (seed * 0x9E3779B97F4A7C15 + number + 1) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return (value ^ value >> 31) >> 1
