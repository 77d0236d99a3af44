"""Sampling as a command: shared by processes, taken up again, within a budget; its refusals."""

import contextlib
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml

from data_pipeline.errors import ConfigError, StorageError
from data_pipeline.feeding.config import NoConditioning, TextConditioning
from data_pipeline.media.codec import decode_clip
from data_pipeline.text.encoder import TextEncoder
from t2v.cli import main
from t2v.engine.config import EngineConfig
from t2v.engine.world import join_world
from t2v.methods.hpdm.memory import LevelRoom, canvas_bytes, plan_memory, row_bytes, volume_bytes
from t2v.methods.hpdm.sampling import generate
from t2v.methods.hpdm.store import Store
from t2v.methods.method import Room, Team
from t2v.recipe.recipe import method_of
from t2v.sampling.generate import refuse_odd_sizes
from t2v.sampling.subjects import Conditions, Request, read_prompts, subjects_of
from tests.distributed import next_world, run_distributed
from tests.tiny import THREE_LEVELS, class_condition, stirred_model, tiny_config, tiny_content

SAMPLING = {"steps": [2, 2, 1], "guidance_scale": 2.0, "overlap": ["", "h", ""], "tile_batch": 24}


def three_levels(**sampling: object):
    return tiny_config(**THREE_LEVELS | {"sampling": SAMPLING | sampling})


def sampled(team: Team = Team(), **more: object) -> list[np.ndarray]:  # noqa: B008
    """All levels of two clips of a network whose answers are not so wild that rounding grows."""
    config = three_levels()
    model = stirred_model(config)
    with torch.no_grad():
        model.detokenizer.weight.mul_(0.1)
    levels = generate(
        model,
        condition=class_condition([0, 2]),
        null=class_condition([3, 3]),
        seeds=[1, 2],
        sampling=config.method.sampling,
        diffusion=config.method.diffusion,
        team=team,
        **more,
    )
    return [level.numpy() for level in levels]


def sampled_together(run: str, out: str) -> tuple[int, list[np.ndarray]]:
    """The command's exit code, and then levels whose tiles all processes share."""
    code = command(run, out, 3, ["--clips-at-once=1"])
    next_world()
    with join_world(EngineConfig(kind="fsdp")) as world:
        group = dist.new_group(list(range(world.world_size)))
        return code, sampled(Team(world.rank, world.world_size, group))


