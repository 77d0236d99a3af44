"""From a checkpoint and prompts to files: mp4, a contact sheet, and the settings of every clip.

Under a launcher, processes share the clips, and then the tiles of those that are left. A clip is
written when it is finished; clips that are there already, made in the same way, are not made again.
"""

import io
import json
import math
import os
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.distributed as dist
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from rich.progress import Progress
from torch import Tensor

from data_pipeline.errors import ConfigError
from data_pipeline.host_memory import available_memory
from data_pipeline.media.codec import decode_clip, encode_clip
from data_pipeline.pyramid import Clip
from data_pipeline.store import storage
from data_pipeline.terminal import Terminal
from t2v.attempt.files import read_mapping
from t2v.engine.compute import autocast, set_matmul_precision
from t2v.engine.config import EngineConfig
from t2v.engine.world import World, join_world
from t2v.methods.method import ALONE, Method, Output, Room, Team
from t2v.network.network import Network
from t2v.recipe.reading import parse_value
from t2v.recipe.recipe import RunConfig, method_of, parse_config
from t2v.sampling.codec import Codec
from t2v.sampling.given_frames import stack_given
from t2v.sampling.source import Source, open_guide, open_source
from t2v.sampling.subjects import Conditions, Request, Subject, subjects_of

GIB = 2**30
# Processes wait for the slowest one's last clip, which may take hours.
PATIENCE_SECONDS = 24 * 3600.0
RESERVE_BYTES = 192 << 20  # libraries that load late, and encoding
MOST_ON_SHEET, LEAST_SHEET_HEIGHT = 64, 72  # clips; pixels of one
# Tells that a folder's clips and records are ours to replace.
MARK, MARK_TEXT = ".t2v-samples", b"made by t2v sample, which may replace numbered files here\n"


@dataclass(frozen=True)
class Means:
    """What sampling may use; no choice moves a clip by more than rounding."""

    memory_gib: float | None = None
    scratch: Path | None = None
    clips_at_once: int = 8


@dataclass(frozen=True)
class Recipe:
    """All that a clip follows from but its subject."""

    source: Source
    config: RunConfig
    request: Request
    guide: Source | None = None

    def key(self, subject: Subject) -> str:
        """A digest of all that decides what a clip looks like."""
        settings = self.config.method.sampling
        facts = {
            "source": self.source.digest,
            "shows": subject.shows,
            "seed": subject.seed,
            "negative_prompt": self.request.negative_prompt,
            "settings": settings.model_dump(
                mode="json", exclude={"tile_batch", "guide_checkpoint"}
            ),
        }
        if self.guide:
            facts["guide"] = self.guide.digest
        if subject.given:
            facts["given"] = subject.given.digest
        return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def sample_checkpoint(
    checkpoint: str | Path,
    request: Request,
    *,
    out: str | Path,
    overrides: list[str] | tuple[str, ...] = (),
    means: Means | None = None,
) -> Path:
    """Write one mp4 per clip asked for, contact_sheet.png and samples.json; returns the folder.

    Clip number i has seed `request.seed + i`.
    """
    out, means = Path(out), means or Means()
    if means.clips_at_once < 1:
        raise ConfigError(f"--clips-at-once: {means.clips_at_once} is wrong; give 1 or more.")
    if means.memory_gib is not None and not 0 < means.memory_gib < math.inf:
        raise ConfigError(
            f"--memory-gib: {means.memory_gib:g} is wrong because it is no room; give a number "
            "above 0."
        )
    with sampling_world() as world:
        source = open_source(checkpoint, world)
        # All find the same mistakes; one of them tells.
        config = world.together(lambda: with_sampling(source.config, overrides))
        recipe = Recipe(source, config, request, open_guide(config, world))
        sample_recipe(recipe, out, means, world)
    return out


def sample_recipe(recipe: Recipe, out: Path, means: Means, world: World) -> None:
    """`sample_checkpoint` of processes that have met and know what is asked for."""
    world.together(lambda: refuse_odd_sizes(method_of(recipe.config), recipe.request))
    subjects = world.together(lambda: subjects_of(recipe.config, recipe.request))
    pending = world.on_first(lambda: [s for s in subjects if not is_done(out, recipe, s)])
    if pending:
        sample_pending(recipe, pending, out, means, world)
    world.gather(None)  # every clip is written
    if world.is_first:
        summarise(out, len(subjects))


