"""Memory of one GPU at its fullest moment, by part, and the change that makes a recipe fit."""

from dataclasses import dataclass

from pydantic import Field

from data_pipeline.strict import Strict
from t2v.engine.config import BUCKET_ELEMENTS
from t2v.plan.footprint import Footprint
from t2v.recipe.recipe import RunConfig

GIB = 2**30
RESERVE_GIB = 2.0  # CUDA context, communication buffers, the allocator's gaps
MOST_GPUS = 8192
FP32 = 4


class Memory(Strict):
    """GiB of one GPU by part. Not all parts are there at once: the fullest of three moments of a
    step counts in the total."""

    weights: float
    optimizer: float
    ema: float
    reserve: float = Field(description="CUDA context, communication, gaps; an assumption")
    gathered_weights: float = Field(description="whole blocks, or bf16 copies")
    batch: float = Field(description="patches and noise")
    activations: float = Field(description="an estimate, without torch.compile's savings")
    earlier_gradients: float = Field(description="of the step's earlier micro-batches")
    summed_gradients: float = Field(description="not yet split over ranks")
    gradients: float
    optimizer_step: float = Field(description="temporary tensors of the update")
    total: float
    host: float = Field(default=0.0, description="of the CPU, per GPU: what is offloaded to it")
    host_copy: float = Field(description="of the CPU, per GPU: what a checkpoint is written from")


ALWAYS = ("weights", "optimizer", "ema", "reserve")
MOMENTS = {
    "backward begins": (*ALWAYS, "gathered_weights", "batch", "activations", "earlier_gradients"),
    "backward ends": (*ALWAYS, "gathered_weights", "batch", "summed_gradients", "gradients"),
    "update": (*ALWAYS, "gradients", "optimizer_step"),
}
PARTS = tuple(dict.fromkeys(part for parts in MOMENTS.values() for part in parts))


@dataclass(frozen=True)
class Held:
    """Bytes that an engine keeps of a model on one rank."""

    weights: float
    gradients: float
    optimizer: float
    ema: float
    earlier: float
    gathered: float = 0.0
    summed: float = 0.0
    stepping: float = 0.0
    host: float = 0.0


def fullest(sizes: dict[str, float]) -> str:
    """The moment of a step at which the parts that are there then add up to most."""
    return max(MOMENTS, key=lambda moment: sum(sizes[part] for part in MOMENTS[moment]))


def moments_of(part: str) -> str:
    """When a part is there, in words."""
    if part in ALWAYS:
        return "always"
    moments = ", ".join(moment for moment, parts in MOMENTS.items() if part in parts)
    return moments.replace("backward begins, backward ends", "backward")


def memory(config: RunConfig, footprint: Footprint, gpus: int) -> Memory:
    """Memory of one GPU at its fullest moment."""
    samples = config.micro_batch_size
    match config.engine.kind:
        case "single":
            held = held_by_single(config, footprint, gpus)
        case "fsdp":
            held = held_by_fsdp(config, footprint, gpus)
        case "zero":
            held = held_by_zero(config, footprint, gpus)
    # gradients of the largest activations lie next to them
    activations = samples * (
        kept_per_sample(config, footprint) + 2 * footprint.largest_tensor_bytes
    )
    values = samples * config.method.values_per_sample
    replicas = config.engine.dp_replicate
    saved = FP32 * (3 + averages(config))  # of each parameter: weight, two moments, averages
    batch = values * (1 + 6 * 4)  # bytes, and in fp32: x, noise, x_noisy, scaled, target, output
    sizes = {
        "weights": held.weights,
        "optimizer": held.optimizer,
        "ema": held.ema,
        "reserve": RESERVE_GIB * GIB,
        "gathered_weights": held.gathered,
        "batch": batch,
        "activations": activations,
        "earlier_gradients": held.earlier,
        "summed_gradients": held.summed,
        "gradients": held.gradients,
        "optimizer_step": held.stepping,
    }
    return Memory(
        **{part: size / GIB for part, size in sizes.items()},
        total=sum(sizes[part] for part in MOMENTS[fullest(sizes)]) / GIB,
        host=held.host / GIB,
        host_copy=saved * sum(footprint.parameters.values()) * replicas / gpus / GIB,
    )


