"""A recipe: one complete YAML file, and what of it must fit together."""

import math
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, field_validator, model_validator

from data_pipeline.errors import ConfigError
from data_pipeline.feeding.config import (
    ClassConditioning,
    Conditioning,
    DataConfig,
    TextConditioning,
)
from data_pipeline.strict import Strict
from t2v.attempt.watchdog import WatchdogConfig
from t2v.checkpoint.config import CheckpointConfig
from t2v.checkpoint.power_average import LONGEST
from t2v.engine.config import EngineConfig
from t2v.engine.optimizer import OptimizerConfig
from t2v.methods.method import Method
from t2v.recipe.methods import METHODS, AnyMethodConfig
from t2v.recipe.reading import parse, read_mapping
from t2v.train.held_out import HeldOutConfig
from t2v.train.part_weights import Setting
from t2v.train.warm_start import WarmStartConfig
from t2v.watching.metrics import MetricsConfig
from t2v.watching.side_job import SamplesConfig

# Of the time that ranks wait for each other: the rest is for finding out which one hangs.
LEFT_TO_VOTE = 0.9
# Sections that stood at the top before there was a second method.
MOVED = ("pyramid", "model", "diffusion", "sampling")


class RunConfig(Strict):
    """Everything a run is made of."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    run_dir: str = Field(pattern=r"^[^\x00]+$", description="run folder; `runs/<name>` by custom")
    seed: int = Field(ge=0, lt=2**63)
    total_steps: int = Field(ge=1, le=10**9, description="optimizer steps")
    global_batch_size: int = Field(ge=1, le=10**9, description="clips per step, over all ranks")
    micro_batch_size: int = Field(ge=1, description="clips per forward pass of a rank")
    ema_half_life_steps: float = Field(
        gt=0, le=1e9, description="steps after which a weight counts half"
    )
    ema_lengths: list[Annotated[float, Field(gt=0, le=LONGEST)]] | None = Field(
        default=None,
        min_length=1,
        max_length=4,
        description="relative lengths of power-function averages that are kept besides, such as "
        "[0.05, 0.1], of which `t2v checkpoint export --ema-length` makes any other afterwards",
    )
    loss_weights: Setting = Field(
        default=None,
        description="what the method's parts, such as HPDM's levels, count in the gradient: a "
        "number each, or 'uncertainty', one over the part's recent mean loss; none: 1",
    )
    method: AnyMethodConfig
    conditioning: Conditioning
    data: DataConfig
    optimizer: OptimizerConfig
    engine: EngineConfig
    checkpoint: CheckpointConfig
    metrics: MetricsConfig
    watchdog: WatchdogConfig = WatchdogConfig()
    warm_start: WarmStartConfig | None = None
    held_out: HeldOutConfig | None = None
    samples: SamplesConfig | None = None

    @field_validator("run_dir")
    @classmethod
    def _refuse_what_is_no_folder(cls, run_dir: str) -> str:
        if run_dir.startswith("~"):
            raise ValueError(
                f"{run_dir!r} is wrong because no shell reads it, so it would be a folder of that "
                "name; write the whole path"
            )
        if "://" in run_dir:
            raise ValueError(
                f"{run_dir!r} is wrong because runs live on a disk that all nodes share; give a "
                "folder, and checkpoint.mirror for a store"
            )
        return run_dir

    @model_validator(mode="after")
    def _refuse_what_does_not_fit_together(self) -> "RunConfig":
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size: {self.micro_batch_size} is wrong because it does not divide "
                f"global_batch_size {self.global_batch_size}; choose a divisor"
            )
        if problem := self.method.problem_with_batches(self.global_batch_size):
            raise ValueError(f"global_batch_size: {problem}")
        if isinstance(self.loss_weights, list):
            parts = method_of(self).parts
            if len(self.loss_weights) != len(parts):
                raise ValueError(
                    f"loss_weights: {self.loss_weights} is wrong because the loss has "
                    f"{len(parts)} parts ({', '.join(parts)}); give one number each"
                )
        if self.ema_lengths and not self.checkpoint.milestone_every_steps:
            raise ValueError(
                f"ema_lengths: {self.ema_lengths} is wrong because no averages are kept to make "
                "others of; set checkpoint.milestone_every_steps to about a 20th of total_steps"
            )
        if self.engine.kind == "zero" and self.optimizer.name != "adamw":
            raise ValueError(
                f"optimizer.name: '{self.optimizer.name}' is wrong because ZeRO splits tensors, "
                "and LAMB and Muon need whole ones; use adamw, or engine.kind fsdp"
            )
        patience = self.engine.collective_timeout_seconds
        for section in ("data", "step", "checkpoint") if self.engine.kind != "single" else ():
            if (deadline := self.watchdog.deadline(section)) >= patience:
                raise ValueError(
                    f"watchdog.{section}_seconds: {deadline:g} is wrong because ranks wait only "
                    f"engine.collective_timeout_seconds = {patience:g} for each other, so the one "
                    "that hangs would not be found out; raise that above it"
                )
        weights = [source.weight for source in self.data.sources]
        total = sum(weights) // math.gcd(*weights)
        if self.global_batch_size % total:
            raise ValueError(
                f"data.sources: weights {weights} make {total} equal parts, which do not divide "
                f"global_batch_size {self.global_batch_size}; choose weights whose parts do"
            )
        if self.held_out and not self.held_out.sources and not self.data.held_out_share:
            raise ValueError(
                "held_out: there is nothing to measure on; give held_out.sources, or "
                "data.held_out_share to keep some of the training data apart"
            )
        if self.samples:
            refuse_other_subjects(self.samples, self.conditioning)
            if self.samples.automatic and self.method.cached_latents and not self.samples.vae:
                raise ValueError(
                    "samples.vae: missing; give the autoencoder of the latents, or "
                    "samples.automatic: false"
                )
        return self


def refuse_other_subjects(samples: SamplesConfig, conditioning: Conditioning) -> None:
    """ValueError where samples are asked for in a way that the recipe cannot follow."""
    if isinstance(conditioning, ClassConditioning):
        bad = [label for label in samples.labels if label >= conditioning.num_classes]
        if bad or not samples.labels:
            last = conditioning.num_classes - 1
            raise ValueError(f"samples.labels: {bad or 'none'} given; use classes 0 to {last}")
    elif isinstance(conditioning, TextConditioning):
        if not samples.prompts:
            raise ValueError("samples.prompts: missing; the recipe reads text, give some")
        if samples.automatic and not samples.encoder:
            raise ValueError(
                "samples.encoder: missing; give the text encoder of the training set, or "
                "samples.automatic: false and --encoder to t2v samples"
            )
    elif not samples.count:
        raise ValueError("samples.count: missing; the recipe has neither text nor classes")


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """The recipe at `path` with `dotted.key=value` overrides; errors say all that is wrong."""
    missing = "no such recipe; `ls configs` shows those we ship."
    content = read_mapping(Path(path), overrides, missing=missing)
    return parse_config(content, str(Path(path)))


def parse_config(content: dict, origin: str) -> RunConfig:
    """A recipe from plain data; `origin` begins each line of the error."""
    if moved := [name for name in MOVED if name in content]:
        raise ConfigError(
            f"{origin}: {', '.join(moved)}: wrong at the top because a method's settings "
            "stand in its section; write `method: {kind: hpdm, pyramid: ..., model: ..., "
            "diffusion: ..., sampling: ...}`."
        )
    return parse(RunConfig, content, origin)


def dump_config(config: RunConfig) -> str:
    """The resolved recipe as YAML; `load_config` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def method_of(config: RunConfig) -> Method:
    """The recipe's method."""
    return METHODS[config.method.kind](config.method, config.conditioning)


def longest_section_seconds(config: RunConfig) -> float:
    """How long a part of a run may take at most before other ranks give up waiting for it."""
    alone = config.engine.kind == "single"
    return math.inf if alone else LEFT_TO_VOTE * config.engine.collective_timeout_seconds


def accumulation_steps(config: RunConfig, world_size: int) -> int:
    """Micro-batches per step and rank; derived, never set."""
    count, rest = divmod(config.global_batch_size, config.micro_batch_size * world_size)
    if rest:
        raise ConfigError(
            f"global_batch_size: {config.global_batch_size} is wrong because {world_size} ranks of "
            f"micro_batch_size {config.micro_batch_size} do not divide it; change one of them."
        )
    return count
