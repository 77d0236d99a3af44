"""What parts of the loss count: as given, or as uncertainty weighting would have learned."""

import pytest
import torch

from t2v.train.part_weights import PartWeights

CPU = torch.device("cpu")


def test_weights_are_those_at_which_the_learned_objective_stands_still():
    """`loss / exp(u) + u` at the mean loss: its slope in u is zero there, and it bends upwards."""
    weights, losses = PartWeights("uncertainty", 3), torch.tensor([0.02, 1.0, 700.0])
    assert float(weights.on(CPU)) == 1
    generator = torch.Generator().manual_seed(0)
    for update in range(1, 2001):
        noise = torch.rand(3, generator=generator) + 0.5
        weights.update(losses * noise, update)
    u = (-weights.on(CPU).log()).requires_grad_()
    (slope,) = torch.autograd.grad((losses * (-u).exp() + u).sum(), u)
    # The mean over the last few hundred draws.
    torch.testing.assert_close(slope, torch.zeros(3), atol=0.06, rtol=0)
    torch.testing.assert_close(weights.on(CPU) * losses, torch.ones(3), atol=0.06, rtol=0)


@pytest.mark.parametrize("factor", [1e-3, 8.0])
def test_the_scale_of_a_part_does_not_matter(factor):
    """Its gradient is the same from the second update on, however its loss is measured."""
    shares = []
    for scale in (1.0, factor):
        weights = PartWeights("uncertainty", 2)
        for update, loss in enumerate((3.0, 2.0, 2.5), start=1):
            losses = torch.tensor([scale * loss, loss])
            weights.update(losses, update)
        shares.append(weights.on(CPU) * losses)
    torch.testing.assert_close(*shares)


def test_given_weights_stay_and_none_are_one():
    for setting, wanted in (([0.5, 4.0], [0.5, 4.0]), (None, 1.0)):
        weights = PartWeights(setting, 2)
        weights.update(torch.tensor([1.0, 9.0]), 1)
        assert torch.equal(weights.on(CPU), torch.tensor(wanted))
