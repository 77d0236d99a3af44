"""The temporal pyramid: what is seen of the past, and which stage and unit a sample trains."""

from collections import Counter

import pytest
import torch

from data_pipeline.errors import ConfigError
from t2v.methods.pyramid_flow.flow import down, down_by
from t2v.methods.pyramid_flow.history import Stretch, corrupt, history_pieces, lay_out, units_of
from t2v.methods.pyramid_flow.objective import Lesson, draw, training_turn
from t2v.recipe.recipe import load_config, method_of
from tests.test_hpdm import CONFIGS
from tests.tiny_flow import FULL, flow_config, noise_group

LATENTS = {"name": "vae", "channels": 4, "stride": [8, 8, 8]}


def listed(unit: int, stage: int) -> list[tuple[list[int], int]]:
    """The layout as the paper's code lists it: (units, level), step by step into the past."""
    pieces, level, newest = [([unit], stage)], stage, unit - 1
    while newest >= 0:
        if level == 0:
            pieces.append((list(range(newest + 1)), 0))
            break
        pieces.append(([newest], level))
        level, newest = level - 1, newest - 1
    return pieces[::-1]


def test_layouts_are_those_listed_by_hand():
    assert lay_out(0, 2) == [Stretch(0, 1, 2)]
    assert lay_out(5, 2) == [
        Stretch(0, 3, 0),
        Stretch(3, 4, 1),
        Stretch(4, 5, 2),
        Stretch(5, 6, 2),
    ]
    assert lay_out(5, 1) == [Stretch(0, 4, 0), Stretch(4, 5, 1), Stretch(5, 6, 1)]
    assert lay_out(5, 0) == [Stretch(0, 5, 0), Stretch(5, 6, 0)]


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_layouts_follow_the_rule_for_every_unit_and_stage(stages):
    for unit in range(8):
        for stage in range(stages):
            found = [
                (list(range(s.first, s.end)), s.level)
                for s in lay_out(unit, stage)
            ]  # fmt: skip
            assert found == listed(unit, stage), (unit, stage)


def test_units_are_one_frame_and_then_equal():
    assert units_of(9, 2).ends == (1, 3, 5, 7, 9)
    assert units_of(1, 4).ends == (1,)
    assert units_of(6, None).ends == (6,)
    units = units_of(9, 2)
    assert [units.start(unit) for unit in range(5)] == [0, 1, 3, 5, 7]
    assert units.frames(Stretch(1, 3, 0)) == slice(1, 5)


@pytest.mark.parametrize(
    ("recipe", "tokens", "whole"),
    [
        ("pyramid_flow_768p.yaml", [7_440, 8_880, 15_360], 119_040),
        ("pyramid_flow_384p.yaml", [960, 1_320, 2_940], 15_360),
    ],
)
def test_samples_have_the_published_numbers_of_tokens(recipe, tokens, whole):
    facts = method_of(load_config(CONFIGS / recipe)).facts()
    assert facts["tokens of the last unit's sample, by stage"] == tokens
    assert facts["tokens of the whole clip at full resolution"] == whole


def test_history_is_pooled_clean_frames():
    units, clean = units_of(7, 2), torch.randn(2, 3, 7, 16, 24)
    pieces = history_pieces(clean, units, unit=3, stage=2, stages=3)
    assert torch.equal(pieces[0], down_by(clean[:, :, :1], 2))
    assert torch.equal(pieces[1], down(clean[:, :, 1:3]))
    assert torch.equal(pieces[2], clean[:, :, 3:5])
    assert history_pieces(clean, units, unit=0, stage=2, stages=3) == []


def test_corruption_is_a_share_of_noise_that_a_sample_shares():
    pieces = [torch.randn(2, 3, 1, 4, 6), torch.randn(2, 3, 2, 8, 12)]
    noise = [torch.randn_like(piece) for piece in pieces]
    share = torch.tensor([0.0, 0.3])
    for piece, z, got in zip(pieces, noise, corrupt(pieces, noise, share), strict=True):
        assert torch.equal(got[0], piece[0])
        torch.testing.assert_close(got[1], 0.7 * piece[1] + 0.3 * z[1])


def test_training_corrupts_the_history_and_nothing_else():
    config, clear = flow_config(), flow_config(history_noise=0.0)
    for unit in range(4):
        group, velocity = noise_group(config, unit=unit, stage=2)
        clean, same = noise_group(clear, unit=unit, stage=2)
        assert torch.equal(velocity, same)
        assert torch.equal(group.pieces[-1], clean.pieces[-1])
        for piece, one in zip(group.pieces[:-1], clean.pieces[:-1], strict=True):
            assert not torch.equal(piece, one)


def test_the_share_of_noise_stays_below_its_bound_and_reaches_for_it():
    config, piece = flow_config().method, torch.zeros(1, 1, 1, 2, 2)
    drawn = [draw(Lesson(0, 0, 0, seed), [piece], config) for seed in range(400)]
    shares = torch.stack([one.share for one in drawn])
    assert 0 <= shares.min() < 0.02
    assert 0.31 < shares.max() <= 1 / 3
    r = torch.stack([one.r for one in drawn])
    assert 0 < r.min() < 0.02
    assert 0.98 < r.max() <= 1
    assert abs(torch.corrcoef(torch.stack([shares, r]))[0, 1]) < 0.1


