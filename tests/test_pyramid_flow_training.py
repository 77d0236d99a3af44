"""Pyramid Flow's loss around a network, and its sampler around one."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from data_pipeline.feeding.loader import Batch
from t2v.methods.method import Room, Team
from t2v.methods.pyramid_flow.flow import clock, stage_ends
from t2v.methods.pyramid_flow.history import history_pieces
from t2v.methods.pyramid_flow.network import Group
from t2v.methods.pyramid_flow.objective import Lesson, errors, training_turn
from t2v.methods.pyramid_flow.sampling import generate, guided
from t2v.recipe.recipe import RunConfig, method_of
from tests.tiny import class_condition
from tests.tiny_flow import FULL, TEXT, flow_config, noise_batch, noise_group, stirred_network

CPU = torch.device("cpu")
BOUNDLESS = Room(device_bytes=1 << 40)
ROUND = [0, 1, 2, 3]  # one sample at stage 0, two at stage 1, one at stage 2


class Oracle:
    """A network that answers by a function, and remembers what it was asked."""

    def __init__(self, answer: Callable[[Group], Tensor]) -> None:
        self.answer = answer
        self.calls: list[list[Group]] = []

    def __call__(self, groups: list[Group]) -> list[Tensor]:
        self.calls.append(groups)
        return [self.answer(group) for group in groups]


def nothing(group: Group) -> Tensor:
    return torch.zeros_like(group.pieces[-1])


def losses(config: RunConfig, network: object, numbers: list[int]) -> Tensor:
    batch = noise_batch(config, numbers)
    return method_of(config).losses(network, batch, seed=config.seed, device=CPU)


# The loss.


def test_a_fresh_network_has_the_mean_square_of_the_velocity_as_its_loss():
    config = flow_config()
    fresh = method_of(config).network()
    fresh.init_weights(0)
    assert torch.equal(losses(config, fresh, ROUND), losses(config, Oracle(nothing), ROUND))
    lessons = [Lesson(row, 2, 3, row) for row in (0, 1)]
    _, velocity = noise_group(config, unit=3, stage=2)
    found = errors(Oracle(nothing), noise_batch(config, [0, 1]), config.method, lessons, CPU)
    torch.testing.assert_close(found, velocity.square().mean((1, 2, 3, 4)))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_true_velocity_has_no_loss(stage):
    config = flow_config()
    lessons = [Lesson(row, stage, 2, row) for row in (0, 1)]
    _, velocity = noise_group(config, unit=2, stage=stage)
    knowing = Oracle(lambda group: velocity)
    assert not errors(knowing, noise_batch(config, [0, 1]), config.method, lessons, CPU).any()


@pytest.mark.parametrize(
    ("numbers", "counts"), [(ROUND, [1, 2, 1]), ([0, 3], [1, 0, 1]), ([1, 2, 6], [0, 3, 0])]
)
def test_samples_count_alike_whatever_their_resolution(numbers, counts):
    """An answer that is off by 10,000 costs the same at every stage."""
    off = Oracle(lambda group: torch.full_like(group.pieces[-1], 1e4))
    parts = losses(flow_config(), off, numbers) / 1e8
    torch.testing.assert_close(parts, torch.tensor(counts) / len(numbers), rtol=1e-2, atol=0)


def test_losses_of_a_batch_are_those_of_its_parts():
    """However samples are divided into micro-batches, and so over ranks."""
    config = flow_config(conditioning=TEXT)
    network, numbers = stirred_network(config), list(range(8))
    with torch.no_grad():
        whole = losses(config, network, numbers)
        for size in (1, 2, 4):
            parts = [losses(config, network, numbers[n : n + size]) for n in range(0, 8, size)]
            torch.testing.assert_close(torch.stack(parts).mean(0), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("numbers", [ROUND, [5], [8, 10, 12, 14, 16, 17]])
def test_a_micro_batch_is_one_call_of_the_network(numbers):
    """FSDP gathers weights in every call: a rank with more of them would wait for ever."""
    network = Oracle(nothing)
    losses(flow_config(), network, numbers)
    [groups] = network.calls
    assert sum(len(group.clock) for group in groups) == len(numbers)
    assert len({(group.stage, group.unit) for group in groups}) == len(groups)


def test_losses_follow_from_seed_and_numbers():
    config = flow_config()
    echo = Oracle(lambda group: group.pieces[-1])
    first = losses(config, echo, ROUND)
    assert torch.equal(first, losses(config, echo, ROUND))
    assert not torch.equal(first, losses(flow_config(seed=4), echo, ROUND))


def latent_batch(config: RunConfig, frames: list[int]) -> Batch:
    """Latents of noise, of clips and of images, whose latents are one frame."""
    channels, size = config.method.channels, config.method.size
    latents = torch.zeros(len(frames), channels, max(frames), *size[1:], dtype=torch.bfloat16)
    draw = torch.Generator().manual_seed(0)
    for row, count in enumerate(frames):
        shape = (channels, count, *size[1:])
        latents[row, :, :count] = torch.randn(shape, generator=draw).bfloat16()
    batch = noise_batch(config, list(range(len(frames))))
    return replace(batch, latents=latents, latent_frames=torch.tensor(frames))


IN_LATENTS = {
    "space": "latents",
    "latents": {"name": "vae", "channels": 4, "stride": [4, 4, 4]},
    "clip_size": [13, 32, 32],
    "unit_frames": 1,
}


def test_images_among_latents_train_the_first_unit_alone():
    config = flow_config(**IN_LATENTS)
    for frames in ([4, 1, 1, 4], [1, 1, 1, 1]):
        network, batch = Oracle(nothing), latent_batch(config, frames)
        method_of(config).losses(network, batch, seed=config.seed, device=CPU)
        [groups] = network.calls
        images = sum(len(group.clock) for group in groups if group.unit == 0)
        assert images >= frames.count(1)
        assert sum(len(group.clock) for group in groups) == 4
    numbers = [n for n in range(40) if training_turn(config.method, n, config.seed)[1] > 0]
    assert numbers  # whose clips would have trained a later unit


def test_images_do_not_go_with_all_frames_at_once():
    config = flow_config(**IN_LATENTS | FULL)
    batch = latent_batch(config, [4, 1, 4, 4])
    with pytest.raises(
        ConfigError, match=r"images are wrong because method\.temporal 'full' makes"
    ):
        method_of(config).losses(Oracle(nothing), batch, seed=config.seed, device=CPU)


# The held-out loss.


def held_out(config: RunConfig, network: object, numbers: list[int], turn: int, bins: int):
    batch, turns = noise_batch(config, numbers), [turn] * len(numbers)
    with torch.no_grad():
        return method_of(config).held_out(
            network, batch, turns=turns, bins=bins, seed=5, device=CPU
        )


def test_held_out_losses_visit_every_bin_of_every_stage_once():
    config, network = flow_config(), Oracle(nothing)
    found = [held_out(config, network, [11, 12], turn, 4)[1] for turn in range(4)]
    table = torch.tensor(found)  # turn, sample, stage
    assert (table.sort(0).values == torch.arange(4)[:, None, None]).all()
    assert method_of(config).bin_edges(4) == [0.25, 0.5, 0.75]
    for [groups], places in zip(zip(network.calls, strict=True), found, strict=True):
        asked = {group.stage: [] for group in groups}
        for group in groups:
            high, low = config.method.flow.clock_edges[group.stage : group.stage + 2]
            asked[group.stage] += (1 - (high - group.clock) / (high - low)).tolist()
        for stage, of_stage in asked.items():
            bins = sorted(min(int(4 * r), 3) for r in of_stage)
            assert bins == sorted(row[stage] for row in places)


def test_a_held_out_sample_is_measured_alike_in_any_company():
    config = flow_config(conditioning=TEXT)
    network = stirred_network(config)
    together, _ = held_out(config, network, [11, 12], 2, 4)
    alone, _ = held_out(config, network, [12], 2, 4)
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)


def test_held_out_losses_estimate_the_training_loss():
    """Stages count by their share of the turns, so the sums are of the same thing."""
    config, network, numbers = flow_config(), Oracle(nothing), list(range(160))
    trained = losses(config, network, numbers)
    measured = [held_out(config, network, numbers[:40], turn, 2)[0].mean(0) for turn in (0, 1)]
    torch.testing.assert_close(torch.stack(measured).mean(0), trained, rtol=0.1, atol=0)


# The sampler.


def sample(
    config: RunConfig,
    network: object,
    *,
    labels: tuple[int, ...] = (0, 1),
    seeds: tuple[int, ...] = (5, 6),
    **options: object,
) -> Tensor:
    condition, null = class_condition(list(labels)), class_condition([3] * len(labels))
    return generate(
        network, config.method, condition=condition, null=null, seeds=list(seeds), **options
    )


@pytest.mark.parametrize("changes", [{}, FULL], ids=["pyramid", "full"])
def test_a_network_that_knows_the_clip_is_followed_to_it(changes):
    """Every unit, stage, jump and step in its place: any other would leave noise behind."""
    config = flow_config(**changes, sampling={"guidance_scale": 3.0}).method
    clips = torch.rand(3, 3, *config.size, generator=torch.Generator().manual_seed(0)) - 0.5

    def knows(group: Group) -> Tensor:
        flow, units, state = config.flow, config.units, group.pieces[-1]
        clean = clips[group.condition.label % 3]
        for piece, shown in zip(
            group.pieces,
            history_pieces(clean, units, unit=group.unit, stage=group.stage, stages=flow.stages),
            strict=False,
        ):
            torch.testing.assert_close(piece, shown, rtol=0, atol=1e-4)
        x = clean[:, :, units.start(group.unit) : units.ends[group.unit]]
        start, end = stage_ends(x, torch.zeros_like(x), flow, group.stage)
        high, low = flow.clock_edges[group.stage : group.stage + 2]
        r = (1 - (high - group.clock) / (high - low))[:, None, None, None, None]
        first, last = flow.sigma_start[group.stage], flow.sigma_end[group.stage]
        noise = (state - r * start - (1 - r) * end) / (r * first + (1 - r) * last)
        return start - end + (first - last) * noise

    # The null class 3 shows clip 0, and guidance is away from it towards clip 0: no move at all.
    run = flow_config(**changes, sampling={"guidance_scale": 3.0})
    found = sample(run, Oracle(knows), labels=(0,), seeds=(7,))
    torch.testing.assert_close(found, clips[:1], rtol=0, atol=1e-4)
    plain = sample(flow_config(**changes), Oracle(knows), labels=(1, 2))
    torch.testing.assert_close(plain, clips[1:], rtol=0, atol=1e-4)


def test_clips_follow_from_their_seeds_and_conditions_alone():
    config = flow_config(sampling={"guidance_scale": 3.0})
    network = stirred_network(config)
    clips = sample(config, network)
    assert clips.shape == (2, 3, 7, 16, 24)
    assert clips.abs().max() <= 1
    assert torch.equal(clips, sample(config, network))
    for row in (0, 1):
        alone = sample(config, network, labels=(row,), seeds=(5 + row,))
        # A product of another shape may end in other bits, which a step passes on.
        torch.testing.assert_close(clips[row : row + 1], alone, rtol=0, atol=1e-4)
    assert not torch.equal(clips[:1], sample(config, network, labels=(0,), seeds=(6,)))
    assert not torch.equal(clips[:1], sample(config, network, labels=(1,), seeds=(5,)))


@pytest.mark.parametrize("changes", [{}, FULL], ids=["pyramid", "full"])
@pytest.mark.parametrize("reference", [False, True])
def test_each_step_is_a_call_at_a_time_of_its_own(changes, reference):
    steps = {"steps": [3, 1, 2], "first_steps": [2, 4, 1], "reference_grid": reference}
    config = flow_config(**changes, sampling=steps)
    network, told = Oracle(nothing), []
    sample(config, network, labels=(0,), seeds=(1,), progress=told.append)
    groups = [group for [group] in network.calls]
    assert sum(told) == len(groups) == method_of(config).calls_per_clip
    for unit in range(len(config.method.units)):
        own = [group for group in groups if group.unit == unit]
        counts = (2, 4, 1) if unit == 0 else (3, 1, 2)
        assert [group.stage for group in own] == [s for s in range(3) for _ in range(counts[s])]
        told_times = torch.cat([group.clock for group in own])
        assert told_times.dtype == torch.float32
        assert (told_times.diff() < 0).all()
        assert told_times[0] == clock(torch.ones(1), config.method.flow, 0)


@pytest.mark.parametrize(
    ("first", "later"), [(None, 1.0), (2.0, 1.0), (1.0, 4.0), (None, 2.0), (0.0, 3.0)]
)
def test_guidance_leads_away_from_the_null_condition(first, later):
    """Where the velocity is the label, 1 for the prompt and 3 for null, scale w makes 3 - 2 w."""
    config = flow_config(sampling={"first_guidance_scale": first, "guidance_scale": later})
    network = Oracle(lambda group: group.condition.label.expand_as(group.pieces[-1]).float())
    asked = network, config.method, class_condition([1]), class_condition([3])
    for unit in range(4):
        frames = torch.zeros(1, 3, config.method.units.start(unit), 16, 24)
        scale = later if unit or first is None else first
        network.calls.clear()
        velocity = guided(*asked, frames, unit, Team(), lambda _: None)(
            torch.zeros(1, 1, 1, 1, 1), 2, 0.5
        )
        assert velocity.item() == pytest.approx(3 - 2 * scale)
        assert len(network.calls) == (1 if scale == 1 else 2)
    assert method_of(config).is_guided == (later != 1 or first not in (None, 1.0))


def test_a_team_makes_the_bytes_of_one_process():
    """Its other member answers the null branch, as its own process would."""
    config = flow_config(sampling={"guidance_scale": 2.5})
    network, asked = stirred_network(config), []

    class Mates(Team):
        def gather(self, part: Tensor) -> list[Tensor]:
            [group] = asked.pop()
            return [part, network([replace(group, condition=class_condition([3]))])[0]]

    def remember(groups: list[Group]) -> list[Tensor]:
        asked.append(groups)
        return network(groups)

    alone = sample(config, network, labels=(0,), seeds=(1,))
    shared = sample(config, remember, labels=(0,), seeds=(1,), team=Mates(0, 2))
    assert torch.equal(alone, shared)


# Given frames.


@pytest.mark.parametrize("frames", [1, 3, 5])
def test_given_frames_come_back_bit_for_bit_and_are_gone_on_from(frames):
    config = flow_config(sampling={"guidance_scale": 2.0})
    method, network = method_of(config), stirred_network(config)
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, frames, 16, 24), generator=draw)
    given = pixels.float() / 127.5 - 1

    def extend(given: Tensor) -> Tensor:
        [clips] = method.generate(
            network, condition=class_condition([0, 1]), null=class_condition([3, 3]),
            seeds=[5, 6], room=BOUNDLESS, team=Team(), progress=lambda _: None, given=given,
        )  # fmt: skip
        return clips

    clips = extend(given)
    assert clips.shape == (2, 3, 7, 16, 24)
    assert torch.equal(clips[:, :, :frames], given)
    assert torch.equal(((clips[:, :, :frames] + 1) * 127.5).round().long(), pixels)
    assert not torch.equal(clips[:, :, frames:], extend(-given)[:, :, frames:])
    assert method.problem_with_given(frames) is None


def test_given_frames_that_do_not_fit_are_told():
    method = method_of(flow_config())
    for frames in (0, 2, 4, 7, 9):
        assert method.problem_with_given(frames) == "units end after 1, 3, 5 frames; give as many"
    full = method_of(flow_config(**FULL))
    assert full.problem_with_given(1) == "the checkpoint makes all frames at once; leave it out"


def test_clips_at_once_keep_to_the_room():
    config = flow_config()
    method, network = method_of(config), stirred_network(config)
    assert method.clips_at_once(network, 8, BOUNDLESS, Team()) == 8
    with pytest.raises(ConfigError, match="one clip cannot be sampled in it; give at least"):
        method.clips_at_once(network, 8, Room(device_bytes=1000), Team())
    counts = [
        method.clips_at_once(network, 8, Room(device_bytes=size), Team())
        for size in range(1 << 20, 1 << 24, 1 << 18)
    ]
    assert counts == sorted(counts)
    assert {1, 8} <= set(counts)


# What else is refused.


def test_a_base_of_another_flow_is_refused():
    method = method_of(flow_config())
    base = flow_config(clip_size=[1, 16, 24], history_noise=0.1).method.model_dump(mode="json")
    assert method.problem_with_base(base, resized=False) is None
    for field, change in (
        ("flow.joints", {"flow": {"joints": [0.3, 0.6]}}),
        ("flow.gamma", {"flow": {"gamma": 0.2}}),
        ("flow.shift", {"flow": {"shift": 2.0}}),
        ("model.token_size", {"model": {"token_size": [1, 4]}, "clip_size": [7, 16, 32]}),
        ("model.head_dim", {"model": {"head_dim": 32}}),
    ):
        base = flow_config(**change).method.model_dump(mode="json")
        found = method.problem_with_base(base, resized=False)
        assert found is not None
        assert found[0] == field