@pytest.fixture(scope="module")
def run(datasets, tmp_path_factory) -> Path:
    """A run of one step of an unconditional recipe with three levels."""
    folder = tmp_path_factory.mktemp("run")
    sampling = {"steps": [2, 1, 1], "overlap": "w", "tile_batch": 8, "weights": "raw"}
    content = tiny_content(
        **THREE_LEVELS | {"sampling": sampling},
        total_steps=1,
        run_dir=str(folder / "run"),
        data={"sources": [{"path": str(datasets / "videos")}]},
    ) | {"conditioning": {"kind": "none"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    assert main(["train", str(folder / "recipe.yaml")]) == 0
    return folder / "run"


def command(run: str, out: str, count: int, more: list[str]) -> int:
    return main(["sample", run, f"--count={count}", f"--out={out}", *more])


def clips_of(out: Path) -> list[np.ndarray]:
    records = json.loads((out / "samples.json").read_text())
    return [decode_clip((out / record["file"]).read_bytes()) for record in records]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_clips_and_tiles_and_give_the_bytes_of_one(run, tmp_path, processes):
    """Three clips: with two processes one each and one shared, with four one per process or two."""
    torch.set_num_threads(1)
    one, several = tmp_path / "one", tmp_path / "several"
    assert command(str(run), str(one), 3, ["--clips-at-once=1"]) == 0
    alone = sampled()
    answers = run_distributed(sampled_together, processes, str(run), str(several), worlds=2)
    for code, levels in answers:
        assert code == 0
        assert all(np.array_equal(*pair) for pair in zip(levels, alone, strict=True))
    assert len(clips_of(several)) == 3
    for name in ("0000.mp4", "0001.mp4", "0002.mp4"):
        assert (several / name).read_bytes() == (one / name).read_bytes()


def test_clips_that_are_there_are_not_made_again(run, tmp_path):
    out = tmp_path / "out"
    assert command(str(run), str(out), 3, []) == 0
    made = {path.name: path.stat().st_mtime_ns for path in out.glob("*.mp4")}
    before = {path.name: path.read_bytes() for path in out.glob("*.mp4")}
    # As a killed run leaves it: one clip without record, one damaged, no summary.
    (out / "0001.json").unlink()
    (out / "0002.mp4").write_bytes(before["0002.mp4"][:-10])
    (out / "samples.json").unlink()
    assert command(str(run), str(out), 3, ["--clips-at-once=1"]) == 0
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.mp4")}
    assert [name for name in sorted(made) if made[name] == after[name]] == ["0000.mp4"]
    records = json.loads((out / "samples.json").read_text())
    assert [record["seed"] for record in records] == [0, 1, 2]
    old = [decode_clip(before[name]).astype(int) for name in sorted(before)]
    for one, other in zip(old, clips_of(out), strict=True):
        # Other company in a batch rounds otherwise, and the codec is lossy.
        assert abs(one - other).max() <= 3
    # Another seed, or another setting, is another clip.
    assert command(str(run), str(out), 1, ["--seed=5"]) == 0
    assert (out / "0000.mp4").stat().st_mtime_ns != made["0000.mp4"]
    assert [r["seed"] for r in json.loads((out / "samples.json").read_text())] == [5]


def test_a_memory_budget_does_not_change_a_clip(run, tmp_path):
    assert command(str(run), str(tmp_path / "free"), 1, []) == 0
    few = ["--memory-gib=8", f"--scratch={tmp_path}", "--set=method.sampling.tile_batch=3"]
    assert command(str(run), str(tmp_path / "few"), 1, few) == 0
    (free,), (bound,) = clips_of(tmp_path / "free"), clips_of(tmp_path / "few")
    assert abs(free.astype(int) - bound).max() <= 3


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--memory-gib=0.1"], "level 0 cannot be sampled in it; give at least"),
        (["--clips-at-once=0"], "--clips-at-once: 0 is wrong"),
        (["--memory-gib=-1"], "--memory-gib: -1 is wrong"),
        (["--memory-gib=inf"], "--memory-gib: inf is wrong"),
        (["--memory-gib=nan"], "--memory-gib: nan is wrong"),
        (["--set=steps"], "--set steps: is no setting; write KEY=VALUE."),
        (["--set==1"], "--set =1: is no setting; write KEY=VALUE."),
        (["--prompt=a dog"], "--prompt: is wrong because the checkpoint reads no text"),
        (["--encoder=t5"], "--encoder: is wrong because the checkpoint reads no text"),
        (["--set=guidance_scale=.inf"], "method.sampling.guidance_scale: value inf is wrong"),
        (["--set=overlap=5"], "method.sampling.overlap: value 5 is wrong"),
        (["--set=fps=1000000"], "method.sampling.fps: value 1000000 is wrong"),
        (["--set=fps=0.0001"], "fps: 0.0001 is wrong because mp4 holds no rate below 0.001"),
        (["--label=1"], "--label: [1] is wrong because the checkpoint has no classes"),
        (["--count=0"], "--count: 0 is wrong"),
        (["--negative-prompt=fog"], "--negative-prompt: is wrong because the checkpoint reads no"),
        (["--seed=-1"], "--seed: -1 is wrong"),
        (
            ["--set=overlap=whf"],
            "method.sampling.overlap: value 'whf' is wrong because it is none of f,",
        ),
        (["--set=overlap=[h,w]"], "method.sampling.overlap: ['h', 'w'] has 2 entries for 3 levels"),
        (["--set=guidance_scale=[1]"], "method.sampling.guidance_scale: [1.0] has 1 entries"),
        (["--set=shifted=w"], "--set: method.sampling.shifted: 'w' is wrong because tiles already"),
    ],
)
def test_a_request_that_cannot_be_is_one_line(run, tmp_path, capsys, more, words):
    out = tmp_path / "out"
    assert main(["sample", str(run), f"--out={out}", *more]) == 78
    error = capsys.readouterr().err.strip()
    assert words in error
    assert "\n" not in error
    assert not list(out.glob("*.mp4"))


def test_odd_sizes_are_refused_before_anything_is_sampled():
    odd = {"levels": 2, "patch_size": [2, 3, 8], "clip_size": [4, 6, 16]}
    plain = {"overlap": ""}
    method = method_of(tiny_config(pyramid=odd, sampling=plain))
    refuse_odd_sizes(method, Request())
    with pytest.raises(ConfigError) as refused:
        refuse_odd_sizes(method, Request(levels=True))
    assert str(refused.value) == (
        "--levels: the size of level 0, 3x8 is wrong because H.264 4:2:0 needs even sides; leave "
        "it out."
    )
    base = {"levels": 1, "patch_size": [2, 3, 8], "clip_size": [2, 3, 8]}
    alone = {"model": {"levels_per_block": [1, 1]}, "diffusion": {"input_scale_growth": 1.0}}
    one = method_of(tiny_config(pyramid=base, sampling=plain | {"steps": [2]}, **alone))
    with pytest.raises(ConfigError, match="its clip size 3x8 is wrong"):
        refuse_odd_sizes(one, Request())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a cat\n\na dog\n", "line 2: 0 characters is wrong because a prompt has 1 to 2000"),
        ("a cat\n" + "dog " * 2500 + "\n", "line 2: 9999 characters is wrong"),
        ("\n\n", "is wrong because it is empty"),
        (b"caf\xe9", "is not UTF-8 text"),
        ("a cat\na\x00dog\n", r"line 2: '\x00' is wrong because a prompt is one line of text"),
        ("a cat\u2028a dog\n", r"line 1: '\u2028' is wrong"),
    ],
)
def test_a_prompt_file_s_mistake_is_named_with_its_line(content, words, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=re.escape(words)):
        read_prompts(path)


