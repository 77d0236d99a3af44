"""One process holds everything: the plain way, whose numbers every other engine trains."""

from t2v.engine.compute import prepare_blocks, set_matmul_precision
from t2v.engine.config import EngineConfig
from t2v.engine.native import NativeEngine
from t2v.engine.optimizer import Groups, OptimizerConfig
from t2v.engine.place import Place
from t2v.engine.world import World
from t2v.network.network import Network


def single_engine(
    model: Network,
    config: EngineConfig,
    optimizer: OptimizerConfig,
    world: World,
    *,
    groups: Groups,
    seed: int,
) -> NativeEngine:
    """The engine of one process; its parts are whole parameters."""
    set_matmul_precision(config)
    model.to_empty(device=world.device)
    model.init_weights(seed)
    prepare_blocks(model.blocks, config)
    return NativeEngine(
        "single",
        model,
        config,
        optimizer,
        world,
        groups=groups,
        places={name: Place(tuple(p.shape), 0) for name, p in model.named_parameters()},
    )
