"""The weight average is the weighted mean it claims to be."""

import torch

from t2v.train.ema import Ema


def test_average_is_the_normalised_mean_of_all_values_after_updates():
    torch.manual_seed(0)
    parameters = {"a": torch.randn(3, 2), "b": torch.randn(4)}
    ema = Ema(parameters, half_life_steps=2.0)
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
    ema = Ema(parameters, half_life_steps=50.0)
    for update in range(1, 2001):
        ema.update(update)
    parameters["a"].fill_(1.0)
    for update in range(2001, 2051):
        ema.update(update)
    torch.testing.assert_close(ema.averages["a"], torch.tensor([0.5]), atol=1e-3, rtol=0)