def kept_per_sample(config: RunConfig, footprint: Footprint) -> int:
    """Bytes that the forward pass of one sample keeps for its backward pass."""
    match config.engine.activation_checkpointing:
        case "none":
            return footprint.kept_bytes
        case "selective":
            recomputed = footprint.kept_by_largest_block_bytes
            kept = footprint.kept_between_blocks_bytes + footprint.kept_products_bytes
            return min(kept + recomputed, footprint.kept_bytes)
        case "blocks":
            return footprint.kept_between_blocks_bytes + footprint.kept_by_largest_block_bytes


def held_by_single(config: RunConfig, footprint: Footprint, gpus: int) -> Held:
    """Everything, whole."""
    whole = 4 * sum(footprint.parameters.values())
    earlier = whole if accumulates(config, gpus) else 0
    # autocast keeps a bf16 copy of each weight until the backward pass is over
    copies = whole / 2 if config.engine.precision == "bf16" else 0
    return Held(
        whole,
        whole,
        2 * whole,
        averages(config) * whole,
        earlier,
        gathered=copies,
        stepping=stepping(config, footprint, whole),
    )


def held_by_fsdp(config: RunConfig, footprint: Footprint, gpus: int) -> Held:
    """A shard of everything, and what is gathered of it in between."""
    engine = config.engine
    whole = 4 * sum(footprint.parameters.values())
    two_blocks = 4 * 2 * footprint.largest_block_parameters
    shard = whole * engine.dp_replicate / gpus
    gathered = two_blocks if engine.reshard_after_forward else whole
    gathered /= 2 if engine.precision == "bf16" else 1
    earlier, summed = 0.0, two_blocks
    if accumulates(config, gpus):
        earlier, summed = (whole, whole) if engine.accumulate == "whole" else (shard, two_blocks)
    return Held(
        shard,
        shard,
        2 * shard,
        averages(config) * shard,
        earlier,
        gathered,
        summed,
        stepping(config, footprint, shard),
    )


def held_by_zero(config: RunConfig, footprint: Footprint, gpus: int) -> Held:
    """Weights to compute with, whole or (stage 3) split, beside a shard of all that is fp32."""
    engine = config.engine
    count = sum(footprint.parameters.values())
    whole, shard = 4 * count, 4 * count / gpus
    two_blocks = 4 * 2 * footprint.largest_block_parameters
    bucket = 4 * min(BUCKET_ELEMENTS, count)
    working, gathered = (shard, two_blocks) if engine.zero_stage == 3 else (whole, 0)
    if engine.precision == "bf16":
        # autocast's copies, as long as they are in use
        gathered = gathered / 2 + gathered if engine.zero_stage == 3 else whole / 2
    earlier = whole if accumulates(config, gpus) else 0
    # Stage 1 splits gradients after the backward pass only, and so do all in accumulation: what is
    # split off is no longer whole. A bucket is flattened into another before it is exchanged.
    summed = bucket + whole - shard if engine.zero_stage == 1 or earlier else 2 * bucket
    kept = averages(config)
    if engine.offload_optimizer:
        return Held(working, 0, 0, 0, earlier, gathered, summed, host=(5 + kept) * shard)
    return Held(
        working + shard, shard, 2 * shard, kept * shard, earlier, gathered, summed, stepping=shard
    )


def averages(config: RunConfig) -> int:
    """How many averages of the weights are kept."""
    return 1 + len(config.ema_lengths or ())


def accumulates(config: RunConfig, gpus: int) -> bool:
    """Whether a rank takes more than one micro-batch per step."""
    return config.global_batch_size > config.micro_batch_size * gpus


