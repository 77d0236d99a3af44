"""What a recipe needs before it queues: parameters, compute, memory per GPU, data, hours."""

from math import prod

from pydantic import Field
from rich.console import Console
from rich.table import Table

from data_pipeline.errors import ConfigError
from data_pipeline.strict import Strict
from t2v.config import RunConfig, text_shape
from t2v.footprint import Footprint, measure
from t2v.sampling_config import network_calls
from t2v.train.loop import accumulation_steps

# Dense matrix products of an H100 SXM, by its data sheet.
PEAK_TFLOPS = {"fp32": 67.0, "tf32": 494.7, "bf16": 989.4}
UTILISATIONS = (0.2, 0.35, 0.5)
GIB = 2**30
RESERVE_GIB = 2.0  # CUDA context, communication buffers, the allocator's gaps
MOST_GPUS = 8192


class Compute(Strict):
    """TFLOP of one sample; a multiplication and an addition count as two."""

    forward: float
    training: float = Field(description="forward and backward: three times forward")
    self_conditioning: float = Field(description="the pass without gradient, if any")
    recomputation: float = Field(description="activation checkpointing's second forward, if any")
    spent: float = Field(description="all of training, self-conditioning and recomputation")


class Memory(Strict):
    """GiB of one GPU. The backward pass and the optimizer's step are not at the same time: the
    larger of the two counts in the total."""

    weights: float
    gradients: float
    optimizer: float
    ema: float
    reserve: float = Field(description="CUDA context, communication, gaps; an assumption")
    gathered_weights: float = Field(description="backward: whole blocks, or bf16 copies")
    summed_gradients: float = Field(description="backward: not yet split over ranks")
    activations: float = Field(description="backward: an estimate, without torch.compile's savings")
    batch: float = Field(description="backward: patches and noise")
    optimizer_step: float = Field(description="LAMB's temporary updates")
    total: float


BACKWARD = ("gathered_weights", "summed_gradients", "activations", "batch")


class Step(Strict):
    """What passes through one optimizer step."""

    samples: int
    samples_per_gpu: int
    accumulation_steps: int
    patch_gib: float = Field(description="decoded patches, over all GPUs")
    embedding_gib: float = Field(description="text embeddings at their longest, over all GPUs")


class Forecast(Strict):
    """How fast, if GPUs reach this share of their peak."""

    utilisation: float
    step_seconds: float
    samples_per_second: float
    hours: float


class Plan(Strict):
    """Everything `t2v plan` prints."""

    recipe: str
    gpus: int
    gpu_memory_gib: float
    engine: str
    precision: str
    parameters: int
    parameters_by_part: dict[str, int]
    tokens_per_patch: int
    pixel_share: float = Field(description="pixels of all patches / pixels of the clip")
    tflop_per_sample: Compute
    memory_gib: Memory
    step: Step
    total_steps: int
    total_samples: int
    assumed_gpu: str
    assumed_peak_tflops: float
    forecasts: list[Forecast]
    sampling_network_calls: list[int] = Field(description="per clip and level, without guidance")

    def to_json(self) -> str:
        """The plan as JSON text."""
        return self.model_dump_json(indent=2)


def plan(config: RunConfig, *, gpus: int, gpu_memory_gib: float) -> Plan:
    """The forecast of a run; ConfigError for a run that cannot be."""
    if gpus < 1 or gpu_memory_gib <= 0:
        raise ConfigError(
            f"--gpus: {gpus} with {gpu_memory_gib:g} GiB each is wrong because nothing runs on "
            "that; give at least one GPU."
        )
    if config.engine.kind == "single" and gpus > 1:
        raise ConfigError(
            f"engine.kind: 'single' is wrong because there are {gpus} GPUs; use 'fsdp', or one GPU."
        )
    accumulation = accumulation_steps(config, gpus)
    footprint = measure(config)
    needed = memory(config, footprint, gpus)
    if needed.total > gpu_memory_gib:
        raise ConfigError(_too_large(config, footprint, needed, gpus, gpu_memory_gib))
    compute = compute_per_sample(config, footprint)
    pyramid, samples = config.pyramid, config.global_batch_size
    patch_pixels = pyramid.levels * prod(pyramid.patch_size)
    text = text_shape(config.conditioning)
    peak = PEAK_TFLOPS[config.engine.precision]
    return Plan(
        recipe=config.name,
        gpus=gpus,
        gpu_memory_gib=gpu_memory_gib,
        engine=config.engine.kind,
        precision=config.engine.precision,
        parameters=sum(footprint.parameters.values()),
        parameters_by_part=footprint.parameters,
        tokens_per_patch=prod(pyramid.patch_size) // prod(config.model.token_size),
        pixel_share=patch_pixels / prod(pyramid.clip_size),
        tflop_per_sample=compute,
        memory_gib=needed,
        step=Step(
            samples=samples,
            samples_per_gpu=samples // gpus,
            accumulation_steps=accumulation,
            patch_gib=samples * patch_pixels * 3 / GIB,
            embedding_gib=samples * prod(text) * 2 / GIB if text else 0.0,
        ),
        total_steps=config.total_steps,
        total_samples=config.total_steps * samples,
        assumed_gpu="H100 SXM",
        assumed_peak_tflops=peak,
        forecasts=[
            _forecast(config, compute.spent * samples / (gpus * peak * share), share)
            for share in UTILISATIONS
        ],
        sampling_network_calls=network_calls(config.sampling, pyramid),
    )


