"""A recipe: one complete YAML file, read strictly; its errors name field, value and remedy."""

import difflib
import math
import re
import types
import typing
from pathlib import Path

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from data_pipeline.errors import ConfigError, InputMissing
from data_pipeline.feeding.config import (
    ClassConditioning,
    Conditioning,
    DataConfig,
    TextConditioning,
)
from data_pipeline.pyramid import AXES, Pyramid
from data_pipeline.strict import Strict
from t2v.attempt.watchdog import WatchdogConfig
from t2v.checkpoint.checkpoints import CheckpointConfig
from t2v.engine.config import EngineConfig
from t2v.engine.optimizer import OptimizerConfig
from t2v.methods.hpdm.diffusion import DiffusionConfig
from t2v.methods.hpdm.network import ModelConfig
from t2v.methods.hpdm.settings import SamplingConfig
from t2v.train.held_out import HeldOutConfig
from t2v.train.warm_start import WarmStartConfig
from t2v.watching.metrics import MetricsConfig
from t2v.watching.side_job import SamplesConfig


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
    pyramid: Pyramid
    conditioning: Conditioning
    data: DataConfig
    model: ModelConfig
    diffusion: DiffusionConfig
    optimizer: OptimizerConfig
    engine: EngineConfig
    checkpoint: CheckpointConfig
    metrics: MetricsConfig
    sampling: SamplingConfig
    watchdog: WatchdogConfig = WatchdogConfig()
    warm_start: WarmStartConfig | None = None
    held_out: HeldOutConfig | None = None
    samples: SamplesConfig | None = None

    @model_validator(mode="after")
    def _refuse_what_does_not_fit_together(self) -> "RunConfig":
        pyramid, model = self.pyramid, self.model
        for axis, patch, token in zip(AXES, pyramid.patch_size, model.token_size, strict=True):
            if patch % token:
                low = max(patch // token, 1) * token
                raise ValueError(
                    f"pyramid.patch_size: {patch} ({axis}) is wrong because it is no multiple of "
                    f"model.token_size {token}; use {low} or {low + token}"
                )
        blocks = model.levels_per_block
        if blocks[-1] != pyramid.levels or sorted(blocks) != blocks or blocks[0] < 1:
            raise ValueError(
                f"model.levels_per_block: {blocks} is wrong because it does not rise from at least "
                f"1 to pyramid.levels = {pyramid.levels}; let its last entry cover every level"
            )
        if problem := self.sampling.problem_with(pyramid, model.token_size):
            raise ValueError(f"sampling.{problem}")
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size: {self.micro_batch_size} is wrong because it does not divide "
                f"global_batch_size {self.global_batch_size}; choose a divisor"
            )
        if self.engine.kind == "zero" and self.optimizer.name == "lamb":
            raise ValueError(
                "optimizer.name: 'lamb' is wrong because ZeRO splits tensors, and LAMB needs the "
                "norms of whole ones; use adamw, or engine.kind fsdp"
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
        for width, head, name in (
            (model.token_dim, model.token_head_dim, "token"),
            (model.latent_dim, model.latent_head_dim, "latent"),
        ):
            if width % head:
                raise ValueError(
                    f"model.{name}_head_dim: {head} is wrong because it does not divide "
                    f"{name}_dim {width}; choose a divisor"
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


class _UniqueKeys(yaml.SafeLoader):
    """YAML whose mappings have no key twice: the earlier value would be lost without a word."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> typing.Any:
        try:
            return super().construct_object(node, deep)
        except ValueError:  # a date such as 2026-99-99, or an integer of 5,000 digits
            text = str(node.value)[:40]
            problem = f"{text!r} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str) or key in keys:
                problem = f"key '{key}' is there twice" if key in keys else f"key {key} is no text"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            keys.add(key)
        return super().construct_mapping(node, deep)


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """The recipe at `path` with `dotted.key=value` overrides; errors say all that is wrong."""
    path = Path(path)
    if not path.is_file():
        raise InputMissing(f"{path}: no such recipe; `ls configs` shows those we ship.")
    content = read_mapping(path)
    for override in overrides:
        apply_override(content, override)
    return parse_config(content, str(path))


def read_mapping(path: Path) -> dict:
    """The mapping that a YAML file holds, no key of it twice."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        is_text = isinstance(error, (TypeError, RecursionError))
        otherwise = "of its keys or its depth" if is_text else "it is not UTF-8 text"
        reason = getattr(error, "problem", None) or otherwise
        message = f"{path}: is not valid YAML{line} because {reason}; correct it."
        raise ConfigError(message) from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: is wrong because it holds no mapping; see configs/.")
    return content


def parse_value(text: str) -> object:
    """What a value in YAML says, read like a recipe; YAMLError for what is none."""
    try:
        return yaml.load(text, _UniqueKeys)
    except (TypeError, RecursionError) as error:
        raise yaml.YAMLError(str(error)) from None


def parse_config(content: dict, origin: str) -> RunConfig:
    """A recipe from plain data; `origin` begins each line of the error."""
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        # Of the kinds that a value may have, the first one's complaint is enough.
        first = {_path_of(item): item for item in reversed(error.errors())}
        lines = [f"{origin}: {_explain(item)}" for item in reversed(first.values())]
        raise ConfigError("\n".join(lines)) from None


def dump_config(config: RunConfig) -> str:
    """The resolved recipe as YAML; `load_config` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def apply_override(content: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override}: is not an override; write dotted.key=value.")
    *parents, last = key.split(".")
    node: object = content
    for parent in parents:
        node = _child(node, parent, key)
    try:
        value = parse_value(text)
    except yaml.YAMLError:
        raise ConfigError(f"{override}: the value is not valid YAML; quote it.") from None
    if isinstance(node, list):
        node[_list_index(node, last, key)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"{key}: cannot be set because its parent holds a value; check the path.")


def _child(node: object, name: str, key: str) -> object:
    if isinstance(node, list):
        return node[_list_index(node, name, key)]
    if isinstance(node, dict):
        if node.get(name) is None:
            node[name] = {}
        return node[name]
    raise ConfigError(f"{key}: cannot be set because '{name}' is inside a value; check the path.")


def _list_index(node: list, name: str, key: str) -> int:
    if not name.isdecimal() or int(name) >= len(node):
        raise ConfigError(f"{key}: '{name}' is no entry of a list of {len(node)}; count from 0.")
    return int(name)


def _explain(error: typing.Any) -> str:
    """One line for one pydantic error: dotted path, what is wrong, what to do."""
    path, value = _path_of(error), error.get("input")
    if error["type"] == "union_tag_invalid":
        tag, known = error["ctx"]["tag"], error["ctx"]["expected_tags"]
        return f"{path}.kind: value {tag!r} is wrong because it is none of {known}; correct it."
    if error["type"] == "union_tag_not_found":
        return f"{path}.kind: missing; every recipe is complete, add it."
    if error["type"] == "extra_forbidden":
        known = _fields_at(error["loc"][:-1])
        close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(known)}."
        return f"{path}: unknown field; {hint}"
    if error["type"] == "missing":
        return f"{path}: missing; every recipe is complete, add it."
    if error["type"] == "value_error":
        message = error["msg"].removeprefix("Value error, ").removesuffix(".") + "."
        names_field = re.match(r"[a-z_]+: ", message)
        return f"{path}{'.' if names_field else ': '}{message}" if path else message
    line = f"{path}: value {value!r} is wrong because {_lower(error['msg'])}"
    if isinstance(value, str) and error["type"] == "float_type" and (number := _as_yaml(value)):
        return f"{line}. YAML reads '{value}' as text; write {number}."
    return f"{line}; correct it."


def _path_of(error: typing.Any) -> str:
    """The dotted path of an error, without the kinds that pydantic writes into it."""
    location = [str(part) for part in error["loc"]]
    if location[:1] == ["conditioning"]:
        del location[1:2]
    kinds = re.compile(r"str|float|constrained-.*|.*\[.*\]")
    return ".".join(part for part in location if not kinds.fullmatch(part))


def _fields_at(location: tuple) -> list[str]:
    """Field names of the model at a path of the recipe, for "did you mean"."""
    model: type[BaseModel] = RunConfig
    for part in location:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(str(part))
        candidates = list(_models_in(field.annotation)) if field else []
        if candidates:
            model = candidates[0]
        elif location[0] == "conditioning":
            kinds = {"text": TextConditioning, "class": ClassConditioning}
            model = kinds.get(str(part), model)
    return list(model.model_fields)


def _models_in(annotation: typing.Any) -> typing.Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)


def _as_yaml(text: str) -> str | None:
    """`1e-4` as `1.0e-4`, which YAML 1.1 reads as a number; None for what is not one."""
    match = re.fullmatch(r"([-+]?\d+)(\.\d*)?[eE]([-+]?)(\d+)", text)
    if match is None:
        return None
    whole, fraction, sign, exponent = match.groups()
    return f"{whole}{fraction or '.0'}e{sign or '+'}{exponent}"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
