"""Which elements of which parameter lie where in DeepSpeed's flat partitions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from t2v.engine.place import Place
from t2v.engine.world import World


@dataclass(frozen=True)
class Fragment:
    """A rank's part of a parameter: elements `[start, start + numel)` of one flat partition."""

    place: Place
    partition: int
    start: int
    numel: int

    def of(self, flat: Sequence[Tensor]) -> Tensor:
        """The fragment of whatever is laid out as the partitions are; memory is shared."""
        return flat[self.partition].detach().narrow(0, self.start, self.numel)


def partitions_of_stages_1_and_2(
    zero: Any, model: nn.Module, world: World
) -> tuple[list[Tensor], dict[str, Fragment]]:
    """Each group is one flat tensor, cut evenly: most parameters lie whole on one rank."""
    fragments = {}
    for name, parameter in model.named_parameters():
        shape, mapping = tuple(parameter.shape), getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            fragments[name] = Fragment(Place(shape, 0), 0, 0, 0)
            continue
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        fragments[name] = Fragment(
            Place(shape, here.start), mapping.param_group_index, there.start, there.numel
        )
    return list(zero.single_partition_of_fp32_groups), fragments


def partitions_of_stage_3(
    zero: Any, model: nn.Module, world: World
) -> tuple[list[Tensor], dict[str, Fragment]]:
    """Each parameter is cut evenly, its end padded; a group's cuts lie behind one another."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for number, group in enumerate(zero.fp16_groups):
        start = 0
        for parameter in group:
            length = parameter.partition_numel()
            offset = min(world.rank * length, parameter.ds_numel)
            numel = min(length, parameter.ds_numel - offset)
            place = Place(tuple(parameter.ds_shape), offset)
            found[names[id(parameter)]] = Fragment(place, number, start, numel)
            start += length
    fragments = {name: found[name] for name, _ in model.named_parameters()}
    return list(zero.fp32_partitioned_groups_flat), fragments
