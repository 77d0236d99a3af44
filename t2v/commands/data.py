"""The verbs of `t2v data`: one thin function each."""

import argparse
import json
import os
from typing import TYPE_CHECKING

from data_pipeline.errors import ConfigError
from data_pipeline.printable import plain
from t2v.commands.lists import add_caption_column, add_list_options
from t2v.commands.making import (
    FILTERS,
    data_build,
    data_index,
    data_score,
    data_stats,
    data_toy,
    data_verify,
)
from t2v.commands.parser import add_config, add_verb, count, gib, positive, word

if TYPE_CHECKING:
    from data_pipeline.feeding.mixture import Mixture


def data_embed(options: argparse.Namespace) -> None:
    from data_pipeline.shards.dataset import open_dataset
    from data_pipeline.shards.warnings import caption_warnings
    from data_pipeline.text.audit import check, estimate
    from data_pipeline.text.embed import embed
    from data_pipeline.text.encoder import TextEncoder
    from data_pipeline.text.imported import Origin, import_embeddings

    place = f"{options.dataset}/embeddings/{options.name}"
    for warning in caption_warnings(open_dataset(options.dataset)):
        print(plain(warning))
    if options.estimate or options.check:
        reader = TextEncoder(
            options.encoder,
            max_tokens=options.max_tokens,
            layer=options.layer,
            memory_gib=options.memory_gib,
        )
        if options.estimate:
            print(plain(estimate(options.dataset, reader)))
        if options.check:
            same = check(options.dataset, reader, name=options.name, count=options.check)
            print(plain(f"{place}: {same} encoded again, all equal."))
        return
    if options.member:
        origin = Origin(
            options.member,
            options.encoder,
            options.max_tokens,
            folder=options.import_from,
            layer=options.layer,
            null=options.null,
        )
        done = import_embeddings(options.dataset, origin, name=options.name, task=options.task)
        state = "imported; prove it by --check K" if done else "this task is done; others are not"
        print(plain(f"{place}: {state}."))
        return
    done = embed(
        options.dataset,
        options.encoder,
        name=options.name,
        max_tokens=options.max_tokens,
        layer=options.layer,
        task=options.task,
        device=_own_gpu(),
        memory_gib=options.memory_gib,
    )
    print(plain(f"{place}: {'complete' if done else 'this task is done; others are not'}."))


def data_encode(options: argparse.Namespace) -> None:
    from data_pipeline.latents.audit import check, estimate, measure
    from data_pipeline.latents.encode import begin_encoding, encode, read_normalisation
    from data_pipeline.shards.dataset import open_dataset
    from data_pipeline.store import storage

    place = f"{options.dataset}/latents/{options.name}"
    if options.check:
        found = check(
            options.dataset,
            options.vae,
            name=options.name,
            count=options.check,
            memory_gib=options.memory_gib,
        )
        print(plain(f"{place}: {len(found.decibels)} encoded again, all equal; {found}"))
        return
    how = {
        "size": options.size,
        "normalisation": options.normalisation and read_normalisation(options.normalisation),
        "memory_gib": options.memory_gib,
    }
    if options.estimate or options.measure:
        encoding = begin_encoding(open_dataset(options.dataset), options.vae, **how)
        if options.estimate:
            print(plain(estimate(encoding)))
        if options.measure:
            text = measure(encoding).model_dump_json(indent=1) + "\n"
            storage.create(options.measure, text.encode())
            print(
                plain(f"{options.measure}: written; give it to every dataset by --normalisation.")
            )
        return
    done = encode(
        options.dataset,
        options.vae,
        name=options.name,
        task=options.task,
        device=_own_gpu(),
        **how,
    )
    print(plain(f"{place}: {'complete' if done else 'this task is done; others are not'}."))


def data_order(options: argparse.Namespace) -> None:
    from data_pipeline.feeding.batches import planned_samples
    from t2v.recipe.recipe import load_config

    config = load_config(options.config, options.set or [])
    start = _start_of(options.checkpoint, options.step) if options.checkpoint else None
    samples = planned_samples(
        config.data,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        step=options.step,
        count=options.count,
        start=start,
    )
    if options.json:
        print(json.dumps(list(samples)))
        return
    for sample in samples:
        print(plain(f"step {sample['step']}  n {sample['n']}  {sample['dataset']}  {sample['id']}"))


def _start_of(checkpoint: str, step: int) -> "tuple[int, int, Mixture]":
    """(steps, samples, mixture) of a checkpoint before a step."""
    from t2v.checkpoint.finding import step_of
    from t2v.checkpoint.manifest import read_manifest

    manifest = read_manifest(step_of(checkpoint))
    if manifest.step >= step:
        raise ConfigError(
            f"--checkpoint: {checkpoint} is wrong because it is of step {manifest.step}, and what "
            f"it had read says nothing of step {step}; give an earlier one."
        )
    return manifest.step, manifest.samples, manifest.mixture


