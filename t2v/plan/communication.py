"""What a GPU receives from others in a step, and how long that takes at a bandwidth."""

from pydantic import Field

from data_pipeline.strict import Strict
from t2v.plan.footprint import Footprint
from t2v.recipe.recipe import RunConfig, accumulation_steps, method_of

GIB = 2**30


class Communication(Strict):
    """Traffic of one GPU in one step; what overlaps with computing is not taken off."""

    models_gathered: float = Field(description="how often the whole model is put together")
    gathered_gib: float = Field(description="weights")
    reduced_gib: float = Field(description="gradients")
    gb_per_second: float = Field(description="assumed, of each GPU, each way")
    seconds: float


def communication(
    config: RunConfig, footprint: Footprint, gpus: int, gb_per_second: float
) -> Communication:
    """The forecast of a recipe's engine on `gpus`; ring algorithms, which receive all but a rank's
    own share."""
    whole = 4 * sum(footprint.parameters.values())
    weights = whole / 2 if config.engine.precision == "bf16" else whole
    models, reductions = models_gathered(config, gpus), gradients_reduced(config, gpus)
    shards = gpus // config.engine.dp_replicate if config.engine.kind == "fsdp" else gpus
    gathered = models * weights * (1 - 1 / shards)
    reduced = reductions * whole * (1 - 1 / shards)
    replicas = gpus // shards
    # Replicas add up what each holds of the gradients: once around to add, once to hand out.
    reduced += reductions * 2 * (whole / shards) * (1 - 1 / replicas)
    return Communication(
        models_gathered=models,
        gathered_gib=gathered / GIB,
        reduced_gib=reduced / GIB,
        gb_per_second=gb_per_second,
        seconds=(gathered + reduced) / (gb_per_second * 1e9),
    )


def models_gathered(config: RunConfig, gpus: int) -> float:
    """How often a step puts the whole model together."""
    engine = config.engine
    if engine.kind == "single" or gpus == 1:
        return 0.0
    keeps = not engine.reshard_after_forward if engine.kind == "fsdp" else engine.zero_stage < 3
    if keeps:
        return 1.0
    # Each forward pass and the backward pass, for every micro-batch.
    passes = 2 + method_of(config).passes_without_gradient
    return float(passes * accumulation_steps(config, gpus))


def gradients_reduced(config: RunConfig, gpus: int) -> float:
    """How often a step adds up gradients over GPUs."""
    if config.engine.kind == "single" or gpus == 1:
        return 0.0
    each = config.engine.accumulate == "shards"
    return float(accumulation_steps(config, gpus)) if each else 1.0
