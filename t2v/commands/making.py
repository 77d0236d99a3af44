"""The verbs of `t2v data` that make, index, check and describe datasets."""

import argparse

from data_pipeline.errors import DataError
from data_pipeline.printable import plain
from data_pipeline.shards.captions import COLUMNS
from t2v.commands.lists import columns_from, say_dataset

FILTERS = {
    "min_height": "leave out sources of fewer pixels",
    "min_width": "leave out sources of fewer pixels",
    "max_aspect": "leave out sources whose longer side is more times the shorter",
    "min_frames": "leave out videos of fewer frames",
    "min_seconds": "leave out shorter videos",
    "max_seconds": "leave out longer videos",
    "min_caption_words": "leave out shorter captions",
    "max_caption_words": "leave out longer captions",
}


def data_toy(options: argparse.Namespace) -> None:
    from data_pipeline.making.toy import write_toy

    write_toy(options.out, videos=options.videos, images=options.images, seed=options.seed)
    print(plain(f"{options.out}: {options.videos} videos and {options.images} images, captioned."))


def data_build(options: argparse.Namespace) -> None:
    from data_pipeline.making.build import build
    from data_pipeline.making.samples import Filters

    frames, height, width = options.size
    say_dataset(
        build(
            options.source,
            options.out,
            frames=frames,
            height=height,
            width=width,
            fps=options.fps,
            kind=options.kind,
            split=options.split,
            columns=columns_from(options),
            root=options.root,
            cut=options.cut,
            crop_bars=options.crop_bars,
            tone_map=options.tone_map,
            filters=Filters(**{name: getattr(options, name) for name in FILTERS}),
            shard_samples=options.shard_samples,
            task=options.task,
            workers=options.workers,
            max_drop_rate=options.max_drop_rate,
            notes=dict(options.note or []),
        )
    )


def data_index(options: argparse.Namespace) -> None:
    from data_pipeline.making.indexing import index

    say_dataset(
        index(
            options.dataset,
            out=options.out,
            task=options.task,
            kind=options.kind,
            captions=dict(options.caption_column or COLUMNS.items()),
            skip_bad=options.skip_bad,
            max_drop_rate=options.max_drop_rate,
            workers=options.workers,
            notes=dict(options.note or []),
        )
    )


def data_verify(options: argparse.Namespace) -> int:
    from data_pipeline.making.verify import left_after, mend_shards, repair, verify
    from data_pipeline.shards.dataset import MANIFEST, open_dataset
    from data_pipeline.shards.warnings import caption_warnings
    from data_pipeline.store import storage

    if options.repair and not storage.exists(storage.join(options.dataset, MANIFEST)):
        say_dataset(mend_shards(options.dataset, kind=None, captions=COLUMNS))
        return 0
    faults = verify(options.dataset, decode=not options.no_decode, workers=options.workers)
    for fault in faults:
        print(plain(fault))
    if faults and options.repair:
        repaired = repair(options.dataset, faults)
        say_dataset(repaired)
        print("embed and encode it again as before: only what is missing or changed is made.")
        left = left_after(repaired, faults)
        for fault in left:
            print(plain(f"{fault}: it stays so; move it away."))
        return DataError.exit_code if left else 0
    dataset = open_dataset(options.dataset)
    print(plain(f"{options.dataset}: {dataset.info.samples} samples, {len(faults)} faults."))
    if faults:
        return DataError.exit_code
    for warning in caption_warnings(dataset):
        print(plain(warning))
    return 0


def data_score(options: argparse.Namespace) -> None:
    from data_pipeline.making.scoring import TABLE, score

    scores = score(options.dataset, task=options.task, workers=options.workers)
    if scores is None:
        print(plain(f"{options.dataset}: this task is done; others are not."))
        return
    alike, faults = (len(scores.column(name)) for name in ("duplicate_of", "fault"))
    clips = len(scores.column("key"))
    print(plain(f"{options.dataset}/{TABLE}: {clips} clips, {alike} of them near-duplicates, "
                f"{faults} not to be read."))  # fmt: skip


def data_stats(options: argparse.Namespace) -> None:
    from rich.table import Table

    from data_pipeline.making.stats import measure, write_page
    from data_pipeline.terminal import Terminal

    stats = measure(options.dataset, count=options.samples)
    table = Table(show_header=False)
    for name, value in stats.rows():
        table.add_row(name, value)
    Terminal().print(table)
    print(plain(f"{write_page(stats, options.out)}: written."))
