"""What a recipe needs before it queues: parameters, compute, memory per GPU, data, hours."""

import math
from math import prod
from typing import Any

from pydantic import Field
from rich.table import Table

from data_pipeline.errors import ConfigError
from data_pipeline.feeding.config import text_shape
from data_pipeline.strict import Strict
from data_pipeline.terminal import Terminal
from t2v.plan.communication import Communication, communication
from t2v.plan.footprint import Footprint, measure
from t2v.plan.memory import GIB, PARTS, Memory, explain_too_large, fullest, memory, moments_of
from t2v.recipe.recipe import RunConfig, accumulation_steps, method_of
from t2v.watching.rates import peak_tflops

ASSUMED_GPU = "H100 SXM"
UTILISATIONS = (0.2, 0.35, 0.5)
TYPICAL = 0.35
GB_PER_SECOND = 50.0  # of each GPU: a network of 400 Gbit/s


class Compute(Strict):
    """TFLOP of one sample; a multiplication and an addition count as two."""

    forward: float
    training: float = Field(description="forward and backward: three times forward")
    without_gradient: float = Field(description="passes without gradient, if any")
    recomputation: float = Field(description="activation checkpointing's second forward, if any")
    spent: float = Field(description="all three of these")


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
    pixel_share: float = Field(description="pixels that a batch shows of a clip / its pixels")
    tflop_per_sample: Compute
    memory_gib: Memory
    step: Step
    total_steps: int
    total_samples: int
    assumed_gpu: str
    assumed_peak_tflops: float
    forecasts: list[Forecast]
    communication: Communication
    method: dict[str, Any] = Field(description="what the method tells of itself")

    def to_json(self) -> str:
        """The plan as JSON text."""
        return self.model_dump_json(indent=2)


def plan(
    config: RunConfig,
    *,
    gpus: int,
    gpu_memory_gib: float,
    gb_per_second: float = GB_PER_SECOND,
) -> Plan:
    """The forecast of a run; ConfigError for a run that cannot be."""
    refuse_impossible_site(config, gpus, gpu_memory_gib, gb_per_second)
    if gpus % config.engine.dp_replicate:
        raise ConfigError(
            f"engine.dp_replicate: {config.engine.dp_replicate} is wrong because it does not "
            f"divide {gpus} GPUs; use a divisor, or 1."
        )
    accumulation = accumulation_steps(config, gpus)
    footprint = measure(config)
    needed = memory(config, footprint, gpus)
    if needed.total > gpu_memory_gib:
        raise ConfigError(
            explain_too_large(config, footprint, needed, gpus=gpus, gpu_memory_gib=gpu_memory_gib)
        )
    compute = compute_per_sample(config, footprint)
    view, samples = config.method.view, config.global_batch_size
    patch_pixels = view.levels * prod(view.patch_size)
    text = text_shape(config.conditioning)
    peak = assumed_peak(config)
    forecasts = [
        _forecast(config, compute.spent * samples / (gpus * peak * share), share)
        for share in UTILISATIONS
    ]
    refuse_short_deadline(config, forecasts[0].step_seconds / accumulation)
    return Plan(
        recipe=config.name,
        gpus=gpus,
        gpu_memory_gib=gpu_memory_gib,
        engine=config.engine.kind,
        precision=config.engine.precision,
        parameters=sum(footprint.parameters.values()),
        parameters_by_part=footprint.parameters,
        pixel_share=patch_pixels / prod(view.clip_size),
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
        assumed_gpu=ASSUMED_GPU,
        assumed_peak_tflops=peak,
        forecasts=forecasts,
        communication=communication(config, footprint, gpus, gb_per_second),
        method=footprint.method,
    )


