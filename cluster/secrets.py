"""What looks like a secret, so that none is ever written into a job."""

import re
from collections.abc import Iterator
from typing import Any

NAMES = re.compile(
    r"(?i)(secret|token|passw(or)?d|passphrase|credential|private_?key|api_?key|access_?key)"
)
# Names of the kind that hold no secret: a path, a switch, a number of text tokens.
HARMLESS_NAMES = re.compile(r"(?i)(_file|_path|_dir|max_tokens|tokenizers_parallelism)$")
SHAPES = (
    re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b"),  # AWS access keys
    re.compile(r"\bhf_[A-Za-z0-9]{16,}"),
    re.compile(r"\bgh[oprsu]_[A-Za-z0-9]{16,}|\bgithub_pat_[A-Za-z0-9_]{16,}"),
    re.compile(r"\bglpat-[A-Za-z0-9_-]{16,}|\bxox[abpr]-[A-Za-z0-9-]{10,}"),
    re.compile(r"\bsk-[A-Za-z0-9_-]{20,}"),
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY"),
    re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\."),  # JSON web tokens
    re.compile(r"(?i)[?&](x-amz-(signature|credential|security-token)|sig|signature|token)="),
    re.compile(r"[a-z][a-z0-9+.-]*://[^/@\s:]*:[^/@\s]+@"),  # user:password in an address
)
BARE_KEY = re.compile(r"[A-Za-z0-9/+]{40}")  # AWS secret keys, wandb keys
# The former also in the midst of text: unlike a digest or a path, of all kinds of letters.
AWS_SECRET = re.compile(
    r"(?<![\w/+=.-])(?=[a-z0-9/+]*([A-Z][a-z0-9/+]*){4})(?=\D{0,39}\d)(?=[A-Z0-9/+]*[a-z])"
    r"[A-Za-z0-9+][A-Za-z0-9/+]{39}(?![\w/+.-])"
)


def names_secret(name: str) -> bool:
    """Whether a variable of this name would hold a secret."""
    return bool(NAMES.search(name)) and not HARMLESS_NAMES.search(name)


def holds_secret(text: str) -> bool:
    """Whether text contains what only secrets look like."""
    return any(shape.search(text) for shape in (*SHAPES, AWS_SECRET))


def is_secret(name: str, value: str) -> bool:
    """Whether an environment variable must be given by reference."""
    bare = BARE_KEY.fullmatch(value) is not None and not value.startswith("/")
    return names_secret(name) or bare or holds_secret(value)


def secrets_in(node: Any, path: str = "") -> Iterator[str]:
    """Paths of all strings of plain data that hold a secret; never the strings themselves."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from secrets_in(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from secrets_in(value, f"{path}[{index}]")
    elif isinstance(node, str) and holds_secret(node):
        yield path