def data_bench(options: argparse.Namespace) -> None:
    from data_pipeline.feeding.bench import bench, print_speed
    from t2v.plan.plan import samples_per_gpu_second
    from t2v.recipe.recipe import load_config

    config = load_config(options.config, options.overrides)
    speed = bench(
        config.data,
        config.method.view,
        config.conditioning,
        seed=config.seed,
        samples=options.samples,
        latents=config.method.cached_latents,
    )
    per_gpu = samples_per_gpu_second(config)
    if options.json:
        gpus = speed.machine_samples_per_second / per_gpu
        print(json.dumps(speed.model_dump() | {"gpus_fed": gpus}))
    else:
        print_speed(speed, per_gpu)


def add_data_verbs(verbs) -> None:
    """`t2v data` and its verbs."""
    data = verbs.add_parser("data", help="make, shard, index and embed datasets")
    data_verbs = data.add_subparsers(metavar="VERB", required=True)
    verb = add_verb(data_verbs, "toy", data_toy, "small captioned videos and images",
                    "t2v data toy toy_media --videos 160")  # fmt: skip
    verb.add_argument("out")
    verb.add_argument("--videos", type=int, default=640)
    verb.add_argument("--images", type=int, default=320)
    verb.add_argument("--seed", type=int, default=0)

    verb = add_verb(data_verbs, "build", data_build, "captioned media into shards of one clip size",
                    "t2v data build my_clips data/videos --size 64x288x512 --fps 24")  # fmt: skip
    told = (
        "folder with captions.jsonl, or a .txt or .json per file, or in shards or zips; or a list"
    )
    verb.add_argument("source", help=f"{told}, or a pattern of lists")
    verb.add_argument("out", help="dataset folder")
    verb.add_argument(
        "--size",
        type=clip_size,
        required=True,
        metavar="FxHxW",
        help="frames, height and width of every clip; images keep one frame",
    )
    verb.add_argument("--fps", type=float, help="frame rate to resample to; none: as it is")
    verb.add_argument("--kind", choices=("video", "image"), help="where a folder holds both")
    verb.add_argument("--split", help="of UCF-101 as its authors pack it: train01, test01, ... all")
    verb.add_argument("--cut", choices=("none", "length", "scenes"), default="none",
                      help="long videos into as many clips as fit")  # fmt: skip
    verb.add_argument("--crop-bars", action="store_true", help="cut black bars off, to the pixel")
    verb.add_argument("--tone-map", action="store_true", help="take HDR video, brought to SDR")
    add_list_options(verb)
    for name, help in FILTERS.items():
        kind = float if name.endswith(("seconds", "aspect")) else int
        verb.add_argument(f"--{name.replace('_', '-')}", type=kind, help=help)
    verb.add_argument("--shard-samples", type=int, default=1000, help="source files per shard")
    _add_workers(verb)
    _add_drop_rate(verb)
    _add_task(verb)
    _add_notes(verb)

    verb = add_verb(data_verbs, "index", data_index, "make shards written by others a dataset",
                    "t2v data index data/laion")  # fmt: skip
    verb.add_argument("dataset", help="folder of .tar files, KEY.mp4 or .jpg with KEY.json or .txt")
    verb.add_argument("--kind", choices=("video", "image"))
    add_caption_column(verb)
    verb.add_argument("--out", metavar="FOLDER",
                      help="a new folder for the index and links to the shards")  # fmt: skip
    _add_task(verb)
    verb.add_argument("--skip-bad", action="store_true", help="whatever the share of bad samples")
    _add_drop_rate(verb)
    _add_workers(verb)
    _add_notes(verb)

    verb = add_verb(data_verbs, "verify", data_verify, "find every fault of a dataset, and mend it",
                    "t2v data verify data/videos --repair")  # fmt: skip
    verb.add_argument("dataset")
    verb.add_argument("--repair", action="store_true",
                      help="leave out what is unusable; old tars stay as .damaged")  # fmt: skip
    verb.add_argument("--no-decode", action="store_true", help="check bytes only, not pictures")
    _add_workers(verb)

    verb = add_verb(data_verbs, "score", data_score, "what clips are worth, as columns for --where",
                    "t2v data score data/videos")  # fmt: skip
    verb.add_argument("dataset")
    _add_workers(verb)
    _add_task(verb)

    verb = add_verb(data_verbs, "stats", data_stats, "what a dataset holds, as a table and a page",
                    "t2v data stats data/videos --out videos.html")  # fmt: skip
    verb.add_argument("dataset")
    verb.add_argument("--samples", type=positive, default=10_000, help="random samples to read")
    verb.add_argument("--out", help="the page; by default stats.html in the dataset")

    verb = add_verb(data_verbs, "embed", data_embed, "cache what a text encoder says of captions",
                    "t2v data embed data/videos --encoder google-t5/t5-11b --name t5")  # fmt: skip
    verb.add_argument("dataset")
    verb.add_argument("--encoder", required=True, help="folder or hub id of a text encoder")
    verb.add_argument("--name", required=True, help="the set's name: dataset/embeddings/NAME")
    verb.add_argument("--max-tokens", type=positive, default=128)
    verb.add_argument("--layer", type=int, metavar="N",
                      help="hidden layer to read, 0 being words; decoders need it")  # fmt: skip
    verb.add_argument(
        "--import",
        dest="member",
        metavar="MEMBER",
        help="take what others computed with the encoder: KEY.MEMBER, such as t5.npy",
    )
    verb.add_argument(
        "--import-from",
        metavar="FOLDER",
        help="tars with these members, called as the dataset's; by default those",
    )
    verb.add_argument(
        "--null",
        metavar="FILE",
        help="their embedding of the empty caption; by default it is encoded",
    )
    verb.add_argument("--memory-gib", type=gib,
                      help="main memory for the encoder; the rest of it stays on disk")  # fmt: skip
    verb.add_argument("--estimate", action="store_true", help="only tell bytes and hours")
    verb.add_argument("--check", type=positive, metavar="K",
                      help="only encode K random captions again and compare")  # fmt: skip
    _add_task(verb)

    verb = add_verb(data_verbs, "encode", data_encode, "cache what an autoencoder makes of clips",
                    "t2v data encode data/videos --vae Wan-AI/Wan2.1-T2V-1.3B-Diffusers --name wan",
                    )  # fmt: skip
    verb.add_argument("dataset")
    verb.add_argument("--vae", required=True,
                      help="folder or hub id of a video autoencoder of diffusers")  # fmt: skip
    verb.add_argument("--name", required=True, help="the set's name: dataset/latents/NAME")
    verb.add_argument("--size", type=clip_size, metavar="FxHxW",
                      help="of clips as they are encoded; by default as stored")  # fmt: skip
    verb.add_argument("--normalisation", metavar="FILE",
                      help="what --measure wrote; by default the autoencoder's own")  # fmt: skip
    verb.add_argument("--memory-gib", type=gib,
                      help="for the autoencoder and its work, in tiles if need be")  # fmt: skip
    verb.add_argument("--estimate", action="store_true", help="only tell bytes and hours")
    verb.add_argument("--measure", metavar="FILE",
                      help="only write means and deviations of latents of 256 clips")  # fmt: skip
    verb.add_argument("--check", type=positive, metavar="K",
                      help="only encode K random clips again, compare and decode")  # fmt: skip
    _add_task(verb)

    verb = add_verb(data_verbs, "order", data_order, "which samples form a batch",
                    "t2v data order configs/base_36x64.yaml --step 1234 --json")  # fmt: skip
    verb.add_argument("config", help="a recipe, or the config.yaml of a run folder")
    verb.add_argument("--set", action="append", metavar="dotted.key=value")
    verb.add_argument("--step", type=positive, required=True, help="as in metrics.jsonl")
    verb.add_argument("--checkpoint", metavar="STEP", help="a step folder from before it, where the"
                      " run's batch size or sources have changed since its start")  # fmt: skip
    verb.add_argument("--count", type=count, default=1, help="how many steps")
    verb.add_argument("--json", action="store_true", help="print JSON instead of lines")

    verb = add_verb(data_verbs, "bench", data_bench, "how fast this machine loads a recipe's data",
                    "t2v data bench configs/base_36x64.yaml --samples 500")  # fmt: skip
    add_config(verb)
    verb.add_argument("--samples", type=count, default=200)
    verb.add_argument("--json", action="store_true", help="print JSON instead of tables")