def compute_per_sample(config: RunConfig, footprint: Footprint) -> Compute:
    """TFLOP of a sample by what they are for."""
    forward = footprint.forward_flops / 1e12
    self_conditioning = forward if config.model.self_conditioning_rate > 0 else 0.0
    recomputation = forward if config.engine.activation_checkpointing else 0.0
    return Compute(
        forward=forward,
        training=3 * forward,
        self_conditioning=self_conditioning,
        recomputation=recomputation,
        spent=3 * forward + self_conditioning + recomputation,
    )


def samples_per_gpu_second(config: RunConfig) -> float:
    """What one GPU takes at the middle of the assumed utilisations."""
    share = sorted(UTILISATIONS)[len(UTILISATIONS) // 2]
    spent = compute_per_sample(config, measure(config)).spent
    return PEAK_TFLOPS[config.engine.precision] * share / spent


def memory(config: RunConfig, footprint: Footprint, gpus: int) -> Memory:
    """Memory of one GPU at its fullest moment."""
    engine, samples = config.engine, config.micro_batch_size
    count = sum(footprint.parameters.values())
    two_blocks = 2 * footprint.largest_block_parameters
    if engine.kind == "single":
        shard = 4 * count
        # autocast keeps a bf16 copy of each weight until the backward pass is over
        gathered = 2 * count if engine.precision == "bf16" else 0
        summed = 0
    else:
        shard = 4 * count / gpus
        gathered = two_blocks if engine.reshard_after_forward else count
        gathered *= 2 if engine.precision == "bf16" else 4
        # until its last micro-batch, a step sums whole gradients on every rank
        summed = 4 * (count if config.global_batch_size > samples * gpus else two_blocks)
    kept = footprint.kept_bytes
    if engine.activation_checkpointing:
        kept = footprint.kept_between_blocks_bytes + footprint.kept_by_largest_block_bytes
    # gradients of the largest activations lie next to them
    activations = samples * (kept + 2 * footprint.largest_tensor_bytes)
    values = samples * config.pyramid.levels * prod(config.pyramid.patch_size) * 3
    batch = values * (1 + 6 * 4)  # bytes, and in fp32: x, noise, x_noisy, scaled, target, output
    optimizer_step = 3 * shard if config.optimizer.name == "lamb" else 0
    reserve = RESERVE_GIB * GIB
    backward = gathered + summed + activations + batch
    return Memory(
        weights=shard / GIB,
        gradients=shard / GIB,
        optimizer=2 * shard / GIB,
        ema=shard / GIB,
        reserve=reserve / GIB,
        gathered_weights=gathered / GIB,
        summed_gradients=summed / GIB,
        activations=activations / GIB,
        batch=batch / GIB,
        optimizer_step=optimizer_step / GIB,
        total=(5 * shard + reserve + max(backward, optimizer_step)) / GIB,
    )


def _forecast(config: RunConfig, step_seconds: float, utilisation: float) -> Forecast:
    return Forecast(
        utilisation=utilisation,
        step_seconds=step_seconds,
        samples_per_second=config.global_batch_size / step_seconds,
        hours=step_seconds * config.total_steps / 3600,
    )


def _too_large(
    config: RunConfig, footprint: Footprint, needed: Memory, gpus: int, gpu_memory_gib: float
) -> str:
    """The arithmetic, and the first change that makes it fit."""
    sizes = needed.model_dump(exclude={"total"})
    stepping = needed.optimizer_step > sum(sizes[name] for name in BACKWARD)
    absent = BACKWARD if stepping else ("optimizer_step",)
    terms = [
        f"{size:.1f} {name.replace('_', ' ')}"
        for name, size in sizes.items()
        if name not in absent and size >= 0.05
    ]
    return (
        f"--gpu-memory-gib: {gpu_memory_gib:g} is wrong because each GPU needs {needed.total:.1f} "
        f"GiB ({' + '.join(terms)}); "
        f"{_remedy(config, footprint, gpus, gpu_memory_gib)}."
    )


def _remedy(config: RunConfig, footprint: Footprint, gpus: int, gpu_memory_gib: float) -> str:
    """The gentlest change that fits: recompute, smaller micro-batches, more GPUs."""

    def fits(changed: RunConfig, gpus: int) -> bool:
        even = changed.global_batch_size % (changed.micro_batch_size * gpus) == 0
        return even and memory(changed, footprint, gpus).total <= gpu_memory_gib

    recomputing = _with_engine(config, activation_checkpointing=True)
    if fits(recomputing, gpus):
        return "set engine.activation_checkpointing=true"
    for size in range(config.micro_batch_size - 1, 0, -1):
        smaller = recomputing.model_copy(update={"micro_batch_size": size})
        if fits(smaller, gpus):
            return f"set engine.activation_checkpointing=true and micro_batch_size={size}"
    least = _with_engine(recomputing, kind="fsdp").model_copy(update={"micro_batch_size": 1})
    for count in range(gpus + 1, MOST_GPUS + 1):
        if fits(least, count):
            return (
                f"use {count} GPUs, engine.kind=fsdp, engine.activation_checkpointing=true and "
                "micro_batch_size=1"
            )
    return "no number of GPUs helps: use a smaller model.latent_dim or pyramid.patch_size"


def _with_engine(config: RunConfig, **changes: object) -> RunConfig:
    return config.model_copy(update={"engine": config.engine.model_copy(update=changes)})


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """The plan as tables."""
    console = console or Console()
    step = plan.step
    console.print(f"{plan.recipe}, GPUs: {plan.gpus} ({plan.engine}, {plan.precision})")
    console.print(_model_table(plan), _memory_table(plan))
    console.print(
        f"{plan.total_steps:,} steps of {step.samples:,} samples; per GPU and step "
        f"{step.accumulation_steps} x {step.samples_per_gpu // step.accumulation_steps}.\n"
        f"A step reads {step.patch_gib:.2f} GiB of patches and at most {step.embedding_gib:.2f} "
        "GiB of embeddings, over all GPUs."
    )
    console.print(_time_table(plan))
    console.print(
        f"Assumed: {plan.assumed_gpu}, a share of its {plan.assumed_peak_tflops:g} TFLOP/s. "
        "Activations are an estimate. Measure before you trust either."
    )


def _model_table(plan: Plan) -> Table:
    table = Table("model", "")
    table.add_row("parameters", f"{plan.parameters / 1e6:,.1f} M")
    for part, count in sorted(plan.parameters_by_part.items(), key=lambda item: -item[1]):
        table.add_row(f"  {part.replace('_', '-')}", f"{count / 1e6:,.1f} M")
    for name, tflop in plan.tflop_per_sample.model_dump().items():
        table.add_row(f"{name.replace('_', '-')}, per sample", f"{tflop:,.2f} TFLOP")
    table.add_row("tokens per patch", f"{plan.tokens_per_patch:,}")
    table.add_row("pixels of a sample's patches", f"{plan.pixel_share:.2%} of the clip")
    calls = " + ".join(f"{calls:,}" for calls in plan.sampling_network_calls)
    table.add_row("network calls per sampled clip", calls)
    return table


def _memory_table(plan: Plan) -> Table:
    table = Table("memory per GPU", "GiB", "when")
    for name, size in plan.memory_gib.model_dump(exclude={"total"}).items():
        when = "backward" if name in BACKWARD else "always"
        when = "optimizer step" if name == "optimizer_step" else when
        table.add_row(name.replace("_", " "), f"{size:,.2f}", when)
    table.add_row("at its fullest", f"{plan.memory_gib.total:,.2f} of {plan.gpu_memory_gib:g}", "")
    return table


def _time_table(plan: Plan) -> Table:
    table = Table("utilisation", "seconds per step", "samples per second", "hours")
    for forecast in plan.forecasts:
        table.add_row(
            f"{forecast.utilisation:.0%}",
            f"{forecast.step_seconds:,.2f}",
            f"{forecast.samples_per_second:,.1f}",
            f"{forecast.hours:,.1f}",
        )
    return table
