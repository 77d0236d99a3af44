"""Runs that are kept as they are done, and a table of what they say."""

import json
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student

Run = dict[str, Any]  # its row, and a value for each measure


def told(values: list[float]) -> str:
    """Mean and half the 95 % interval of Student's law."""
    if not values:
        return ""
    mean = float(np.mean(values))
    if len(set(values)) < 2:
        return f"{mean:.4g}"
    reach = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{mean:.4g} ± {reach:.2g}"


def print_rows(runs: list[Run], rows: Iterable[str], measures: Iterable[str]) -> None:
    """What all runs of each row say."""
    table = Table("row", *measures)
    for row in rows:
        some = [run for run in runs if run["row"] == row]
        cells = (told([run[one] for run in some if one in run]) for one in measures)
        table.add_row(row, *cells)
    Console(width=170).print(table)


class Kept:
    """The runs of a benchmark in a file, `about` it first: started again, it goes on there."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.about = path, about
        self.runs: list[Run] = json.loads(path.read_text())["runs"] if path.is_file() else []

    def has(self, **facts: Any) -> bool:
        """Whether a run of these facts is there."""
        return any(facts.items() <= run.items() for run in self.runs)

    def add(self, *runs: Run) -> None:
        """Keep runs that were done today."""
        self.runs += [run | {"date": str(date.today())} for run in runs]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.about | {"runs": self.runs}, indent=1) + "\n")
