"""LAMB against a plain reference, and the learning rate as a function of the step."""

import math

import pytest
import torch

from t2v.engine.muon import orthogonal
from t2v.engine.optimizer import (
    Groups,
    OptimizerConfig,
    build_optimizer,
    moments_of,
    parameter_groups,
    set_rates,
    start_moments,
)
from t2v.engine.place import Place
from t2v.methods.hpdm.method import HPDMMethod
from t2v.recipe.recipe import RunConfig
from t2v.train.schedule import learning_rate, learning_rates
from tests.tiny import tiny_config

FUSION = "blocks.1.fusion.linear.weight"
GROUPS = Groups(HPDMMethod.new_parameters)


def config(**changes) -> OptimizerConfig:
    values = {"name": "lamb", "learning_rate": 0.01, "warmup_steps": 4, "weight_decay": 0.1}
    return OptimizerConfig(**(values | changes))


def optimizer_of(settings: OptimizerConfig, weights, sum_over_parts=lambda values: values):
    parts = {str(number): weight for number, weight in enumerate(weights)}
    places = {name: Place(tuple(part.shape), 0) for name, part in parts.items()}
    groups = parameter_groups(settings, GROUPS, parts, places)
    optimizer = build_optimizer(settings, groups, sum_over_parts)
    start_all(optimizer)
    return optimizer


def start_all(optimizer) -> None:
    for group in optimizer.param_groups:
        start_moments(optimizer, group["params"], moments_of(group))


def lamb_reference(weights, gradients, settings: OptimizerConfig):
    """Algorithm 2 of arXiv 1904.00962 in float64, one tensor and one step at a time."""
    beta1, beta2 = settings.betas
    results = []
    for number, start in enumerate(weights):
        w, m, v = start.double(), 0.0, 0.0
        for t, step in enumerate(gradients, start=1):
            g = step[number].double()
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g**2
            update = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + settings.eps)
            trust = 1.0
            if w.ndim > 1:
                update = update + settings.weight_decay * w
                if w.norm() > 0 and update.norm() > 0:
                    trust = w.norm() / update.norm()
            w = w - settings.learning_rate * trust * update
        results.append(w.float())
    return results