def test_a_prompt_file_may_end_in_line_breaks(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("ein grüner Kreis\r\n a dog \n\n")
    assert read_prompts(path) == ["ein grüner Kreis", "a dog"]


def test_a_prompt_file_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfa cat\r\na\tdog\r\n")
    assert read_prompts(path) == ["a cat", "a\tdog"]


def test_kinds_of_recipes_take_their_own_subjects():
    classes = tiny_config()
    assert [s.shows for s in subjects_of(classes, Request(labels=(2, 0)))] == [2, 0]
    embeddings = TextConditioning(kind="text", encoder="t5", width=8, max_tokens=4)
    text = classes.model_copy(update={"conditioning": embeddings})
    free = classes.model_copy(update={"conditioning": NoConditioning(kind="none")})
    assert [s.seed for s in subjects_of(text, Request(prompts=("a", "b"), seed=7))] == [7, 8]
    assert [s.shows for s in subjects_of(free, Request(count=2))] == [None, None]
    assert len(subjects_of(free, Request())) == 1
    for config, request, words in (
        (classes, Request(prompts=("a",)), "--prompt: is wrong"),
        (classes, Request(labels=(3,)), "--label: [3] is wrong"),
        (text, Request(labels=(1,)), "--label: [1] is wrong"),
        (text, Request(prompts=("a",), count=2), "--count: is wrong"),
        (text, Request(), "--prompt: missing"),
        (text, Request(prompts=("a" * 10_000,)), "prompt 1: 10000 characters is wrong"),
        (text, Request(prompts=("a",), negative_prompt=" "), "--negative-prompt: 0 characters is"),
        (
            text,
            Request(prompts=("a", "caf\udce9")),
            r"prompt 2: '\udce9' is wrong because a prompt",
        ),
        (text, Request(prompts=("a",), negative_prompt="b"), "guidance_scale 1 never looks at it"),
    ):
        with pytest.raises(ConfigError, match=re.escape(words)):
            subjects_of(config, request)


def test_conditions_carry_text_frame_rate_and_size(datasets):
    encoder = str(datasets / "encoder")
    embeddings = TextConditioning(kind="text", encoder="tiny", width=8, max_tokens=8)
    config = tiny_config(sampling={"guidance_scale": 2.0, "fps": 12.0, "original_size": [240, 320]})
    config = config.model_copy(update={"conditioning": embeddings})
    trained_with = TextEncoder(encoder, max_tokens=8).provenance
    told = {}
    for negative in (None, "a red circle"):
        request = Request(("a red circle", "a blue square"), encoder=encoder,
                          negative_prompt=negative)  # fmt: skip
        conditions = Conditions(config, request, trained_with, torch.device("cpu"))
        subjects = subjects_of(config, request)
        conditions.read(subjects)
        told[negative] = conditions.of(subjects)
    (prompt, empty), (same, negative) = told[None], told["a red circle"]
    for condition in (prompt, empty, negative):
        assert condition.fps.tolist() == [12.0] * 2
        assert condition.original_size.tolist() == [[240.0, 320.0]] * 2
    assert torch.equal(prompt.text_tokens, same.text_tokens)
    assert torch.equal(negative.text_tokens[0], prompt.text_tokens[0])
    assert torch.equal(negative.text_tokens[0], negative.text_tokens[1])
    assert not torch.equal(empty.text_tokens[0], prompt.text_tokens[0])


def taken(model, config, rooms: list[LevelRoom], clips: int) -> list[int]:
    """Bytes of the device at each level, counted anew from where things are kept."""
    totals = []
    for level, room in enumerate(rooms):
        branches = len(config.method.sampling.branches(level))
        total = 4 * clips * canvas_bytes(model, level)
        total += max(room.tile_batch, branches) * row_bytes(model, level, model.config.num_latents)
        for coarse in range(min(level + 1, len(rooms) - 1)):
            if rooms[coarse].volumes == "device":
                reads = len(config.method.sampling.readers(coarse))
                total += clips * reads * volume_bytes(model, coarse, level, 4)
        if room.latents == "device":
            tiles = max(
                sum(bool(slab.low <= offset[slab.axis] < slab.high) for offset in offsets)
                for slab in room.slabs
                for offsets in [tiling_offsets(config, level)]
            )
            total += clips * branches * tiles * model.config.num_latents * 4 * 16
        totals.append(total)
    return totals


def tiling_offsets(config, level: int) -> list[list[int]]:
    from t2v.methods.hpdm.settings import level_tilings

    return level_tilings(config.method.sampling, config.method.pyramid, level)[0].offsets.tolist()


@pytest.mark.parametrize("overlap", ["hw", "fhw"])
def test_the_plan_stays_within_the_budget_and_uses_what_there_is(overlap):
    config = three_levels(overlap=overlap, tile_batch=96)
    model = stirred_model(config)
    everything = max(taken(model, config, plan_memory(
        model, config.method.sampling, clips=1, device_bytes=1 << 40), 1))  # fmt: skip
    plans, least = [], 0
    for share in (2.0 * 0.9**n for n in range(60)):
        budget = int(share * everything)
        try:
            rooms = plan_memory(model, config.method.sampling, clips=1, device_bytes=budget)
        except ConfigError:
            least = budget
            break
        assert max(taken(model, config, rooms, 1)) <= budget
        plans.append([(r.tile_batch, len(r.slabs), r.volumes, r.latents) for r in rooms])
    assert least > 0
    assert plans[0] == [(96, 1, "device", "device")] * 3
    assert plans[-1][2][0] < 10
    # Tiles take turns where that suffices; where all are one slab, their latents leave the device.
    kinds = {(slabs > 1, latents) for plan in plans for _, slabs, _, latents in plan}
    assert kinds >= {(False, "device"), (overlap == "hw", "device" if overlap == "hw" else "disk")}


def test_more_clips_go_together_only_where_nothing_suffers():
    config = three_levels()
    model, method = stirred_model(config), method_of(config)
    one = max(taken(model, config, plan_memory(
        model, config.method.sampling, clips=1, device_bytes=1 << 40), 1))  # fmt: skip
    for most in (4, 2):
        assert method.clips_at_once(model, most, Room(1 << 40), Team()) == most
    assert method.clips_at_once(model, 4, Room(int(1.1 * one)), Team()) == 1
    with pytest.raises(ConfigError, match="--memory-gib: leaves"):
        method.clips_at_once(model, 4, Room(1), Team())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_holds_what_memory_holds(dtype, tmp_path):
    generator = torch.Generator().manual_seed(0)
    with contextlib.closing(Store(torch.device("cpu"), tmp_path)) as store:
        far, near = (store.keep((3, 4, 6, 5, 7), dtype, place) for place in ("disk", "device"))
        for _ in range(20):
            low = [int(torch.randint(0, side, (), generator=generator)) for side in (3, 3, 4, 3)]
            box = (slice(low[0], low[0] + 1), *(slice(o, o + 2) for o in low[1:]))
            values = torch.randn(1, 2, 2, 2, 7, generator=generator)
            for kept in (far, near):
                kept.add(box, values) if low[0] else kept.write(box, values)
        whole = [(slice(0, 3),), (slice(0, 3), slice(0, 4), slice(0, 6), slice(0, 5))]
        for box in whole:
            assert torch.equal(far.read([box]), near.read([box]))
        boxes = [(slice(n, n + 1), slice(n, n + 2), slice(1, 3), slice(2, 5)) for n in (0, 2)]
        assert torch.equal(far.read(boxes), near.read(boxes))
    assert not list(tmp_path.iterdir())


def test_a_full_or_missing_scratch_folder_is_one_line(tmp_path):
    for folder, size, words in (
        (tmp_path / "none", 4, "give --scratch another folder"),
        (tmp_path, 1 << 48, "cannot hold 1048576.0 GiB of features"),
    ):
        store = Store(torch.device("cpu"), folder)
        with contextlib.closing(store), pytest.raises(StorageError, match=re.escape(words)):
            store.keep((size,), torch.float32, "disk")


def test_a_slower_place_for_everything_gives_the_same_levels(tmp_path):
    config = three_levels()
    rooms = plan_memory(
        stirred_model(config), config.method.sampling, clips=2, device_bytes=1 << 40
    )
    far = [replace(room, volumes="disk", latents="disk") for room in rooms]
    with contextlib.closing(Store(torch.device("cpu"), tmp_path)) as store:
        found = sampled(rooms=far, store=store)
    assert all(np.array_equal(*pair) for pair in zip(found, sampled(rooms=rooms), strict=True))