def stepping(config: RunConfig, footprint: Footprint, shard: float) -> float:
    """Temporary tensors of LAMB, which holds updates until their norms are known, and of Muon,
    which orthogonalises one whole matrix of a block at a time."""
    match config.optimizer.name:
        case "lamb":
            return 3 * shard
        case "muon":
            return 4 * footprint.largest_block_parameters
        case _:
            return 0


def explain_too_large(
    config: RunConfig, footprint: Footprint, needed: Memory, *, gpus: int, gpu_memory_gib: float
) -> str:
    """The arithmetic, and the first change that makes it fit."""
    sizes = needed.model_dump(include=set(PARTS))
    terms = [
        f"{sizes[part]:.1f} {part.replace('_', ' ')}"
        for part in MOMENTS[fullest(sizes)]
        if sizes[part] >= 0.05
    ]
    return (
        f"--gpu-memory-gib: {gpu_memory_gib:g} is wrong because each GPU needs {needed.total:.1f} "
        f"GiB ({' + '.join(terms)}); "
        f"{_remedy(config, footprint, gpus, gpu_memory_gib)}."
    )


def _remedy(config: RunConfig, footprint: Footprint, gpus: int, gpu_memory_gib: float) -> str:
    """The gentlest change that fits: recompute, split more, smaller micro-batches, more GPUs."""

    def fits(changed: RunConfig, gpus: int) -> bool:
        even = changed.global_batch_size % (changed.micro_batch_size * gpus) == 0
        even = even and gpus % changed.engine.dp_replicate == 0
        return even and memory(changed, footprint, gpus).total <= gpu_memory_gib

    if gpu_memory_gib <= RESERVE_GIB:
        return f"no recipe fits, for {RESERVE_GIB:g} GiB are set aside: give a GPU that has more"
    changes: dict[str, object] = {}
    least = config
    for name, value in _knobs(config, gpus):
        changes[name] = value
        least = _with_engine(config, **changes)
        if fits(least, gpus):
            return f"set {_named(changes)}"
    for size in range(config.micro_batch_size - 1, 0, -1):
        if fits(least.model_copy(update={"micro_batch_size": size}), gpus):
            return f"set {_named(changes)} and micro_batch_size={size}"
    if config.engine.kind == "single":
        changes["kind"] = "fsdp"
    least = _with_engine(config, **changes).model_copy(update={"micro_batch_size": 1})
    for number in range(gpus + 1, MOST_GPUS + 1):
        if fits(least, number):
            return f"use {number} GPUs, {_named(changes)} and micro_batch_size=1"
    return "no number of GPUs helps: use a smaller network, or smaller patches or clips"


def _knobs(config: RunConfig, gpus: int) -> list[tuple[str, object]]:
    """Settings of the engine that save memory and cost time, cheapest first."""
    engine = config.engine
    knobs: list[tuple[str, object]] = []
    if engine.activation_checkpointing == "none":
        knobs.append(("activation_checkpointing", "selective"))
    if engine.activation_checkpointing != "blocks":
        knobs.append(("activation_checkpointing", "blocks"))
    if engine.kind == "fsdp" and engine.accumulate == "whole" and accumulates(config, gpus):
        knobs.append(("accumulate", "shards"))
    if engine.dp_replicate > 1:
        knobs.append(("dp_replicate", 1))
    if engine.kind == "zero":
        knobs += [("zero_stage", stage) for stage in range(engine.zero_stage + 1, 4)]
        knobs.append(("offload_optimizer", True))
    return knobs


def _named(changes: dict[str, object]) -> str:
    """Changes as overrides of the command line."""
    return ", ".join(f"engine.{name}={str(value).lower()}" for name, value in changes.items())


def _with_engine(config: RunConfig, **changes: object) -> RunConfig:
    return config.model_copy(update={"engine": config.engine.model_copy(update=changes)})