def refuse_odd_sizes(method: Method, request: Request) -> None:
    """ConfigError before hours of sampling where a clip to be written could not be."""
    finest = len(method.outputs) - 1
    for level in range(0 if request.levels else finest, finest + 1):
        _, height, width = method.outputs[level].size
        if height % 2 or width % 2:
            why = f"{height}x{width} is wrong because H.264 4:2:0 needs even sides"
            if level < finest:
                raise ConfigError(f"--levels: the size of level {level}, {why}; leave it out.")
            raise ConfigError(f"checkpoint: its clip size {why}; give one of an even clip size.")


def sample_pending(
    recipe: Recipe, pending: list[Subject], out: Path, means: Means, world: World
) -> None:
    """Sample what is not there yet: clips go around the processes, and the rest of the division is
    shared by teams."""
    config, source = recipe.config, recipe.source
    conditions = Conditions(config, recipe.request, source.text_encoder, world.device)
    # Before hours of sampling; what others keep under names of ours is not written over.
    world.on_first(lambda: storage.claim(str(out), MARK, MARK_TEXT, what="folder of samples"))
    whole_rounds = len(pending) // world.world_size * world.world_size
    own, rest = pending[:whole_rounds][world.rank :: world.world_size], pending[whole_rounds:]
    team, shared = join_team(rest, world)
    codec = Codec(config, recipe.request.vae, source.latents, world.device)
    conditions.read([*own, *shared])
    set_matmul_precision(config.engine)
    method = method_of(config)
    network = loaded(source, config, world.device)
    guide = loaded(recipe.guide, config, world.device) if recipe.guide else None
    # Whatever moves the budget: the program and its weights are in memory now.
    room = room_left(world.device, means)
    codec.refuse_more_than(room)
    with Progress(
        console=Terminal(stderr=True), transient=True, disable=not world.is_first
    ) as bars:
        total = (len(own) + len(shared)) * method.calls_per_clip
        bar = bars.add_task("sampling", total=total)
        for subjects, mates in ((own, ALONE), (shared, team)):
            most = min(means.clips_at_once, len(subjects))
            many = method.clips_at_once(network, most, room, mates) if subjects else 1
            for first in range(0, len(subjects), many):
                chosen = subjects[first : first + many]
                condition, null = conditions.of(chosen)
                first_frames = [subject.given for subject in chosen if subject.given]
                given = stack_given(first_frames, world.device) if first_frames else None
                with autocast(config.engine, world.device):
                    made = method.generate(
                        network,
                        condition=condition,
                        null=null,
                        seeds=[subject.seed for subject in chosen],
                        room=room,
                        team=mates,
                        progress=lambda calls: bars.advance(bar, calls),
                        given=None if given is None else codec.encode(given),
                        guide=guide,
                    )
                kept = 0 if recipe.request.levels else -1
                if mates.rank == 0:
                    finished = [codec.decode(clips, given) for clips in made[kept:]]
                    for row, subject in enumerate(chosen):
                        clips = [to_bytes(clips[row]) for clips in finished]
                        write_sample(out, recipe, subject, clips, method.outputs)


def loaded(source: Source, config: RunConfig, device: torch.device) -> Network:
    """The recipe's network with a source's weights."""
    network = method_of(config).network()
    source.load(network, config.method.sampling.weights)
    return network.to(device).eval()


def join_team(rest: list[Subject], world: World) -> tuple[Team, list[Subject]]:
    """The team that shares this process's part of `rest`, one subject each, and that subject."""
    if not rest:
        return ALONE, []
    bounds = [number * world.world_size // len(rest) for number in range(len(rest) + 1)]
    mine = (ALONE, list[Subject]())
    for subject, low, high in zip(rest, bounds, bounds[1:], strict=False):
        ranks = list(range(low, high))
        # Made by all, members or not: torch wants it so.
        group = dist.new_group(ranks) if len(ranks) > 1 else None
        if world.rank in ranks:
            assert not isinstance(group, int)
            mine = (Team(ranks.index(world.rank), len(ranks), group), [subject])
    return mine


def room_left(device: torch.device, means: Means) -> Room:
    """What generation may fill of the device, and of main memory beside it.

    `memory_gib` bounds the whole process: on a CPU its main memory, on a GPU that one's memory.
    """
    memory_gib = means.memory_gib
    mates = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    spare = int(0.7 * available_memory() / mates)
    if device.type == "cuda":
        used, free = torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)[0]
        allowed = 0.9 * free if memory_gib is None else memory_gib * GIB - used
        return Room(int(min(allowed, free)), spare, means.scratch)
    used = psutil.Process().memory_info().rss
    allowed = spare if memory_gib is None else int(memory_gib * GIB) - used
    return Room(allowed - RESERVE_BYTES, 0, means.scratch)