def test_bins_of_a_lesson_hold_its_place():
    config, piece = flow_config().method, torch.zeros(1, 1, 1, 2, 2)
    for place in range(4):
        drawn = [draw(Lesson(0, 0, 0, seed, place, 4), [piece], config) for seed in range(50)]
        r = torch.stack([one.r for one in drawn])
        assert place / 4 < r.min()
        assert r.max() <= (place + 1) / 4


def test_every_unit_is_trained_at_the_finest_stage_once_per_cycle():
    config = flow_config().method
    units = len(config.units)
    for cycle in range(5):
        numbers = range(cycle * 4 * units, (cycle + 1) * 4 * units)
        turns = [training_turn(config, number, seed=7) for number in numbers]
        assert Counter(stage for stage, _ in turns) == {0: units, 1: 2 * units, 2: units}
        for stage in range(3):
            assert {unit for s, unit in turns if s == stage} == set(range(units))
        for first in range(0, len(turns), 4):  # long histories meet short ones
            (_, low), (_, mid), (_, same), (_, high) = turns[first : first + 4]
            assert low == mid == same == units - 1 - high
    orders = {
        tuple(training_turn(config, 4 * (u + c * units) + 3, 7)[1] for u in range(units))
        for c in range(20)
    }
    assert len(orders) > 5


def test_neighbours_of_a_turn_share_stage_and_unit():
    config = flow_config(turn_samples=3, global_batch_size=12).method
    turns = [training_turn(config, number, seed=7) for number in range(48)]
    for first in range(0, 48, 3):
        assert len(set(turns[first : first + 3])) == 1
    alone = flow_config().method
    assert turns[::3] == [training_turn(alone, number, seed=7) for number in range(16)]


def test_one_unit_makes_one_kind_of_sample_per_stage():
    config = flow_config(**FULL).method
    assert {training_turn(config, n, seed=0) for n in range(40)} == {(0, 0), (1, 0), (2, 0)}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"clip_size": [8, 16, 24]}, "clip_size: 8 (frames) is wrong because its 8 frames are not "
         "1 and then units of 2; use 7 or 9, or another unit_frames"),
        ({"clip_size": [7, 16, 20]}, "flow.joints: 3 stages are wrong because width 20 is no "
         "multiple of model.token_size 2 x 4 at the coarsest; use 2, or sides that are multiples "
         "of 8"),
        ({"clip_size": [7, 15, 24]}, "flow.joints: 3 stages are wrong because height 15 is no "
         "multiple of model.token_size 2 x 4 at the coarsest; make sides multiples of 8"),
        ({"flow": {"joints": [0.6, 0.3]}}, "flow.joints: [0.6, 0.3] is wrong because they do not "
         "rise from above 0 to below 1; order them, such as [0.333, 0.666]"),
        ({"flow": {"gamma": 0.5}}, "flow.gamma: 0.5 is wrong because four cells cannot all have a "
         "correlation of -0.5; use at most 1/3"),
        ({"flow": {"joints": [0.3, 0.31], "gamma": 0.01}}, None),
        ({"temporal": "full"}, "unit_frames: is wrong because temporal 'full' has one unit; leave "
         "it out"),
        ({"unit_frames": None}, "unit_frames: missing because temporal is 'pyramid'; give the "
         "frames of a unit"),
        ({"space": "latents"}, "latents: missing because space is 'latents'; give the "
         "set's name, channels and stride"),
        ({"latents": LATENTS}, "latents: is wrong because space is "
         "'pixels'; leave it out, or use latents"),
        ({"space": "latents", "latents": LATENTS, "clip_size": [8, 64, 64]},
         "clip_size: 8 (frames) is wrong because the autoencoder takes 1 frame and then 8 at a "
         "time; use 1 or 9"),
        ({"space": "latents", "latents": LATENTS, "clip_size": [9, 60, 64]},
         "clip_size: 60 (height) is wrong because it is no multiple of latents.stride 8; use 56"),
        ({"stage_turns": [0, 1]}, "stage_turns: [0, 1] is wrong because the stages are 0 to 2; "
         "give each of them a turn, and no other"),
        ({"sampling": {"steps": [1, 1]}}, "sampling.steps: [1, 1] has 2 entries for 3 stages; "
         "give one per stage"),
        ({"sampling": {"first_steps": [1, 1]}}, "sampling.first_steps: [1, 1] has 2 entries for 3 "
         "stages; give one per stage"),
        ({"model": {"dim": 40}}, "model.head_dim: 16 is wrong because it does not divide dim 40; "
         "choose a divisor"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_one_line(changes, told):
    if told is None:
        assert flow_config(**changes).method.flow.stages == 3
        return
    with pytest.raises(ConfigError) as refused:
        flow_config(**changes)
    assert str(refused.value) == f"tiny: method.{told}."


def test_batches_without_the_exact_mixture_are_refused():
    with pytest.raises(ConfigError) as refused:
        flow_config(turn_samples=3)
    assert str(refused.value) == (
        "tiny: global_batch_size: 4 is wrong because method.turn_samples 3 x 4 of "
        "method.stage_turns make rounds of 12, and then no step has the exact mixture of stages; "
        "use a multiple."
    )
