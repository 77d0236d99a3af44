"""What may and what may not influence what in Pyramid Flow's network, and where its tokens are."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from t2v.methods.pyramid_flow.attention import Sight, attend, rotary_turns, rotate, token_places
from t2v.methods.pyramid_flow.method import blank_group
from t2v.methods.pyramid_flow.network import DoubleBlock, Group, PyramidFlow
from t2v.plan.footprint import forward_flops
from t2v.recipe.recipe import RunConfig, load_config, method_of
from tests.tiny_flow import FULL, TEXT, flow_config, noise_group, stirred_network

CONFIGS = Path(__file__).parent.parent / "configs"
CLASSES, NOTHING = {"kind": "class", "num_classes": 3}, {"kind": "none"}
KINDS = pytest.mark.parametrize("kind", [TEXT, CLASSES, NOTHING], ids=lambda kind: kind["kind"])


def perturbed(group: Group, piece: int, frames: slice = slice(None)) -> Group:
    """The group with other values in frames of one piece."""
    pieces = [one.clone() for one in group.pieces]
    pieces[piece][:, :, frames] += 1
    return replace(group, pieces=pieces)


def hidden(network: PyramidFlow, group: Group) -> list[tuple[Tensor, Tensor]]:
    """(text, clip) as each block leaves them."""
    text, kept = max(group.text_lengths or [0]), []

    def keep(block: nn.Module, _: object, made: object) -> None:
        if isinstance(block, DoubleBlock):
            [texts, clips] = made
            kept.append((texts[0], clips[0]))
        else:
            kept.append((made[0][:, :text], made[0][:, text:]))

    hooks = [block.register_forward_hook(keep) for block in network.blocks]
    answers(network, group)
    for hook in hooks:
        hook.remove()
    return kept


def answers(network: nn.Module, group: Group) -> Tensor:
    with torch.no_grad():
        return network([group])[0]


# Attention.


def dense(q: Tensor, k: Tensor, v: Tensor, units: list[int], padding: list[int]) -> Tensor:
    """The definition: one mask over all pairs of tokens."""
    unit = torch.tensor(units)
    shown = torch.arange(len(units)) >= torch.tensor(padding)[:, None]
    seen = (unit[:, None] >= unit) & shown[:, None, :]
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return (weights @ v) * shown[:, None, :, None]


@pytest.mark.parametrize("padding", [(0, 0), (2, 0), (1, 3)])
def test_attention_by_units_is_attention_under_one_mask(padding):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 12, 16, generator=generator, dtype=torch.float64)
    units = [0] * 5 + [1] * 1 + [2] * 4 + [3] * 2
    found = attend(q, k, v, Sight(padding, (5, 6, 10, 12))).unflatten(2, (2, 16)).transpose(1, 2)
    torch.testing.assert_close(found, dense(q, k, v, units, list(padding)), rtol=0, atol=1e-12)


def test_each_unit_is_one_call_without_a_mask(monkeypatch):
    """What flash attention takes, and never all queries against all keys."""
    calls = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def counted(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        assert not options
        calls.append((q.shape[2], k.shape[2]))
        return plain(q, k, v)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    x = torch.randn(2, 2, 12, 16)
    attend(x, x, x, Sight((0, 0), (5, 6, 10, 12)))
    assert calls == [(5, 5), (1, 6), (4, 10), (2, 12)]


# Causality.


@KINDS
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_unit_sees_no_later_one(kind, stage):
    config = flow_config(conditioning=kind)
    network, (group, _) = stirred_network(config), noise_group(config, unit=3, stage=stage)
    ends = config.method.token_ends(3, stage)
    places = {  # piece and frames of each unit
        2: [(0, slice(0, 1)), (1, slice(None)), (2, slice(None)), (3, slice(None))],
        1: [(0, slice(0, 1)), (0, slice(1, 3)), (1, slice(None)), (2, slice(None))],
        0: [(0, slice(0, 1)), (0, slice(1, 3)), (0, slice(3, 5)), (1, slice(None))],
    }[stage]
    before = hidden(network, group)
    for unit, place in enumerate(places):
        start = ends[unit - 1] if unit else 0
        after = hidden(network, perturbed(group, *place))
        for (text, clip), (new_text, new_clip) in zip(before, after, strict=True):
            assert torch.equal(clip[:, :start], new_clip[:, :start])
            assert (clip[:, start:] != new_clip[:, start:]).any(-1).all()
            assert unit == 0 or torch.equal(text, new_text)


@KINDS
def test_all_of_a_unit_sees_all_of_it(kind):
    config = flow_config(conditioning=kind)
    network, (group, _) = stirred_network(config), noise_group(config, unit=1, stage=2)
    before = answers(network, group)
    after = answers(network, perturbed(group, -1, slice(1, 2)))
    assert (before != after).any(1).all()  # both frames, every cell


def test_text_sees_the_first_unit_and_no_other():
    config = flow_config(conditioning=TEXT)
    network, (group, _) = stirred_network(config), noise_group(config, unit=2, stage=2)
    before, _ = hidden(network, group)[0]
    first, _ = hidden(network, perturbed(group, 0))[0]
    second, _ = hidden(network, perturbed(group, 1))[0]
    real = torch.arange(before.shape[1]) >= torch.tensor(network.sight(group).padding)[:, None]
    assert (before[real] != first[real]).any(-1).all()
    assert torch.equal(before, second)


def test_padding_of_texts_has_no_influence():
    config = flow_config(conditioning=TEXT)
    network, (group, _) = (
        stirred_network(config),
        noise_group(config, unit=1, stage=1, numbers=(0, 3)),
    )
    assert set(network.sight(group).padding) != {0}
    before, told = answers(network, group), group.condition
    other = torch.where(told.text_mask[:, :, None], told.text_tokens, torch.tensor(9.0).bfloat16())
    after = answers(network, replace(group, condition=replace(told, text_tokens=other)))
    assert torch.equal(before, after)
    changed = torch.where(told.text_mask[:, :, None], told.text_tokens + 1, told.text_tokens)
    moved = answers(network, replace(group, condition=replace(told, text_tokens=changed)))
    assert (before != moved).any(dim=(1, 2, 3, 4)).all()


@KINDS
def test_samples_of_a_group_and_groups_of_a_batch_do_not_leak(kind):
    config = flow_config(conditioning=kind)
    network = stirred_network(config)
    both, (other, _) = noise_group(config, unit=2, stage=2)[0], noise_group(config, unit=0, stage=1)
    with torch.no_grad():
        together = network([other, both])
    torch.testing.assert_close(together[0], answers(network, other), rtol=0, atol=0)
    for row in (0, 1):
        index = torch.tensor([row])
        lengths = both.text_lengths and both.text_lengths[row : row + 1]
        alone = Group(
            both.stage, both.unit, [piece[row : row + 1] for piece in both.pieces],
            both.clock[row : row + 1], both.condition.rows(index), lengths,
        )  # fmt: skip
        # The shapes of products differ, and so may the last bits of sums.
        torch.testing.assert_close(
            together[1][row : row + 1], answers(network, alone), rtol=1e-5, atol=1e-5
        )


def test_the_first_unit_is_an_image():
    config = flow_config(clip_size=[1, 16, 24])
    clips, images = stirred_network(flow_config()), stirred_network(config)
    images.load_state_dict(clips.state_dict())
    group, _ = noise_group(config, unit=0, stage=2)
    assert torch.equal(answers(clips, group), answers(images, group))


# Positions.


def test_middles_of_coarse_cells_are_means_of_the_fine_cells_they_cover():
    fine = token_places(slice(3, 5), (4, 8), 1, torch.device("cpu")).view(2, 4, 8, 3)
    assert torch.equal(fine[0, :, 0, 1], torch.arange(4.0))
    assert torch.equal(fine[0, 0, :, 2], torch.arange(8.0))
    assert torch.equal(fine[:, 0, 0, 0], torch.tensor([3.0, 4.0]))
    for stride in (2, 4):
        coarse = token_places(slice(3, 5), (4 // stride, 8 // stride), stride, torch.device("cpu"))
        cells = fine.view(2, 4 // stride, stride, 8 // stride, stride, 3).mean((2, 4))
        torch.testing.assert_close(coarse, cells.flatten(0, 2))
    half = token_places(slice(0, 1), (2, 4), 2, torch.device("cpu"))
    assert half[:4, 2].tolist() == [0.5, 2.5, 4.5, 6.5]


def test_what_attention_makes_of_places_is_their_difference():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 5, 32, generator=generator, dtype=torch.float64)
    places = torch.rand(5, 3, generator=generator) * 20
    scores = []
    for moved in (0.0, 13.0):
        turns = rotary_turns(places + moved, 32).double()
        scores.append(rotate(q, turns) @ rotate(k, turns).transpose(-1, -2))
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-4)
    still = rotary_turns(torch.zeros(5, 3), 32).double()
    assert torch.equal(rotate(q, still), q)


@pytest.mark.parametrize(
    "changes", [{}, FULL, {"conditioning": TEXT}, {"conditioning": NOTHING}], ids=str
)
def test_every_parameter_gets_a_gradient_and_the_first_answer_is_zero(changes):
    config = flow_config(**changes)
    group, _ = noise_group(config, unit=0, stage=0)
    fresh = method_of(config).network()
    fresh.init_weights(0)
    assert not answers(fresh, group).any()
    network = stirred_network(config)
    network([group])[0].square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_initial_values_follow_from_the_seed():
    config = flow_config(conditioning=TEXT)
    networks = [method_of(config).network() for _ in range(3)]
    for network, seed in zip(networks, (0, 0, 1), strict=True):
        network.init_weights(seed)
    same, other = [
        all(
            torch.equal(a, b)
            for a, b in zip(networks[0].parameters(), net.parameters(), strict=True)
        )
        for net in networks[1:]
    ]
    assert same
    assert not other


def parameters(config: RunConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in method_of(config).network().parameters())


@pytest.mark.parametrize("recipe", ["pyramid_flow_384p.yaml", "pyramid_flow_768p.yaml"])
def test_recipes_have_the_published_number_of_parameters(recipe):
    assert parameters(load_config(CONFIGS / recipe)) == pytest.approx(1.97e9, rel=0.02)


def test_operations_of_the_average_sample_are_counted_without_running_all():
    """The closed form against counting every stage of every unit."""
    config = flow_config(model={"dim": 64, "head_dim": 32, "double_blocks": 2, "single_blocks": 4})
    method, counted = method_of(config), []
    with torch.device("meta"):
        network = method.network()
        for stage in config.method.stage_turns:
            for unit in range(len(config.method.units)):
                with FlopCounterMode(display=False) as counter:
                    network([blank_group(method.config, method.conditioning, unit, stage)])
                counted.append(counter.get_total_flops())
    # What grows neither with tokens nor with what they see is left out of the closed form.
    assert forward_flops(method) == pytest.approx(sum(counted) / len(counted), rel=0.03)