def sampling_world() -> AbstractContextManager[World]:
    """The processes that sample together; the recipe's engine plays no part."""
    launched = int(os.environ.get("WORLD_SIZE", "1") or 1) > 1
    engine = EngineConfig(
        kind="fsdp" if launched else "single", collective_timeout_seconds=PATIENCE_SECONDS
    )
    return join_world(engine)


def with_sampling(config: RunConfig, overrides: list[str] | tuple[str, ...]) -> RunConfig:
    """The recipe with other sampling settings; they are checked like a recipe's."""
    content = config.model_dump(mode="json")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not key or not equals:
            raise ConfigError(f"--set {override}: is no setting; write KEY=VALUE.")
        value = parse_value(text, f"--set {override}")
        content["method"]["sampling"][key.removeprefix("method.sampling.")] = value
    return parse_config(content, "--set")


def to_bytes(clip: Float[Tensor, "channels frames height width"]) -> Clip:
    """[-1, 1] -> bytes, channels last; frame by frame, for a clip may be large."""
    frames = [
        ((frame.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        for frame in clip.unbind(1)
    ]
    return rearrange(torch.stack(frames), "t c h w -> t h w c").contiguous().numpy()


def write_sample(
    out: Path, recipe: Recipe, subject: Subject, clips: list[Clip], outputs: list[Output]
) -> None:
    """The mp4 files, the finest level last, and then their record, without which they do not
    count."""
    settings = recipe.config.method.sampling
    fps, coarsest = settings.fps or 1.0, len(outputs) - len(clips)
    levels = {}
    for level, clip in enumerate(clips[:-1], coarsest):
        file = f"{subject.number:04d}.level-{level}.mp4"
        media = encode_clip(clip, fps / outputs[level].frame_stride, index_first=True)
        storage.write_atomic(str(out / file), media)
        levels[str(level)] = {"file": file, "sha256": sha256(media).hexdigest()}
    file = f"{subject.number:04d}.mp4"
    media = encode_clip(clips[-1], fps, index_first=True)
    storage.write_atomic(str(out / file), media)
    record = {
        "prompt": subject.shows,
        "negative_prompt": recipe.request.negative_prompt,
        "outputs": [asdict(output) for output in outputs],
        "levels": levels,
        "file": file,
        "seed": subject.seed,
        "checkpoint": str(recipe.source.folder),
        "step": recipe.source.step,
        "settings": settings.model_dump(mode="json"),
        "sha256": sha256(media).hexdigest(),
        "key": recipe.key(subject),
    }
    if subject.given:
        record["given"] = {"file": subject.given.file, "sha256": subject.given.digest}
    storage.write_atomic(str(record_path(out, subject.number)), json.dumps(record).encode())


def record_path(out: Path, number: int) -> Path:
    """Where the record of a clip lies."""
    return out / f"{number:04d}.json"


def is_done(out: Path, recipe: Recipe, subject: Subject) -> bool:
    """Whether a clip is there, whole, and was made just as it would be made now."""
    record = read_mapping(record_path(out, subject.number))
    if record.get("key") != recipe.key(subject):
        return False
    entries = [record]
    if recipe.request.levels:
        levels = record.get("levels") or {}
        if len(levels) < len(method_of(recipe.config).outputs) - 1:
            return False
        entries += levels.values()
    return all(
        (out / entry["file"]).is_file()
        and sha256((out / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
        for entry in entries
    )


def summarise(out: Path, count: int) -> None:
    """contact_sheet.png from the written clips and, last, samples.json with all records."""
    found = [read_mapping(record_path(out, number)) for number in range(count)]
    records = list(filter(None, found))
    clips = [decode_clip((out / r["file"]).read_bytes()) for r in records[:MOST_ON_SHEET]]
    sheet = io.BytesIO()
    contact_sheet(clips).save(sheet, "PNG")
    storage.write_atomic(str(out / "contact_sheet.png"), sheet.getvalue())
    storage.write_atomic(str(out / "samples.json"), json.dumps(records, indent=1).encode())


def contact_sheet(clips: list[Clip]) -> Image.Image:
    """Four frames of every clip in a row, two clips side by side."""
    strips = []
    for clip in clips:
        chosen = clip[np.linspace(0, len(clip) - 1, min(4, len(clip))).round().astype(int)]
        strips.append(np.pad(rearrange(chosen, "t h w c -> h (t w) c"), ((1, 1), (1, 1), (0, 0))))
    if len(strips) % 2:
        strips.append(np.zeros_like(strips[0]))
    rows = [np.concatenate(strips[i : i + 2], axis=1) for i in range(0, len(strips), 2)]
    sheet = Image.fromarray(np.concatenate(rows))
    zoom = max(1, round(LEAST_SHEET_HEIGHT / clips[0].shape[1]))
    return sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.Resampling.NEAREST)
