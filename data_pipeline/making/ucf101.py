"""UCF-101 as its authors give it: a folder of videos for each class, and lists of its splits.

ROOT/UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi
ROOT/ucfTrainTestlist/classInd.txt, trainlist01.txt ... testlist03.txt
"""

import re
from pathlib import PurePosixPath

from data_pipeline.errors import ConfigError, DataError, InputMissing
from data_pipeline.store import storage

VIDEOS, LISTS = "UCF-101", "ucfTrainTestlist"
CLASSES = "classInd.txt"
PARTS = ("train", "test")
SPLITS = ("train01", "test01", "train02", "test02", "train03", "test03", "all")


def is_ucf101(folder: str) -> bool:
    """Whether a folder is built like the official one."""
    return storage.exists(storage.join(folder, LISTS, CLASSES))


Video = tuple[str, dict, dict]  # path below the folder, captions and metadata by name


def list_ucf101(folder: str, split: str | None) -> tuple[list[Video], dict[str, str]]:
    """The videos of a split in its list's order, captioned by the words of their class and labelled
    from 0, and notes; `all`: every video that the lists of the first split name. ConfigError where
    no split is chosen, for a test set must stay one."""
    if split not in SPLITS:
        wrong = "--split: missing" if split is None else f"split: value '{split}' is wrong"
        raise ConfigError(f"{wrong} because {folder} is UCF-101; give one of {', '.join(SPLITS)}.")
    labels = read_classes(storage.join(folder, LISTS, CLASSES))
    files = [f"{part}01" for part in PARTS] if split == "all" else [split]
    items: list[Video] = []
    present: dict[str, set[str]] = {}
    seen: set[str] = set()
    for file in files:
        path = storage.join(folder, LISTS, f"{file[:-2]}list{file[-2:]}.txt")
        for number, fields in read_lines(path):
            where, video = f"{path}: line {number}", PurePosixPath(fields[0])
            label = labels.get(video.parts[0])
            if label is None or len(video.parts) != 2 or ".." in video.parts:
                raise DataError(
                    f"{where}: {fields[0]!r} is wrong because it lies in the folder of no class of "
                    f"{CLASSES}; take the authors' list."
                )
            if len(fields) > 1 and fields[1] != str(label + 1):
                raise DataError(
                    f"{where}: class {fields[1]} is wrong because {CLASSES} gives {video.parts[0]} "
                    f"number {label + 1}; take both files from one archive."
                )
            if video.parts[0] not in present:
                present[video.parts[0]] = set(
                    storage.list_files(storage.join(folder, VIDEOS, video.parts[0]))
                )
            if video.name not in present[video.parts[0]]:
                raise InputMissing(
                    f"{where}: {fields[0]!r} is wrong because {VIDEOS} holds no such video; unpack "
                    "the whole archive."
                )
            if fields[0] in seen:
                raise DataError(f"{where}: {fields[0]!r} is wrong because it is there twice.")
            seen.add(fields[0])
            metadata = {"label": label, "class": video.parts[0]}
            caption = {"caption": class_words(video.parts[0])}
            items.append((f"{VIDEOS}/{video}", caption, metadata))
    if not items:
        raise InputMissing(f"{folder}: split {split} names no video; take the authors' lists.")
    return items, {"split": split}


def class_words(name: str) -> str:
    """The words of a class: `ApplyEyeMakeup` is "apply eye makeup"."""
    return " ".join(re.findall(r"[A-Z][a-z]*|[a-z]+|\d+", name)).lower()


def read_classes(path: str) -> dict[str, int]:
    """Label, from 0, by class; the file counts from 1."""
    labels: dict[str, int] = {}
    for number, fields in read_lines(path):
        if len(fields) != 2 or fields[0] != str(len(labels) + 1) or fields[1] in labels:
            raise DataError(
                f"{path}: line {number}: {' '.join(fields)!r} is wrong because classes are counted "
                f"from 1, each once; take the authors' {CLASSES}."
            )
        labels[fields[1]] = len(labels)
    return labels


def read_lines(path: str) -> list[tuple[int, list[str]]]:
    """(line number, its words) of all lines that have any."""
    if not storage.exists(path):
        raise InputMissing(f"{path}: no such list; unpack the authors' archive of splits beside.")
    try:
        text = storage.read_bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{path}: is no text; take the authors' list.") from None
    numbered = enumerate(text.splitlines(), 1)
    return [(number, line.split()) for number, line in numbered if line.split()]
