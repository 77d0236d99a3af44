"""Attention against its formula; layers that start as the identity."""

import math

import torch

from t2v.network.layers import Attention, ModulatedLayer, key_bias, scalar_features, sine_table


def test_attention_equals_its_formula_head_by_head():
    torch.manual_seed(0)
    attention = Attention(query_dim=6, context_dim=5, inner_dim=8, head_dim=4)
    x, context = torch.randn(2, 3, 6), torch.randn(2, 7, 5)
    mask = torch.rand(2, 5) < 0.7  # of the last five keys; the first two are always seen
    seen = torch.cat([mask.new_ones(2, 2), mask], dim=1)[:, None]
    q, (k, v) = attention.query(x), attention.key_value(context).chunk(2, dim=2)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        scores = q[..., head] @ k[..., head].mT / math.sqrt(4)
        scores = scores.masked_fill(~seen, -math.inf)
        heads.append(scores.softmax(dim=2) @ v[..., head])
    expected = attention.out(torch.cat(heads, dim=2))
    torch.testing.assert_close(attention(x, context, key_bias(mask, 2)), expected)


def test_a_modulated_layer_starts_as_the_identity():
    torch.manual_seed(0)
    layer = ModulatedLayer(8, head_dim=4, conditioning_dim=6)
    layer.init_weights(torch.Generator())
    x = torch.randn(2, 3, 8)
    assert torch.equal(layer(x, torch.randn(2, 6)), x)


def test_positions_and_scalars_are_told_apart():
    table = sine_table(64, 16)
    assert len({tuple(row) for row in table.tolist()}) == 64
    features = scalar_features(torch.linspace(-2, 2, 1000), 64)
    torch.testing.assert_close(features.square().sum(1), torch.full((1000,), 32.0))
    assert torch.cdist(features, features).add(torch.eye(1000)).min() > 1e-2
