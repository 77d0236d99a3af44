"""A weight average is the weighted mean it claims to be, tracked or made afterwards."""

import numpy as np
import pytest
import torch
from torch import Tensor

from t2v.checkpoint.power_average import power_of, shares_of
from t2v.train.ema import Ema, half_life, power_function


def test_average_is_the_normalised_mean_of_all_values_after_updates():
    torch.manual_seed(0)
    parameters = {"a": torch.randn(3, 2), "b": torch.randn(4)}
    ema = Ema(parameters, half_life(2.0))
    history = []
    for update in range(1, 8):
        for part in parameters.values():
            part.add_(torch.randn(part.shape))
        ema.update(update)
        history.append({name: part.clone() for name, part in parameters.items()})
    # The value k updates ago weighs 2^(-k / 2).
    weights = torch.tensor([0.5 ** (age / 2.0) for age in range(6, -1, -1)])
    for name in parameters:
        values = torch.stack([values[name] for values in history])
        expected = torch.tensordot(weights / weights.sum(), values, dims=1)
        torch.testing.assert_close(ema.averages[name], expected)


def test_average_forgets_half_in_a_half_life():
    parameters = {"a": torch.zeros(1)}
    ema = Ema(parameters, half_life(50.0))
    for update in range(1, 2001):
        ema.update(update)
    parameters["a"].fill_(1.0)
    for update in range(2001, 2051):
        ema.update(update)
    torch.testing.assert_close(ema.averages["a"], torch.tensor([0.5]), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("length", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_a_relative_length_is_the_standard_deviation_of_its_profile(length, gamma):
    """The exponents are those that edm2's authors name."""
    assert power_of(length) == pytest.approx(gamma, abs=5e-3)
    place = (np.arange(10**5) + 0.5) / 10**5
    weight = (power_of(length) + 1) * place ** power_of(length)
    mean = np.average(place, weights=weight)
    deviation = np.average((place - mean) ** 2, weights=weight) ** 0.5
    assert deviation == pytest.approx(length, rel=1e-4)


def walked(length: float, updates: int, step: Tensor) -> list[Tensor]:
    """The average, after each update, of weights that go one step with every update."""
    parameters = {"a": torch.zeros(3, dtype=torch.float64)}
    ema, found = Ema(parameters, power_function(length)), []
    for update in range(1, updates + 1):
        parameters["a"] += step
        ema.update(update)
        found.append(ema.averages["a"].clone())
    return found


LENGTHS, UPDATES = (0.05, 0.1), 400
SNAPSHOTS = [(length, 40 * number) for number in range(1, 11) for length in LENGTHS]
PROFILES = [(float(updates), power_of(length)) for length, updates in SNAPSHOTS]


def test_a_stored_average_is_all_of_its_own_combination():
    for number, profile in enumerate(PROFILES):
        shares, error = shares_of(PROFILES, profile)
        np.testing.assert_allclose(shares, np.eye(len(PROFILES))[number], atol=1e-9)
        assert error < 1e-6


@pytest.mark.parametrize(("length", "tolerance"), [(0.04, 2e-3), (0.075, 2e-4), (0.15, 2e-3)])
def test_stored_averages_add_up_to_the_one_that_was_tracked(length, tolerance):
    """Of weights that walk evenly, whose average is where its profile's mean lies; the tolerance
    is a share of the whole walk."""
    step = torch.tensor([1.0, -0.5, 0.1], dtype=torch.float64)
    kept = {stored: walked(stored, UPDATES, step) for stored in LENGTHS}
    shares, error = shares_of(PROFILES, (float(UPDATES), power_of(length)))
    assert sum(shares) == pytest.approx(1)
    assert error < 0.06
    parts = zip(shares, SNAPSHOTS, strict=True)
    made = sum(share * kept[stored][updates - 1] for share, (stored, updates) in parts)
    tracked = walked(length, UPDATES, step)[-1]
    assert float((made - tracked).abs().max()) < tolerance * UPDATES
    # Whole updates lie half of one later than time does.
    mean = UPDATES * (power_of(length) + 1) / (power_of(length) + 2)
    torch.testing.assert_close(tracked, (mean + 0.5) * step, rtol=2e-4, atol=0)