def test_lamb_equals_a_plain_reference():
    torch.manual_seed(0)
    shapes = [(5, 4), (4,), (3, 2, 2), (6, 6), (1,)]
    weights = [torch.randn(shape) for shape in shapes]
    weights[3].zero_()
    gradients = [[torch.randn(shape) for shape in shapes] for _ in range(6)]
    expected = lamb_reference(weights, gradients, config())
    optimizer = optimizer_of(config(), weights)
    for step in gradients:
        for weight, gradient in zip(weights, step, strict=True):
            weight.grad = gradient
        optimizer.step()
    for found, wanted in zip(weights, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_trust_ratio_is_that_of_the_whole_tensor():
    torch.manual_seed(1)
    whole, gradient = torch.randn(6, 4), torch.randn(6, 4)
    halves = [whole[:3].clone(), whole[3:].clone()]
    sums = []

    def run(part, grad, sum_over_parts):
        optimizer = optimizer_of(config(), [part], sum_over_parts)
        part.grad = grad
        optimizer.step()

    # The first pass learns what each half would send, the second adds it, as an all-reduce does.
    for half, grad in zip(halves, gradient.split(3), strict=True):
        run(half.clone(), grad, lambda values: sums.append(values.clone()) or values)
    for half, grad in zip(halves, gradient.split(3), strict=True):
        run(half, grad, lambda values: sum(sums))
    run(whole, gradient, lambda values: values)
    torch.testing.assert_close(torch.cat(halves), whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("floor", [1.0, 0.25])
def test_a_zero_matrix_reaches_the_norm_of_a_xavier_start(floor):
    """Under a steady gradient, once the rates add up to `1 - ln(floor)`: by steps of the floor up
    to the floor, then by steps of its own norm. Plain LAMB is then far behind. A matrix of more
    than Xavier's norm moves as by plain LAMB."""
    torch.manual_seed(4)
    start = torch.nn.init.xavier_uniform_(torch.empty(24, 40))
    gradient, rate = torch.randn(24, 40), 0.005
    norms = {}
    for floored in (floor, 0.0):
        settings = config(learning_rate=rate, weight_decay=0.0, trust_floor=floored)
        zero, usual = torch.zeros_like(start), 1.1 * start
        optimizer = optimizer_of(settings, [zero, usual])
        for _ in range(round((1 - math.log(floor)) / rate)):
            zero.grad, usual.grad = gradient, gradient
            optimizer.step()
        norms[floored] = float(zero.norm() / start.norm()), usual
    assert norms[floor][0] == pytest.approx(1, rel=0.1)
    assert norms[0.0][0] < 0.5
    torch.testing.assert_close(norms[floor][1], norms[0.0][1], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["lamb", "adamw"])
def test_only_matrices_decay(name):
    matrix, vector = torch.ones(2, 2), torch.ones(2)
    optimizer = optimizer_of(config(name=name), [matrix, vector])
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert (matrix < 1).all()
    assert (vector == 1).all()


def test_adamw_is_torchs_own():
    torch.manual_seed(2)
    ours, theirs = torch.randn(4, 3), None
    theirs = torch.nn.Parameter(ours.clone())
    settings = config(name="adamw")
    optimizer = optimizer_of(settings, [ours])
    reference = torch.optim.AdamW(
        [theirs], 0.01, betas=settings.betas, eps=settings.eps, weight_decay=0.1
    )
    for _ in range(5):
        ours.grad = torch.randn(4, 3)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-7)


def test_muon_is_torchs_own_on_matrices_of_blocks_and_adamw_elsewhere():
    torch.manual_seed(4)
    settings = config(name="muon", betas=(0.9, 0.95))
    parts = {"blocks.0.wide": torch.randn(8, 24), "blocks.0.tall": torch.randn(24, 8)}
    others = {"tokenizer.weight": torch.randn(4, 3), "blocks.0.bias": torch.randn(5)}
    parts |= others
    twins = {name: torch.nn.Parameter(part.clone()) for name, part in parts.items()}
    places = {name: Place(tuple(part.shape), 0) for name, part in parts.items()}
    groups = parameter_groups(settings, GROUPS, parts, places)
    optimizer = build_optimizer(settings, groups, lambda values: values)
    start_all(optimizer)
    rate, decay = settings.learning_rate, settings.weight_decay
    muon = torch.optim.Muon(
        [twins["blocks.0.wide"], twins["blocks.0.tall"]], rate, weight_decay=decay, momentum=0.9,
        adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    vector, matrix = twins["blocks.0.bias"], twins["tokenizer.weight"]
    adamw = torch.optim.AdamW(
        [{"params": [matrix], "weight_decay": decay}, {"params": [vector], "weight_decay": 0.0}],
        rate, betas=settings.betas, eps=settings.eps,
    )  # fmt: skip
    for _ in range(5):
        for part, twin in zip(parts.values(), twins.values(), strict=True):
            part.grad = torch.randn_like(part)
            twin.grad = part.grad.clone()
        for one in (optimizer, muon, adamw):
            one.step()
    for name, part in parts.items():
        # torch orthogonalises in bf16.
        apart = (part - twins[name]).norm() / (5 * rate * part.norm())
        assert apart < (1e-4 if name in others else 0.02), (name, apart)


def test_orthogonal_keeps_singular_vectors_and_levels_singular_values():
    torch.manual_seed(5)
    for shape in ((6, 20), (20, 6)):
        left, sizes, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
        found = left.T @ orthogonal(left @ torch.diag(sizes) @ right) @ right.T
        values = found.diagonal()
        torch.testing.assert_close(found, torch.diag(values), atol=1e-4, rtol=0)
        assert 0.6 < values.min() <= values.max() < 1.25


def test_learning_rate_rises_to_its_peak_and_falls_to_zero():
    rates = [learning_rate(config(), step, 20) for step in range(21)]
    assert rates[0] == pytest.approx(0.01 / 4)
    assert max(rates) == rates[4] == pytest.approx(0.01)
    assert rates[:5] == sorted(rates[:5])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[12] == pytest.approx(0.01 * (1 + math.cos(math.pi / 2)) / 2)
    assert rates[20] == pytest.approx(0, abs=1e-12)


def test_learning_rate_without_warm_up_begins_at_the_peak():
    assert learning_rate(config(warmup_steps=0), 0, 10) == pytest.approx(0.01)


@pytest.mark.parametrize("name", ["lamb", "adamw", "muon"])
def test_a_rate_of_zero_freezes_weights_and_moments(name):
    torch.manual_seed(3)
    parts = {"tokenizer.weight": torch.randn(4, 3), FUSION: torch.randn(4, 3)}
    before = {key: part.clone() for key, part in parts.items()}
    places = {key: Place(tuple(part.shape), 0) for key, part in parts.items()}
    groups = parameter_groups(config(name=name), GROUPS, parts, places)
    optimizer = build_optimizer(config(name=name), groups, lambda values: values)
    start_all(optimizer)
    for _ in range(3):
        for part in parts.values():
            part.grad = torch.randn(4, 3)
        set_rates(optimizer, {"base": 0.0, "new": 0.01})
        optimizer.step()
    assert torch.equal(parts["tokenizer.weight"], before["tokenizer.weight"])
    assert not torch.equal(parts[FUSION], before[FUSION])
    base, new = (optimizer.state[part] for part in parts.values())
    assert not base["exp_avg"].any()
    assert not base["exp_avg_sq"].any()
    assert ("exp_avg_sq" in new) == (name != "muon")
    assert (int(base["step"]), int(new["step"])) == (0, 3)


def rates_of(run: RunConfig, step: int, updates: int) -> dict[str, float]:
    return learning_rates(
        run.optimizer, run.warm_start, step=step, total_steps=run.total_steps, updates=updates
    )


def test_groups_learn_at_their_own_rates():
    run = tiny_config(
        warm_start={
            "checkpoint": "base",
            "new_learning_rate_scale": 2.0,
            "new_warmup_steps": 4,
            "freeze_base_steps": 3,
        }
    )
    plain = [learning_rate(run.optimizer, step, run.total_steps) for step in range(20)]
    # Two of the first steps were skipped: they count as steps, and not as updates.
    rates = [rates_of(run, step, max(step - 2, 0)) for step in range(20)]
    assert [each["base"] for each in rates] == [0.0] * 5 + plain[5:]
    assert [each["new"] for each in rates[4:]] == [2 * rate for rate in plain[4:]]
    assert rates[0]["new"] == plain[0] * 2 / 4
    without = tiny_config()
    assert rates_of(without, 3, 3) == {"base": plain[3], "new": plain[3]}
