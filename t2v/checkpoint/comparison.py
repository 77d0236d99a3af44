"""Two checkpoints side by side, tensor by tensor."""

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from data_pipeline.printable import say
from data_pipeline.terminal import Terminal
from t2v.checkpoint.proving import verify_checkpoint
from t2v.checkpoint.tensor_files import TensorKind, read_whole, tensor_kinds


@dataclass(frozen=True)
class Difference:
    """A tensor that is not the same in both; without numbers where they cannot be compared."""

    name: str
    first: TensorKind | None
    second: TensorKind | None
    differing: int = 0
    largest: float = 0.0
    relative: float = 0.0


def compare_checkpoints(first: Path, second: Path) -> tuple[int, list[Difference]]:
    """(number of tensors in either, those that differ); one pair is in memory at a time.

    `largest` is the greatest difference of two elements, `relative` the norm of the difference over
    the norm of the first tensor.
    """
    for folder in (first, second):
        verify_checkpoint(folder)
    ours, theirs = tensor_kinds(first), tensor_kinds(second)
    names = sorted(ours.keys() | theirs.keys())
    found = []
    for name in names:
        a, b = ours.get(name), theirs.get(name)
        if a is None or a != b:
            found.append(Difference(name, a, b))
            continue
        one, other = read_whole(first, name), read_whole(second, name)
        differing = int((_bits(one) != _bits(other)).sum())
        if differing:
            one, other = one.double(), other.double()
            gap = one - other
            norm = float(one.norm())
            found.append(
                Difference(
                    name,
                    a,
                    b,
                    differing,
                    float(gap.abs().max()),
                    float(gap.norm()) / norm if norm else float("inf"),
                )
            )
    return len(names), found


def _bits(tensor: Tensor) -> Tensor:
    """Elements as integers: identical is more than equal, as 0 and -0 show."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(integers[tensor.itemsize])


def print_differences(total: int, found: list[Difference]) -> None:
    """A table of what differs, worst first, and the count."""
    if found:
        table = Table("tensor", "first", "second", "elements", "largest", "relative")
        for row in sorted(found, key=lambda row: (row.first == row.second, -row.relative)):
            kinds = (str(row.first or "missing"), str(row.second or "missing"))
            alike = row.first == row.second
            numbers = (str(row.differing), f"{row.largest:.3e}", f"{row.relative:.3e}")
            table.add_row(row.name, *kinds, *(numbers if alike else ("", "", "")))
        # Names must not be cut, not even in a log.
        Terminal(width=160).print(table)
    say(f"{total - len(found)} of {total} tensors are identical.")
