"""Results: written, read again, shown side by side, and never compared across protocols."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipeline.errors import ConfigError, DataError, InputMissing
from data_pipeline.shards.dataset import digest_json
from t2v.evaluation.scores import Estimate

RESULT = "result.json"
BETTER = {
    "fvd": "lower",
    "mmd": "lower",
    "inception_score": "higher",
    "text_score": "higher",
    "seam": "near 1",
}


def score(estimate: Estimate, **facts: Any) -> dict[str, Any]:
    """A score as it stands in result.json."""
    return asdict(estimate) | facts


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """Results of one protocol as a table, a column each, and what they rest on."""
    first = next(iter(results.values()))
    confidence = first["pinned"]["uncertainty"]["confidence"]
    names = list(results)
    lines = [
        "| " + " | ".join(["view", "metric", "real", *names]) + " |",
        "|" + "---|" * (3 + len(names)),
    ]
    for view, metrics in first["views"].items():
        for metric, told in metrics.items():
            cells = [_value(result["views"][view][metric]) for result in results.values()]
            real = told.get("real")
            reference = "" if real is None else f"{real:.4g}"
            label = f"{metric} ({BETTER[metric]})"
            lines.append("| " + " | ".join([view, label, reference, *cells]) + " |")
    counts = first["real"]["clips"], first["generated"]["clips"]
    lines += [
        "",
        f"Protocol {first['protocol']}, fingerprint {first['fingerprint'][:16]}: "
        f"{counts[0]} real clips, {counts[1]} generated. ± is the {confidence:.0%} interval by "
        f"{first['pinned']['uncertainty']['resamples']} resamples of the generated clips.",
    ]
    caveats = dict.fromkeys(note for result in results.values() for note in result["caveats"])
    lines += [f"- {note}" for note in caveats]
    return "\n".join(lines) + "\n"


def _value(told: dict[str, Any]) -> str:
    return f"{told['value']:.4g} ± {told['value'] - told['low']:.2g}"


def read_result(path: Path) -> dict[str, Any]:
    """A result from its file or its folder."""
    path = path / RESULT if path.is_dir() else path
    if not path.is_file():
        raise InputMissing(f"{path}: no such result; write it with `t2v evaluate`.")
    try:
        result = json.loads(path.read_text())
        if result["format"] != 1:
            raise DataError(f"{path}: format {result['format']!r} is not 1; evaluate again.")
        refuse_other_protocol(result, path)
        markdown({str(path): result})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: is no result because {reason}; evaluate again.") from None
    return result


def refuse_other_protocol(result: dict[str, Any], path: Path) -> None:
    """DataError where a result's scores are not those of the protocol that it tells."""
    pinned = result["pinned"]
    asked = {view["name"]: set(view["metrics"]) for view in pinned["views"]}
    told = {view: set(metrics) for view, metrics in result["views"].items()}
    if result["fingerprint"] != digest_json(pinned) or asked != told:
        raise DataError(f"{path}: is damaged because its protocol is another; evaluate again.")


def compare(paths: list[Path]) -> str:
    """Results side by side in Markdown; ConfigError where their protocols differ."""
    results = {str(path): read_result(path) for path in paths}
    if len(results) < len(paths):
        raise ConfigError(f"{paths[0]}: is given twice; name each result once.")
    first, *others = results
    for other in others:
        if results[first]["fingerprint"] != results[other]["fingerprint"]:
            differing = differences(results[first]["pinned"], results[other]["pinned"])
            told = ", ".join(f"{name} {a!r} and {b!r}" for name, a, b in differing[:3])
            raise ConfigError(
                f"{other}: cannot be compared with {first} because their protocols differ "
                f"({told}{', ...' if len(differing) > 3 else ''}); evaluate both by one protocol."
            )
    return markdown(results)


def differences(a: Any, b: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted name, value here, value there) of all that differs."""
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            found
            for key in sorted(a.keys() | b.keys())
            for found in differences(a.get(key), b.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if a == b else [(name, a, b)]
