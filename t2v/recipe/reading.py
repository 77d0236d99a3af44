"""How YAML and overrides are read, and how errors are told: field, value and remedy."""

import datetime
import difflib
import re
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path

import yaml
from pydantic import BaseModel, ValidationError

from data_pipeline.errors import ConfigError, InputMissing

Model = typing.TypeVar("Model", bound=BaseModel)
NUMBER = re.compile(r"tag:yaml.org,2002:(int|float)")
# To YAML 1.1, 24:00:00 is 86400, and 010 is 8.
OTHER_BASES = ((re.compile(r".*:.*"), 60), (re.compile(r"[-+]?0[0-7_]*[0-7]"), 8))
MERGE_KEY = "tag:yaml.org,2002:merge"
# How pydantic names a member of a union, or a check of one, in the location of an error.
UNION_MEMBER = re.compile(r"str|int|float|constrained-.*|.*\[.*\]")


class _UniqueKeys(yaml.SafeLoader):
    """YAML whose mappings have no key twice: the earlier value would be lost without a word."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> typing.Any:
        for form, base in OTHER_BASES if NUMBER.fullmatch(str(node.tag)) else ():
            if form.fullmatch(str(node.value)):
                problem = f"{node.value} would be a number of base {base}; put it in quotes"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        try:
            return super().construct_object(node, deep)
        except ValueError:  # a date such as 2026-99-99, or an integer of 5,000 digits
            text = str(node.value)[:40]
            problem = f"{text!r} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = set()
        for key_node, _ in node.value:
            if key_node.tag == MERGE_KEY:
                problem = "'<<' is not read here; write out what it stands for"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str) or key in keys:
                problem = f"key '{key}' is there twice" if key in keys else f"key {key} is no text"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            keys.add(key)
        return super().construct_mapping(node, deep)


def read_mapping(path: Path, overrides: Iterable[str] = (), *, missing: str) -> dict:
    """The mapping that a YAML file holds, no key of it twice, with `dotted.key=value` overrides;
    InputMissing says what is `missing` where there is no file."""
    if not path.is_file():
        raise InputMissing(f"{path}: {missing}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        message = f"{path}: is not valid YAML{line} because {_why_no_yaml(error)}; correct it."
        raise ConfigError(message) from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: is wrong because it holds no mapping; see configs/.")
    for override in overrides:
        apply_override(content, override)
    return content


def _why_no_yaml(error: Exception) -> str:
    """What is wrong with a text that cannot be read as YAML."""
    match error:
        case UnicodeDecodeError():
            return "it is not UTF-8 text"
        case yaml.reader.ReaderError():
            return f"{chr(error.character)!r} in it is no text"
        case yaml.MarkedYAMLError(problem=str(problem)):
            # PyYAML leaves the beginning of some sentences in `context`.
            return f"{error.context}, {problem}" if problem.startswith("but ") else problem
    return "of its keys or its depth"


def parse_value(text: str, origin: str) -> object:
    """What a value in YAML says, read like a recipe; ConfigError, which begins with `origin`, for
    what is none."""
    try:
        value = yaml.load(text, _UniqueKeys)
    except (yaml.YAMLError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{origin}: the value is not valid YAML because {_why_no_yaml(error)}; correct or "
            "quote it."
        ) from None
    # What stands on a command line has no comments: `run_dir=/x/run #1` is a folder's name.
    is_plain = isinstance(value, str) and text.lstrip()[:1] not in ("'", '"', "|", ">")
    return text.strip() if is_plain and "#" in text else value


def apply_override(content: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    *parents, last = key.split(".")
    if not equals or not all([*parents, last]):
        raise ConfigError(f"{override}: is not an override; write dotted.key=value.")
    node: object = content
    for parent in parents:
        node = _child(node, parent, key)
    value = parse_value(text, override)
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


def parse(
    model: type[Model],
    content: object,
    origin: str,
    *,
    hides: Callable[[str, object], bool] = lambda path, value: False,
) -> Model:
    """A strict model from plain data; ConfigError tells all that is wrong, a line each, which
    begins with `origin` and shows no value that `hides` keeps back by its path."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        # Of the kinds that a value may have, the first one's complaint is enough.
        first = {_place(item["loc"], model)[0]: item for item in reversed(error.errors())}
        lines = [f"{origin}: {_explain(item, model, hides)}" for item in reversed(first.values())]
        raise ConfigError("\n".join(lines)) from None


def _explain(
    error: typing.Any, model: type[BaseModel], hides: Callable[[str, object], bool]
) -> str:
    """One line for one pydantic error: dotted path, what is wrong, what to do."""
    (path, _), value = _place(error["loc"], model), error.get("input")
    match error["type"]:
        case "union_tag_invalid":
            tag, known = error["ctx"]["tag"], error["ctx"]["expected_tags"]
            return f"{path}.kind: value {tag!r} is wrong because it is none of {known}; correct it."
        case "union_tag_not_found":
            return f"{path}.kind: missing; every file is complete, add it."
        case "extra_forbidden":
            known = list(_place(error["loc"][:-1], model)[1].model_fields)
            close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(known)}."
            return f"{path}: unknown field; {hint}"
        case "missing":
            return f"{path}: missing; every file is complete, add it."
        case "value_error":
            message = error["msg"].removeprefix("Value error, ").removesuffix(".") + "."
            names_field = re.match(r"[a-z][a-z0-9_.]*: ", message)
            return f"{path}{'.' if names_field else ': '}{message}" if path else message
    shown = "value" if hides(path, value) else f"value {value!r}"
    line = f"{path}: {shown} is wrong because {_lower(error['msg'])}"
    if error["type"] == "string_type" and isinstance(value, bool | int | float | datetime.date):
        return f"{line}. YAML reads some words, as no and 0x10, so; put them in quotes."
    if isinstance(value, str) and error["type"] == "float_type" and (number := _as_yaml(value)):
        return f"{line}. YAML reads '{value}' as text; write {number}."
    return f"{line}; correct it."


def _place(location: tuple, model: type[BaseModel]) -> tuple[str, type[BaseModel]]:
    """(dotted path, the model there) of an error's location in a model; pydantic writes the kinds
    that a value may have into locations, and a path leaves them out."""
    path, candidates = [], [model]
    for part in location:
        if isinstance(part, int):
            path.append(str(part))
        elif len(candidates) > 1 and (chosen := [c for c in candidates if part in _kinds(c)]):
            model, candidates = chosen[0], []
        elif not UNION_MEMBER.fullmatch(part):
            path.append(part)
            field = model.model_fields.get(part)
            candidates = list(_models_in(field.annotation)) if field else []
            model = candidates[0] if candidates else model
    return ".".join(path), model


def _kinds(model: type[BaseModel]) -> tuple:
    """What a model's field `kind` may be."""
    field = model.model_fields.get("kind")
    return typing.get_args(field.annotation) if field else ()


def _models_in(annotation: typing.Any) -> typing.Iterator[type[BaseModel]]:
    """The models that a field may hold; a base stands for those derived from it as well."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
            for derived in annotation.__subclasses__():
                yield from _models_in(derived)
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
