"""Samples under the names that VBench's programs look for (arXiv 2311.17982): PROMPT-INDEX.mp4."""

import shutil
from collections import Counter
from pathlib import Path

from data_pipeline.errors import ConfigError, InputMissing
from data_pipeline.store import storage
from t2v.evaluation.clips import SUMMARY, read_records

LONGEST_NAME = 255  # bytes, of most file systems


def export_vbench(samples: Path, out: Path) -> int:
    """Copy the finest clips of a folder of samples; the clips of one prompt count up from 0, in the
    order of the samples. Returns how many there are."""
    summary = samples / SUMMARY
    if not summary.is_file():
        raise InputMissing(f"{samples}: holds no {SUMMARY}; give a folder of `t2v sample`.")
    if not storage.is_empty(str(out)):
        raise ConfigError(f"{out}: is not empty; give --out a new folder.")
    records, seen, names = read_records(summary), Counter[str](), []
    for record in records:
        prompt = record.get("prompt")
        name = f"{prompt}-{seen[str(prompt)]}.mp4"
        seen[str(prompt)] += 1
        if not isinstance(prompt, str) or "/" in prompt or len(name.encode()) > LONGEST_NAME:
            raise ConfigError(
                f"{summary}: prompt {str(prompt)[:80]!r} is wrong because no file can be named so; "
                "sample prompts of VBench's lists."
            )
        if not (path := samples / record["file"]).is_file():
            raise InputMissing(f"{path}: missing although {SUMMARY} names it; sample again.")
        names.append(name)
    out.mkdir(parents=True, exist_ok=True)
    for record, name in zip(records, names, strict=True):
        shutil.copyfile(samples / record["file"], out / name)
    return len(records)
