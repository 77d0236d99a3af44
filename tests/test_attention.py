"""Which path attention takes is chosen: fused kernels take what they are given, as it is."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from t2v.network.layers import Attention, key_bias
from t2v.recipe.recipe import method_of
from tests.test_graphs import batch_of, built, small

TOKENS, LENGTHS = 21, [0, 3, 5]  # 26 keys: no multiple of what kernels want
MASK = torch.arange(5) < torch.tensor(LENGTHS)[:, None]


def reading() -> tuple[Attention, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return Attention(16, 24, 32, 8), torch.randn(3, 7, 16), torch.randn(3, TOKENS + 5, 24)


def gradients(attention: Attention, output: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(output.square().sum(), list(attention.parameters())))


def test_a_caption_is_read_as_if_its_padding_were_not_there():
    attention, x, context = reading()
    together = attention(x, context, key_bias(MASK, TOKENS))
    for row, length in enumerate(LENGTHS):
        alone = attention(x[row : row + 1], context[row : row + 1, : TOKENS + length])
        torch.testing.assert_close(together[row : row + 1], alone)


def test_a_bias_has_the_bits_of_the_mask_it_stands_for(monkeypatch):
    attention, x, context = reading()
    seen = torch.cat([MASK.new_ones(3, TOKENS), MASK], dim=1)[:, None, None]
    found = attention(x, context, key_bias(MASK, TOKENS))
    found = [found, *gradients(attention, found)]
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v, attn_mask: fused(q, k, v, seen)
    )
    masked = attention(x, context)
    wanted = [masked, *gradients(attention, masked)]
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("name", ["base_36x64", "t2v_64x288x512"])
def test_kernels_take_queries_keys_and_bias_as_they_are(name, precision, monkeypatch):
    """Of one precision, and a bias whose rows start where a GPU's fused kernel wants them, or none:
    neither a mask of booleans nor a copy, and never the product of all queries with all keys."""
    config = small(name)
    calls, fused = [], F.scaled_dot_product_attention

    def noted(q, k, v, attn_mask=None):
        calls.append((q, k, v, attn_mask))
        return fused(q, k, v, attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    network = built(config, compile=False, activation_checkpointing="none")
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        method_of(config).losses(
            network, batch_of(config, [0, 1]), seed=0, device=torch.device("cpu")
        )
    biased = [call for call in calls if call[3] is not None]
    assert len(biased) == len(calls) * len(network.blocks) / sum(
        isinstance(module, Attention) for module in network.modules()
    )
    for q, k, v, bias in calls:
        assert {t.dtype for t in (q, k, v)} == {
            torch.bfloat16 if precision == "bf16" else torch.float32
        }
        assert torch._fused_sdp_choice(q, k, v, bias) != SDPBackend.MATH.value
        if bias is not None:
            assert bias.dtype == q.dtype
            *rows, last = bias.stride()
            assert last == 1
            assert all(stride % 16 == 0 for stride in rows)
