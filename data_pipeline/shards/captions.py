"""Captions as people keep them: text, or several texts of one clip, each with its weight."""

import codecs
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data_pipeline.errors import DataError

COLUMNS: dict[str, float] = {"caption": 1.0}  # where captions are, unless it is said otherwise
SEVERAL = ("captions", "caption_weights")  # members of ours, of a clip with several captions
KINDS: dict[type, str] = {dict: "a mapping", list: "a list", bool: "a truth value", int: "a number"}
BOMS = {"utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),  # which begin as those of UTF-16
        "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)}  # fmt: skip


@dataclass(frozen=True)
class Captions:
    """The captions of one clip, and how often each is to be taken; weights sum to 1."""

    texts: tuple[str, ...] = ("",)
    weights: tuple[float, ...] = (1.0,)

    @property
    def first(self) -> str:
        """The one that readers of a single caption see."""
        return self.texts[0]

    @property
    def origin(self) -> str:
        """What an embedding of the clip is made of; of a single caption, that caption."""
        return self.first if len(self.texts) == 1 else json.dumps(self.members())

    def only(self, texts: Sequence[str]) -> "Captions":
        """Some of the captions."""
        shares = zip(self.texts, self.weights, strict=True)
        return _weighted({text: weight for text, weight in shares if text in texts})

    def members(self) -> dict:
        """How a sample's json tells them."""
        if len(self.texts) == 1:
            return {"caption": self.first}
        told = zip(SEVERAL, (list(self.texts), list(self.weights)), strict=True)
        return {"caption": self.first, **dict(told)}


def captions_of(values: Mapping[str, object], columns: Mapping[str, float]) -> Captions | None:
    """The captions in some columns of a mapping: the weight of a column is shared by its texts.

    None where there is none. DataError for what is no text: a number, NaN, a mapping.
    """
    if columns == COLUMNS and values.get("caption_weights") is not None:
        return _ours(values)
    weights: dict[str, float] = {}
    found = False
    for column, weight in columns.items():
        value = values.get(column)
        if value is None:
            continue
        texts = [_text(column, text) for text in (value if isinstance(value, list) else [value])]
        found |= bool(texts)
        texts = [text for text in texts if text]
        for text in texts:
            weights[text] = weights.get(text, 0.0) + weight / len(texts)
    if not weights:
        return Captions() if found else None
    return _weighted(weights)


def merged(captions: Sequence[Captions]) -> Captions:
    """The captions of several rows as those of one clip, each row with one weight."""
    weights: dict[str, float] = {}
    for some in captions:
        for text, weight in zip(some.texts, some.weights, strict=True):
            if text:
                weights[text] = weights.get(text, 0.0) + weight
    return _weighted(weights) if weights else Captions()


def _weighted(weights: Mapping[str, float]) -> Captions:
    total = sum(weights.values())
    return Captions(tuple(weights), tuple(weight / total for weight in weights.values()))


def encoding_by_mark(content: bytes) -> str | None:
    """What a byte order mark says of a text, if it has one of UTF-32 or UTF-16."""
    return next((name for name, marks in BOMS.items() if content.startswith(marks)), None)


def decode_text(content: bytes) -> str:
    """The text of a file: UTF-8, or what a byte order mark says; DataError for anything else."""
    try:
        text = content.decode(encoding_by_mark(content) or "utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"is no UTF-8 text: byte {error.start} is {content[error.start]:#04x}; convert it"
        ) from None
    if "\0" in text:
        raise DataError("is no UTF-8 text: it holds zero bytes, as UTF-16 without a mark does")
    return text.strip()


def parse_object(content: bytes) -> dict:
    """The mapping that a json file or member holds."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"json is damaged: {error}") from None
    if not isinstance(found, dict):
        raise DataError("json is damaged: it holds no mapping")
    return found


def _text(column: str, value: object) -> str:
    if not isinstance(value, str):
        raise DataError(f"caption is no text: {column} is {_named(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise DataError(f"caption is no text: {column} holds half a character ({half!a})") from None
    return value.strip()


def _named(value: object) -> str:
    if isinstance(value, float):
        return "NaN" if math.isnan(value) else "a number"
    return KINDS.get(type(value), "null")


def _ours(values: Mapping[str, object]) -> Captions:
    """What `Captions.members` wrote."""
    texts, weights = values.get("captions"), values.get("caption_weights")
    if not (isinstance(texts, Sequence) and isinstance(weights, Sequence) and texts):
        raise DataError("captions and caption_weights are no lists")
    if len(texts) != len(weights) or not all(
        isinstance(weight, float) and 0 < weight <= 1 for weight in weights
    ):
        raise DataError("caption_weights are no shares of captions")
    return Captions(tuple(_text("captions", text) for text in texts), tuple(weights))
