"""Pages of HTML, each a file of its own that bears our mark."""

from data_pipeline.errors import ConfigError
from data_pipeline.store import storage

GENERATOR = '<meta name="generator" content="t2v">'


def write_page(path: str, page: str) -> None:
    """Write a page that holds `GENERATOR`, in the place of an older one or of no file; ConfigError
    where any other file is there."""
    if storage.exists(path) and GENERATOR.encode() not in storage.read_bytes(path):
        raise ConfigError(f"{path}: is there already and no page of ours; give --out another file.")
    storage.write_atomic(path, page.encode())
