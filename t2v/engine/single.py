"""One process holds everything: the plain way, whose numbers every other engine trains."""

from typing import TYPE_CHECKING

from t2v.engine.compute import prepare_blocks, set_matmul_precision
from t2v.engine.native import NativeEngine
from t2v.engine.place import Place
from t2v.engine.world import World
from t2v.methods.hpdm.network import HPDM

if TYPE_CHECKING:
    from t2v.recipe.recipe import RunConfig


def single_engine(model: HPDM, config: "RunConfig", world: World) -> NativeEngine:
    """The engine of one process; its parts are whole parameters."""
    set_matmul_precision(config.engine)
    model.to_empty(device=world.device)
    model.init_weights(config.seed)
    prepare_blocks(model.blocks, config.engine)
    return NativeEngine(
        "single",
        model,
        config,
        world,
        places={name: Place(tuple(p.shape), 0) for name, p in model.named_parameters()},
        part_of=lambda tensor: tensor,
        sum_over_parts=lambda values: values,
        exchange=lambda _: None,
        let_go=lambda: None,
    )
