"""A pyramid that begins as its low-resolution base."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from data_pipeline.errors import ConfigError
from data_pipeline.printable import say
from data_pipeline.strict import Strict
from t2v.checkpoint.compatibility import WEIGHTS, kinds_of, refuse_differences, weights_in
from t2v.checkpoint.finding import resolve_checkpoint
from t2v.checkpoint.manifest import read_manifest
from t2v.checkpoint.tensor_files import Slice, TensorKind, read_slices, read_whole
from t2v.engine.engine import Engine
from t2v.methods.method import Method
from t2v.network.interpolation import interpolation_matrix

LONGEST_PLAN = 10**6  # characters
# Fields whose change keeps every shape and still makes another network.
SAME_CONDITIONING = ("kind", "encoder", "num_classes")


class WarmStartConfig(Strict):
    """Where a run's first weights come from."""

    checkpoint: str = Field(description="a step folder, or a run folder: its newest valid step")
    weights: str = Field(default="ema", pattern="^(ema|raw)$")
    resize_positions: bool = Field(
        default=False, description="interpolate position tables of another token grid"
    )
    new_learning_rate_scale: float = Field(
        default=1.0, gt=0, description="rate of what a base lacks: fusion, level embedding"
    )
    new_warmup_steps: int = Field(default=0, ge=0, description="linear warm-up of these, on top")
    freeze_base_steps: int = Field(
        default=0, ge=0, description="updates that move only these, at first"
    )


@dataclass(frozen=True)
class WarmStart:
    """Names of weights by what becomes of them."""

    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = []
        for what in ("resized", "new", "ignored"):
            names = getattr(self, what)
            lines.append(f"  {what}: {', '.join(names) or 'none'}")
        return "\n".join([f"  loaded: {len(self.loaded)} tensors", *lines])


def warm_start(settings: WarmStartConfig, method: Method, engine: Engine) -> WarmStart:
    """Give the model a base's weights; new ones keep their initial values."""
    folder = resolve_checkpoint(settings.checkpoint, engine.world)
    refuse_other_network(folder, read_manifest(folder).config, method, settings)
    prefix, base = WEIGHTS[settings.weights], weights_in(folder, settings.weights)
    places = engine.places()
    model = {name: Slice(part, places[name]) for name, part in engine.parameters().items()}
    plan = plan_warm_start(
        folder, base, kinds_of(model), method, resize_positions=settings.resize_positions
    )

    def read() -> None:
        read_slices(folder, {prefix + name: model[name] for name in plan.loaded})
        for name in plan.resized:
            table = read_whole(folder, prefix + name)
            length = model[name].place.shape[0]
            assign(model[name], resize_table(table, length, aligned_start="frames" in name))

    engine.world.on_all(read)
    engine.refresh()
    if engine.world.is_first:
        say(f"warm start from {folder} ({settings.weights} weights)\n{plan}", most=LONGEST_PLAN)
    return plan


def plan_warm_start(
    folder: Path,
    base: dict[str, TensorKind],
    model: dict[str, TensorKind],
    method: Method,
    *,
    resize_positions: bool,
) -> WarmStart:
    """What becomes of every name of either side; ConfigError for whatever is not foreseen."""
    plan = WarmStart()
    expected = {}
    for name, kind in model.items():
        if name not in base and method.new_parameters.fullmatch(name):
            plan.new.append(name)
        elif (
            resize_positions
            and method.position_tables.fullmatch(name)
            and _other_length(base, name, kind)
        ):
            plan.resized.append(name)
        else:
            plan.loaded.append(name)
            expected[name] = kind
    for name in base.keys() - model.keys():
        if method.new_parameters.fullmatch(name):
            plan.ignored.append(name)
    settled = {*plan.ignored, *plan.resized}
    found = {name: kind for name, kind in base.items() if name not in settled}
    refuse_differences(folder, found, expected)
    plan.ignored.sort()
    return plan


def refuse_other_network(
    folder: Path, base: dict, method: Method, settings: WarmStartConfig
) -> None:
    """ConfigError where weights of equal shapes would mean something else."""
    conditioning = method.conditioning.model_dump(mode="json")
    differences = [("method.kind", base["method"]["kind"], method.config.kind)]
    if differences[0][1] == differences[0][2]:
        found = method.problem_with_base(base["method"], resized=settings.resize_positions)
        if found is not None:
            differences.append((f"method.{found[0]}", *found[1:]))
    for name in SAME_CONDITIONING:
        old, new = base["conditioning"].get(name), conditioning.get(name)
        differences.append((f"conditioning.{name}", old, new))
    for place, old, new in differences:
        if old != new:
            raise ConfigError(
                f"{place}: {new} is wrong because the base {folder} has {old}; use {old}, or "
                "another base."
            )


def resize_table(table: Tensor, length: int, *, aligned_start: bool) -> Tensor:
    """A position table at another number of tokens over the same extent, by linear interpolation.

    Space is aligned at token centres, time at frame starts, as everywhere.
    """
    anchor = 0.0 if aligned_start else 0.5
    places = (torch.arange(length) + anchor) * (len(table) / length) - anchor
    return interpolation_matrix(places[None], len(table))[0] @ table


def assign(target: Slice, values: Tensor) -> None:
    """Copy a part's share of a whole tensor into it."""
    mine = values.flatten()[target.place.offset :][: target.part.numel()]
    target.part.copy_(mine.view_as(target.part))


def _other_length(base: dict[str, TensorKind], name: str, kind: TensorKind) -> bool:
    """Whether the base has this table with another number of positions, and else alike."""
    old = base.get(name)
    return (
        old is not None
        and old.dtype == kind.dtype
        and old.shape[1:] == kind.shape[1:]
        and old.shape != kind.shape
    )