def _add_task(parser: argparse.ArgumentParser) -> None:
    launched = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    parser.add_argument("--task", type=array_task, default=launched, metavar="I/N",
                        help="this job's part of N, counted from 0, for job arrays; under torchrun "
                        "each process is a task")  # fmt: skip


def _own_gpu() -> str | None:
    """That of a process under a launcher."""
    import torch

    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if rank is not None and torch.cuda.is_available() else None


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)),
                        help="processes; as many as there are cores")  # fmt: skip


def _add_drop_rate(parser: argparse.ArgumentParser) -> None:
    told = "share of unusable files, rows or samples that is accepted"
    parser.add_argument("--max-drop-rate", type=float, default=0.01, help=told)


def _add_notes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--note",
        type=key_text,
        action="append",
        metavar="KEY=TEXT",
        help="kept in dataset.json, such as licence=CC-BY; may be repeated",
    )


@word("size", "FRAMESxHEIGHTxWIDTH, such as 64x288x512")
def clip_size(text: str) -> tuple[int, int, int]:
    frames, height, width = (int(part) for part in text.split("x"))
    return frames, height, width


@word("task", "I/N, such as 0/4")
def array_task(text: str) -> tuple[int, int]:
    number, count = (int(part) for part in text.split("/"))
    return number, count


@word("note", "KEY=TEXT")
def key_text(text: str) -> tuple[str, str]:
    key, value = text.split("=", 1)
    return key, value