def refuse_impossible_site(
    config: RunConfig, gpus: int, gpu_memory_gib: float, gb_per_second: float
) -> None:
    """ConfigError where no setting of the engine would run there."""
    if gpus < 1:
        raise ConfigError(
            f"--gpus: {gpus} is wrong because nothing runs on that; give at least one GPU."
        )
    if not 0 < gpu_memory_gib < math.inf:
        raise ConfigError(
            f"--gpu-memory-gib: {gpu_memory_gib:g} is wrong because no GPU has that; give its "
            "memory in GiB."
        )
    if not 0 < gb_per_second < math.inf:
        raise ConfigError(
            f"--gpu-gb-per-second: {gb_per_second:g} is wrong because nothing travels at that; "
            "give what a GPU receives, in GB/s."
        )
    if config.engine.kind == "single" and gpus > 1:
        raise ConfigError(
            f"engine.kind: 'single' is wrong because there are {gpus} GPUs; use 'fsdp', or one GPU."
        )


def refuse_short_deadline(config: RunConfig, micro_batch_seconds: float) -> None:
    """ConfigError where the watchdog would take a healthy micro-batch for a hang."""
    allowed = config.watchdog.step_seconds
    if micro_batch_seconds > allowed:
        raise ConfigError(
            f"watchdog.step_seconds: {allowed:g} is wrong because a micro-batch may take "
            f"{micro_batch_seconds:.0f} s; raise it above that, or lower micro_batch_size."
        )


def compute_per_sample(config: RunConfig, footprint: Footprint) -> Compute:
    """TFLOP of a sample by what they are for."""
    forward = footprint.forward_flops / 1e12
    without_gradient = method_of(config).passes_without_gradient * forward
    recomputes = config.engine.activation_checkpointing == "blocks"
    return Compute(
        forward=forward,
        training=3 * forward,
        without_gradient=without_gradient,
        recomputation=forward if recomputes else 0.0,
        spent=(4 if recomputes else 3) * forward + without_gradient,
    )


def samples_per_gpu_second(config: RunConfig) -> float:
    """What one GPU takes at the middle of the assumed utilisations."""
    spent = compute_per_sample(config, measure(config)).spent
    return assumed_peak(config) * TYPICAL / spent


def assumed_peak(config: RunConfig) -> float:
    """TFLOP/s of the assumed GPU at a recipe's precision."""
    peak = peak_tflops(ASSUMED_GPU, config.engine.precision)
    assert peak is not None
    return peak


def _forecast(config: RunConfig, step_seconds: float, utilisation: float) -> Forecast:
    return Forecast(
        utilisation=utilisation,
        step_seconds=step_seconds,
        samples_per_second=config.global_batch_size / step_seconds,
        hours=step_seconds * config.total_steps / 3600,
    )


def print_plan(plan: Plan, console: Terminal | None = None) -> None:
    """The plan as tables."""
    console = console or Terminal()
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
    told = plan.communication
    if told.models_gathered:
        console.print(
            f"A GPU receives {told.gathered_gib:,.1f} GiB of weights per step (the whole model "
            f"{told.models_gathered:g} times) and {told.reduced_gib:,.1f} GiB of gradients: "
            f"{told.seconds:,.1f} s at {told.gb_per_second:g} GB/s, as far as it does not overlap."
        )
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
    table.add_row("pixels of a sample", f"{plan.pixel_share:.2%} of the clip")
    for name, value in plan.method.items():
        values = value if isinstance(value, list) else [value]
        table.add_row(name, " + ".join(f"{one:,}" for one in values))
    return table


def _memory_table(plan: Plan) -> Table:
    table = Table("memory per GPU", "GiB", "when")
    sizes = plan.memory_gib.model_dump(include=set(PARTS))
    for name, size in sizes.items():
        table.add_row(name.replace("_", " "), f"{size:,.2f}", moments_of(name))
    told = plan.memory_gib
    if told.host:
        table.add_row("offloaded to the host", f"{told.host:,.2f}", "not of the GPU")
    table.add_row("a checkpoint's copy on the host", f"{told.host_copy:,.2f}", "not of the GPU")
    total = f"{told.total:,.2f} of {plan.gpu_memory_gib:g}"
    table.add_row("at its fullest", total, fullest(sizes))
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
