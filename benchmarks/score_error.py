"""How well intervals of Fréchet distances know the true error, against the ordinary bootstrap.

Features are Gaussian, so any number of sets of clips can be drawn: the deviation of their distances
is the truth. Each estimate sees one set only.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from t2v.evaluation.scores import Moments, frechet_distance, interval, moments

ROOT = Path(__file__).parent.parent
CASES = ((4, 200), (32, 200), (64, 100), (100, 512))  # (dimensions, clips)
SETS, ESTIMATES, RESAMPLES = 100, 8, 60


def bootstrap_error(known: Moments, features: np.ndarray, seed: int) -> float:
    """Deviation of the distance when clips are drawn again with replacement."""
    rng, clips = np.random.default_rng(seed), len(features)
    found = [
        frechet_distance(known, moments(features, np.bincount(drawn, minlength=clips)))
        for drawn in rng.integers(0, clips, (RESAMPLES, clips))
    ]
    return float(np.std(found, ddof=1))


def our_error(known: Moments, features: np.ndarray, seed: int) -> float:
    """The standard error of a result."""
    return interval(
        lambda counts: frechet_distance(known, moments(features, counts)),
        len(features),
        value=0.0,
        resamples=RESAMPLES,
        seed=seed,
        confidence=0.95,
    ).standard_error


def measure(dims: int, clips: int) -> dict[str, float]:
    """True deviation, and mean estimates of it."""
    rng = np.random.default_rng(dims)
    mixing = rng.normal(size=(dims, dims)) / dims**0.5
    known = Moments(10_000, np.zeros(dims), mixing.T @ mixing)
    sets = [1.2 * rng.normal(size=(clips, dims)) @ mixing + 0.1 for _ in range(SETS)]
    values = [frechet_distance(known, moments(features)) for features in sets]
    ours = [our_error(known, features, n) for n, features in enumerate(sets[:ESTIMATES])]
    theirs = [bootstrap_error(known, features, n) for n, features in enumerate(sets[:ESTIMATES])]
    return {
        "dims": dims,
        "clips": clips,
        "distance": float(np.mean(values)),
        "true_error": float(np.std(values, ddof=1)),
        "ours": float(np.mean(ours)),
        "bootstrap": float(np.mean(theirs)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    rows = [measure(*case) for case in track(CASES, "cases", console=Console(stderr=True))]
    table = Table(
        "dimensions", "clips", "distance", "true error", "ours / true", "bootstrap / true"
    )
    for row in rows:
        ratios = [f"{row[name] / row['true_error']:.2f}" for name in ("ours", "bootstrap")]
        counts = f"{row['dims']}", f"{row['clips']}"
        table.add_row(*counts, f"{row['distance']:.3f}", f"{row['true_error']:.3f}", *ratios)
    Console().print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "score_error.json"
    path.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{path}: written.")


if __name__ == "__main__":
    main()
